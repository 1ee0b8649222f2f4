"""Causes that need no replay: what seeds, generators, manifests and the wiring tell, and what they do not."""

from typing import Any

import pytest

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.decision.conclude import (
    BuildFacts,
    RunFacts,
    agreed,
    conclude,
    conclude_build,
    config_differs,
    environment_differs,
    not_learning,
    replica_lost,
    wiring_fault,
)
from dreplica.distributed.liveness import Lost
from dreplica.environment.manifest import Difference
from dreplica.replica.wiring import WiringError

TWO = [[0], [1]]


def finding(**fields: Any) -> Verdict:
    values = {"agreed": False, "cause": "unexplained", "summary": "parted", "step": 0, "stage": "weights"}
    return Verdict(**{**values, "groups": TWO, "evidence": ["seen"], **fields})


def builds(*rows: tuple[int, int, bytes, bytes]) -> list[BuildFacts]:
    return [BuildFacts(*row) for row in rows]


SAME = (42, 42, b"before", b"after")


# ---- the build


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        ({"seeded": False, "builds": builds((1, 1, b"a", b"b"), (2, 2, b"c", b"d"))}, "build-not-seeded"),
        ({"shared_seed": False, "builds": builds((1, 1, b"a", b"b"), (2, 2, b"c", b"d"))}, "declared-override"),
        # Seeded again, each with something else.
        ({"builds": builds((42, 7, b"a", b"b"), (42, 8, b"a", b"c"))}, "build-not-seeded"),
        ({"builds": builds(SAME, (42, 8, b"before", b"c"))}, "build-not-seeded"),
        # Seeded again, all alike, and one drew more: the seeding is not to blame.
        ({"builds": builds((42, 7, b"a", b"b"), (42, 7, b"a", b"c"))}, "build-rng-differs"),
        ({"builds": builds(SAME, (42, 42, b"before", b"other"))}, "build-rng-differs"),
        ({"builds": builds(SAME, (42, 42, b"other", b"after"))}, "build-rng-differs"),
        # Neither: equal generators before and after, whatever else the build did.
        ({"builds": builds(SAME, SAME)}, "unexplained"),
        ({"builds": builds((42, 7, b"a", b"b"), (42, 7, b"a", b"b"))}, "unexplained"),
    ],
)
def test_what_seeds_and_generators_tell_of_a_build(facts: dict[str, Any], cause: str) -> None:
    verdict = conclude_build(finding(), RunFacts(2, **facts))
    assert verdict.cause == cause
    assert verdict.evidence[0] == "seen"
    assert len(verdict.evidence) == 2


def test_a_build_that_seeds_by_itself_is_not_told_to_set_the_seed_that_is_set() -> None:
    verdict = conclude_build(finding(), RunFacts(2, builds=builds((42, 7, b"a", b"b"), (42, 8, b"a", b"c"))))
    assert verdict.remedy == ["take the seeding out of the build: every generator is seeded from seed.model before it"]


def test_a_cause_that_is_known_already_is_kept() -> None:
    found = finding(cause="structure-differs")
    assert conclude_build(found, RunFacts(2, seeded=False)) == found


# ---- what is added to every finding


def test_a_verdict_explains_its_cause_and_tells_what_is_declared_and_what_differs() -> None:
    overrides = {1: {"determinism": {"threads": 2, "onednn": False}}}
    differences = [Difference("host", ("a", "b"), allowed=True)]
    verdict = conclude(finding(cause="batch-differs"), RunFacts(2, overrides=overrides, differences=differences))
    assert verdict.summary == "batch-differs: parted"
    assert verdict.evidence == [
        CAUSES["batch-differs"].explanation,
        "seen",
        "replica 1 declares determinism.threads=2, determinism.onednn=False",
        "differs, allowed: host: 'a' on replica 0; 'b' on replica 1",
    ]
    assert verdict.remedy == list(CAUSES["batch-differs"].remedy)


def test_a_remedy_of_its_own_is_kept() -> None:
    assert conclude(finding(remedy=["do this"]), RunFacts(2)).remedy == ["do this"]


def test_a_suspect_is_not_replaced_by_who_declares_a_difference() -> None:
    overrides = {1: {"determinism": {"threads": 2}}}
    assert conclude(finding(cause="persistent-fault", suspects=[0]), RunFacts(2, overrides=overrides)).suspects == [0]


