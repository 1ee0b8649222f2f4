"""Causes that need no replay: from seeds, generators, manifests and the wiring."""

from typing import Any

import pytest

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.agreement.wiring.fault import WiringError
from dreplica.diagnosis.decision.conclude import (
    agreed,
    conclude,
    conclude_build,
    config_differs,
    environment_differs,
    not_learning,
    wiring_fault,
)
from dreplica.diagnosis.decision.facts import BuildFacts, RunFacts
from dreplica.environment.manifest import Difference
from tests.messages import codes, commands, texts

TWO = [[0], [1]]
SEEN = Evidence.of("no-majority", num_replicas=2)


def finding(**fields: Any) -> Verdict:
    values = {"agreed": False, "cause": "unexplained", "summary": "diverged", "step": 0, "stage": "weights"}
    return Verdict(**{**values, "groups": TWO, "evidence": [SEEN], **fields})


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
        # Neither: equal generators before and after, regardless of the rest of the build.
        ({"builds": builds(SAME, SAME)}, "unexplained"),
        ({"builds": builds((42, 7, b"a", b"b"), (42, 7, b"a", b"b"))}, "unexplained"),
    ],
)
def test_conclude_build_reads_seeds_and_generators(facts: dict[str, Any], cause: str) -> None:
    verdict = conclude_build(finding(), RunFacts(2, **facts))
    assert verdict.cause == cause
    assert verdict.evidence[0] == SEEN
    assert len(verdict.evidence) == 2


def test_build_that_seeds_again_gets_its_own_remedy() -> None:
    verdict = conclude_build(finding(), RunFacts(2, builds=builds((42, 7, b"a", b"b"), (42, 8, b"a", b"c"))))
    assert codes(verdict.remedy) == ["do-not-seed-in-build"]


def test_conclude_build_keeps_a_known_cause() -> None:
    found = finding(cause="structure-differs")
    assert conclude_build(found, RunFacts(2, seeded=False)) == found


# ---- what is added to every finding


def test_conclude_adds_explanation_overrides_differences() -> None:
    overrides = {1: {"determinism": {"threads": 2, "onednn": False}}}
    differences = [Difference("host", ("a", "b"), allowed=True)]
    verdict = conclude(finding(cause="batch-differs"), RunFacts(2, overrides=overrides, differences=differences))
    assert verdict.summary == "batch-differs: diverged"
    assert texts(verdict.evidence) == [
        CAUSES["batch-differs"].explanation,
        SEEN.text,
        "replica 1 declares determinism.threads=2, determinism.onednn=False",
        "differs, and may differ: host: 'a' on replica 0; 'b' on replica 1",
    ]
    assert verdict.remedy == list(CAUSES["batch-differs"].remedy)


def test_conclude_keeps_a_specific_remedy() -> None:
    assert codes(conclude(finding(remedy=[Remedy.of("one-thread")]), RunFacts(2)).remedy) == ["one-thread"]


def test_override_does_not_replace_a_suspect() -> None:
    overrides = {1: {"determinism": {"threads": 2}}}
    assert conclude(finding(cause="persistent-fault", suspects=[0]), RunFacts(2, overrides=overrides)).suspects == [0]


def test_override_is_suspect_only_if_groups_match() -> None:
    overrides = {1: {"determinism": {"threads": 2}}}
    found = finding(cause="declared-override")
    assert conclude(found, RunFacts(2, overrides=overrides)).suspects == [1]
    assert conclude(found.with_(groups=[[0, 1], [2, 3]]), RunFacts(4, overrides=overrides)).suspects == []
    assert conclude(found.with_(groups=[[0], [1], [2]]), RunFacts(3, overrides=overrides)).suspects == []


@pytest.mark.parametrize("cause", ["build-not-seeded", "batch-differs"])
def test_override_is_no_suspect_of_another_cause(cause: str) -> None:
    overrides = {1: {"data": {"num_workers": 2}}}
    assert conclude(finding(cause=cause), RunFacts(2, seeded=False, overrides=overrides)).suspects == []


def manifest(**numerics: Any) -> dict[str, Any]:
    flags = {"deterministic_algorithms": False, "deterministic_warn_only": False}
    device = {"type": "cuda", "index": 0, "name": "NVIDIA H200", "uuid": "1"}
    return {"host": "a", "device": device, "numerics": {**flags, **numerics}}


def test_operator_is_explained_with_the_suspects_settings() -> None:
    found = finding(cause="nondeterministic-operator", operator="aten.index_add_.default", suspects=[1])
    strict = manifest(deterministic_algorithms=True)
    strict["device"]["uuid"] = "0"
    loose = conclude(found, RunFacts(2, manifests=[strict, manifest()]))
    other_settings = conclude(found, RunFacts(2, manifests=[manifest(), strict]))
    assert commands(loose.remedy) == ["--determinism.mode strict"]
    assert loose.evidence != other_settings.evidence
    other = conclude(found.with_(cause="persistent-fault"), RunFacts(2, manifests=[strict, manifest()]))
    assert texts(other.evidence[1:]) == [SEEN.text, "replica 1 runs on NVIDIA H200, GPU-1, cuda:0 of host a"]


# ---- verdicts without replays


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
def test_agreed_claims_only_what_was_compared(
    num_replicas: int, every: int, independent: bool, words: str, groups: list[list[int]]
) -> None:
    verdict = agreed(RunFacts(num_replicas), 5, independent, compared=every > 0)
    assert (verdict.agreed, verdict.cause, verdict.groups) == (num_replicas > 1, "none", groups)
    assert words in verdict.summary
    assert ("bit-identical" in verdict.summary) is (not independent and num_replicas > 1)


@pytest.mark.parametrize(("cause", "stage"), [("optimizer-not-bound", "optimizer"), ("storage-shared", "weights")])
def test_wiring_fault_names_replicas_and_stage(cause: str, stage: str) -> None:
    error = WiringError("the parts do not fit", code=cause, tensor="0.weight", remedies=[Remedy.of("copy-together")])
    verdict = wiring_fault(error, [1], 3)
    assert (verdict.agreed, verdict.cause, verdict.step, verdict.stage) == (False, cause, 0, stage)
    assert (verdict.suspects, verdict.groups) == ([1], [[0, 2], [1]])
    assert verdict.tensor == "0.weight"
    assert [item.code for item in verdict.remedy] == ["copy-together"]
    assert wiring_fault(error, [0, 1], 2).groups == [[0, 1]]


@pytest.mark.parametrize(
    ("make", "cause"), [(config_differs, "config-differs"), (environment_differs, "environment-differs")]
)
def test_differences_before_first_step_are_named(make: Any, cause: str) -> None:
    differences = [Difference("optim.lr", (0.1, 0.2, 0.1), False), Difference("seed.data", (1, 2, 1), False)]
    verdict = make(differences, [[0, 2], [1]], [1])
    assert (verdict.agreed, verdict.cause, verdict.suspects) == (False, cause, [1])
    assert "optim.lr: 0.1 on replicas 0, 2; 0.2 on replica 1" in verdict.summary
    assert [item.data["field"] for item in verdict.evidence[1:]] == ["optim.lr", "seed.data"]


def test_differing_flags_have_their_own_remedy() -> None:
    flags = [Difference("numerics.threads", (1, 2), False), Difference("numerics.onednn", (True, False), False)]
    (remedy,) = environment_differs(flags, [[0], [1]], []).remedy
    assert (remedy.code, remedy.data) == ("set-fields-alike", {"fields": ["numerics.threads", "numerics.onednn"]})
    versions = Difference("versions.torch", ("2.14", "2.15"), False)
    assert environment_differs([versions, *flags], [[0], [1]], []).remedy[0].code == "install-same-versions"


def test_not_learning_is_compatible_with_agreement() -> None:
    verdict = not_learning(5, 1, [0, 1], [SEEN])
    assert (verdict.agreed, verdict.cause, verdict.step, verdict.epoch) == (True, "not-learning", 5, 1)
    assert verdict.suspects == [0, 1]
    assert SEEN in verdict.evidence


# ---- what replicas run on


def on_gpus(*cards: tuple[str, str]) -> list[dict[str, Any]]:
    """Manifests of replicas on such (host, UUID)."""
    device = {"type": "cuda", "index": 0, "name": "NVIDIA H200"}
    return [
        {"host": host, "cpu": {"model": "a CPU"}, "device": {**device, "uuid": uuid}, "numerics": {}}
        for host, uuid in cards
    ]


def test_suspects_card_and_host_are_named() -> None:
    facts = RunFacts(3, manifests=on_gpus(("a", "11"), ("a", "22"), ("b", "33")))
    verdict = conclude(finding(cause="transient-fault", suspects=[2], groups=[[0, 1], [2]]), facts)
    assert verdict.evidence[-1].text == "replica 2 runs on NVIDIA H200, GPU-33, cuda:0 of host b"
    asked = [str(remedy) for remedy in verdict.remedy if "nvidia-smi" in (remedy.command or "")]
    assert asked == ["nvidia-smi -q -i GPU-33 -d ECC,ROW_REMAPPER  # on host b"]


def test_without_majority_both_cards_are_named() -> None:
    facts = RunFacts(2, manifests=on_gpus(("a", "11"), ("a", "22")))
    verdict = conclude(finding(cause="persistent-fault"), facts)
    assert [item.text.partition(",")[2] for item in verdict.evidence[-2:]] == [
        f" GPU-{uuid}, cuda:0 of host a" for uuid in ("11", "22")
    ]
    assert codes(verdict.remedy).count("check-this-gpu-memory") == 2


def test_card_shared_with_other_replicas_is_marked() -> None:
    facts = RunFacts(3, manifests=on_gpus(("a", "11"), ("a", "11"), ("b", "11")))
    verdict = conclude(finding(cause="transient-fault", suspects=[1], groups=[[0, 2], [1]]), facts)
    assert verdict.evidence[-1].text.endswith("GPU-11, cuda:0 of host a, shared with replicas [0]")


def test_no_card_is_named_without_hardware_cause() -> None:
    facts = RunFacts(2, manifests=on_gpus(("a", "11"), ("b", "22")))
    assert not any("GPU-" in line for line in texts(conclude(finding(cause="structure-differs"), facts).evidence))


@pytest.mark.parametrize(("hosts", "named"), [(("a", "b"), True), (("a", "a"), False)])
def test_on_cpus_several_hosts_are_named(hosts: tuple[str, str], named: bool) -> None:
    rows = [{"host": host, "cpu": {"model": "Xeon"}, "device": {"type": "cpu"}, "numerics": {}} for host in hosts]
    verdict = conclude(finding(cause="transient-fault", suspects=[1]), RunFacts(2, manifests=rows))
    assert ("replica 1 runs on Xeon of host b" in texts(verdict.evidence)) == named
    assert "check-gpu-memory" in codes(verdict.remedy)