def test_who_declares_a_difference_is_named_only_where_the_classes_are_divided_so() -> None:
    overrides = {1: {"determinism": {"threads": 2}}}
    found = finding(cause="declared-override")
    assert conclude(found, RunFacts(2, overrides=overrides)).suspects == [1]
    assert conclude(found.with_(groups=[[0, 1], [2, 3]]), RunFacts(4, overrides=overrides)).suspects == []
    assert conclude(found.with_(groups=[[0], [1], [2]]), RunFacts(3, overrides=overrides)).suspects == []


@pytest.mark.parametrize("cause", ["build-not-seeded", "batch-differs"])
def test_a_declared_difference_makes_nobody_suspect_of_something_else(cause: str) -> None:
    overrides = {1: {"data": {"num_workers": 2}}}
    assert conclude(finding(cause=cause), RunFacts(2, seeded=False, overrides=overrides)).suspects == []


def manifest(**numerics: Any) -> dict[str, Any]:
    flags = {"deterministic_algorithms": False, "deterministic_warn_only": False}
    device = {"type": "cuda", "index": 0, "name": "NVIDIA H200", "uuid": "1"}
    return {"host": "a", "device": device, "numerics": {**flags, **numerics}}


def test_what_is_documented_of_an_operator_is_told_by_its_own_replicas_settings() -> None:
    found = finding(cause="nondeterministic-operator", operator="aten.index_add_.default", suspects=[1])
    strict = manifest(deterministic_algorithms=True)
    strict["device"]["uuid"] = "0"
    loose = conclude(found, RunFacts(2, manifests=[strict, manifest()]))
    told = conclude(found, RunFacts(2, manifests=[manifest(), strict]))
    assert "--determinism.mode strict" in " ".join(loose.remedy)
    assert loose.evidence != told.evidence
    other = conclude(found.with_(cause="persistent-fault"), RunFacts(2, manifests=[strict, manifest()]))
    assert other.evidence[1:] == ["seen", "replica 1 runs on NVIDIA H200, GPU-1, cuda:0 of host a"]


# ---- verdicts of their own


@pytest.mark.parametrize(
    ("num_replicas", "every", "independent", "words", "groups"),
    [
        (2, 5, False, "2 replicas, 5 steps: bit-identical", [[0, 1]]),
        (3, 5, True, "states independent", [[0], [1], [2]]),
        (2, 0, False, "2 replicas, 5 steps: only the final state compared", [[0, 1]]),
        (2, 0, True, "2 replicas, 5 steps: nothing compared", [[0], [1]]),
        (1, 5, False, "1 replica, 5 steps: recorded", [[0]]),
    ],
)
def test_agreement_claims_no_more_than_was_compared(
    num_replicas: int, every: int, independent: bool, words: str, groups: list[list[int]]
) -> None:
    verdict = agreed(RunFacts(num_replicas), 5, independent, compared=every > 0)
    assert (verdict.agreed, verdict.cause, verdict.groups) == (True, "none", groups)
    assert words in verdict.summary
    assert ("bit-identical" in verdict.summary) is (not independent and num_replicas > 1)


@pytest.mark.parametrize(("cause", "stage"), [("optimizer-not-bound", "optimizer"), ("storage-shared", "weights")])
def test_wiring_is_faulty_where_it_was_found(cause: str, stage: str) -> None:
    error = WiringError("the parts do not fit", code=cause, tensor="0.weight", remedies=["fix it"])
    verdict = wiring_fault(error, [1], 3)
    assert (verdict.agreed, verdict.cause, verdict.step, verdict.stage) == (False, cause, 0, stage)
    assert (verdict.suspects, verdict.groups) == ([1], [[0, 2], [1]])
    assert verdict.tensor == "0.weight"
    assert [item.command for item in verdict.remedy] == ["fix it"]
    assert wiring_fault(error, [0, 1], 2).groups == [[0, 1]]


@pytest.mark.parametrize(
    ("make", "cause"), [(config_differs, "config-differs"), (environment_differs, "environment-differs")]
)
def test_differences_before_the_first_step(make: Any, cause: str) -> None:
    differences = [Difference("optim.lr", (0.1, 0.2, 0.1), False), Difference("seed.data", (1, 2, 1), False)]
    verdict = make(differences, [[0, 2], [1]], [1])
    assert (verdict.agreed, verdict.cause, verdict.suspects) == (False, cause, [1])
    assert "optim.lr: 0.1 on replicas 0, 2; 0.2 on replica 1" in verdict.summary
    assert [line.split(":")[0] for line in verdict.evidence[1:]] == ["optim.lr", "seed.data"]


def test_flags_that_differ_are_not_mended_by_installing_anything() -> None:
    flags = [Difference("numerics.threads", (1, 2), False), Difference("numerics.onednn", (True, False), False)]
    assert (
        environment_differs(flags, [[0], [1]], [])
        .remedy[0]
        .startswith("let all replicas have the same numerics.threads, numerics.onednn: code of the job")
    )
    versions = Difference("versions.torch", ("2.14", "2.15"), False)
    assert environment_differs([versions, *flags], [[0], [1]], []).remedy[0].startswith("install the same versions")


def test_a_lost_replica_is_named_with_the_step_it_was_lost_in() -> None:
    verdict = replica_lost([Lost(2)], 4, "connection closed")
    assert (verdict.cause, verdict.step, verdict.suspects) == ("replica-lost", 5, [2])
    assert "replica 2 was lost in step 5: no response" in verdict.summary
    assert "noticed as: connection closed" in verdict.evidence
    nobody = replica_lost([], None, "no answer")
    assert (nobody.step, nobody.suspects) == (None, [])
    assert "before the first step" in nobody.summary


def test_replicas_that_agree_may_not_be_learning() -> None:
    verdict = not_learning(5, 1, [0, 1], ["0 of 6"])
    assert (verdict.agreed, verdict.cause, verdict.step, verdict.epoch) == (True, "not-learning", 5, 1)
    assert verdict.suspects == [0, 1]
    assert "0 of 6" in verdict.evidence


# ---- what replicas run on


def on_gpus(*cards: tuple[str, str]) -> list[dict[str, Any]]:
    """Manifests of replicas on such (host, UUID)."""
    device = {"type": "cuda", "index": 0, "name": "NVIDIA H200"}
    return [
        {"host": host, "cpu": {"model": "a CPU"}, "device": {**device, "uuid": uuid}, "numerics": {}}
        for host, uuid in cards
    ]


def test_the_card_of_a_suspect_is_named_with_its_host() -> None:
    facts = RunFacts(3, manifests=on_gpus(("a", "11"), ("a", "22"), ("b", "33")))
    verdict = conclude(finding(cause="transient-fault", suspects=[2], groups=[[0, 1], [2]]), facts)
    assert verdict.evidence[-1] == "replica 2 runs on NVIDIA H200, GPU-33, cuda:0 of host b"
    asked = [line for line in verdict.remedy if line.startswith("nvidia-smi")]
    assert asked == ["nvidia-smi -q -i GPU-33 -d ECC,ROW_REMAPPER  # on host b"]


def test_of_two_without_a_majority_both_cards_are_named() -> None:
    facts = RunFacts(2, manifests=on_gpus(("a", "11"), ("a", "22")))
    verdict = conclude(finding(cause="persistent-fault"), facts)
    assert [line.partition(",")[2] for line in verdict.evidence[-2:]] == [
        f" GPU-{uuid}, cuda:0 of host a" for uuid in ("11", "22")
    ]
    assert len([line for line in verdict.remedy if line.startswith("nvidia-smi -q -i GPU-")]) == 2


def test_a_card_that_sound_replicas_share_says_so() -> None:
    facts = RunFacts(3, manifests=on_gpus(("a", "11"), ("a", "11"), ("b", "11")))
    verdict = conclude(finding(cause="transient-fault", suspects=[1], groups=[[0, 2], [1]]), facts)
    assert verdict.evidence[-1].endswith("GPU-11, cuda:0 of host a, shared with replicas [0]")


def test_where_hardware_has_nothing_to_do_with_it_none_is_named() -> None:
    facts = RunFacts(2, manifests=on_gpus(("a", "11"), ("b", "22")))
    assert not any("GPU-" in line for line in conclude(finding(cause="structure-differs"), facts).evidence)


@pytest.mark.parametrize(("hosts", "named"), [(("a", "b"), True), (("a", "a"), False)])
def test_on_cpus_hosts_are_named_where_there_are_several(hosts: tuple[str, str], named: bool) -> None:
    rows = [{"host": host, "cpu": {"model": "Xeon"}, "device": {"type": "cpu"}, "numerics": {}} for host in hosts]
    verdict = conclude(finding(cause="transient-fault", suspects=[1]), RunFacts(2, manifests=rows))
    assert ("replica 1 runs on Xeon of host b" in verdict.evidence) == named
    assert any(line.startswith("nvidia-smi -q -d") for line in verdict.remedy)
