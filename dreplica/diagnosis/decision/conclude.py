"""Names the cause of a finding where no replay is needed; `unexplained` where the evidence does not suffice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.agreement.verdict.verdict import Verdict, split_into_classes, suspects_of
from dreplica.diagnosis.decision.nondeterministic_ops import explain_operator
from dreplica.distributed.liveness import Lost
from dreplica.environment.manifest import Difference, card_of, spell_device
from dreplica.replica.wiring import WiringError

_OF_HARDWARE = {"transient-fault", "persistent-fault", "nondeterministic-operator", "unexplained"}
"""Causes that a host or a card may be behind."""
_ASK_CARD = "nvidia-smi -q -d"


@dataclass(frozen=True)
class BuildFacts:
    """How one replica's build went."""

    seed: int
    """The seed its generators were given."""
    seed_after: int
    """`torch.initial_seed()` after the build: another one if the build seeded again."""
    rng_before: bytes
    """Digest of all generators just before the build."""
    rng_after: bytes
    """And just after."""


@dataclass
class RunFacts:
    """What is known of a run besides the comparison itself."""

    num_replicas: int
    seeded: bool = True
    """Whether `seed.model` gives a seed."""
    shared_seed: bool = True
    """Whether it gives all replicas the same."""
    overrides: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    differences: Sequence[Difference] = ()
    """Manifest fields on which replicas differ."""
    builds: Sequence[BuildFacts] = ()
    """One per replica, once built."""
    manifests: Sequence[Mapping[str, Any]] = ()
    """One per replica."""


def conclude(found: Verdict, facts: RunFacts) -> Verdict:
    """The verdict on a divergence: the finding with cause, evidence and remedy."""
    verdict = _explain_nondeterminism(found, facts)
    declared = [f"replica {replica_id} declares {_dotted(partial)}" for replica_id, partial in facts.overrides.items()]
    environment = [f"differs, allowed: {difference}" for difference in facts.differences]
    if verdict.cause == "declared-override" and not verdict.suspects and found.classes:
        verdict = verdict.with_(suspects=_singled_out(found.classes, facts.overrides))
    verdict = _with_remedy(verdict.with_(evidence=[*verdict.evidence, *declared, *environment]))
    return _with_cards(verdict, facts.manifests)


def agreed(facts: RunFacts, steps: int, independent: bool, compared: bool) -> Verdict:
    """The verdict on a run of `steps` steps in which nothing was found; `compared`: whether steps were compared."""
    replicas = f"{facts.num_replicas} replica{'s' * (facts.num_replicas > 1)}"
    what = "same samples in the same order, states independent" if independent else "bit-identical"
    if not compared:
        what = "nothing compared (agreement.every 0)" if independent else "only the final state compared: bit-identical"
    if facts.num_replicas == 1:
        what = "recorded (one replica has nothing to agree with)"
    classes = (
        [[replica_id] for replica_id in range(facts.num_replicas)] if independent else [list(range(facts.num_replicas))]
    )
    return Verdict(True, "none", f"{replicas}, {steps} steps: {what}", classes=classes)


def results_differ(epoch: int, what: str, values: Sequence[float]) -> Verdict:
    """The verdict on replicas that agreed in all that was compared, and report other numbers for an epoch."""
    classes = split_into_classes([repr(value).encode() for value in values])
    verdict = Verdict(
        False,
        "unexplained",
        f"replicas agree in all that was compared, but not in the {what} of epoch {epoch}: {list(values)}",
        epoch=epoch,
        stage="predictions",
        phase="evaluation",
        suspects=suspects_of(classes),
        classes=classes,
        evidence=["the numbers themselves differ; compare every step to see where it begins"],
    )
    return _with_remedy(verdict)


def not_reproduced(step: int, stage: str) -> Verdict:
    """The verdict on a run that went on and came to something else than it had recorded before its interruption."""
    verdict = Verdict(
        False,
        "unexplained",
        f"gone on with, the run does not come to what it had recorded at step {step} before it was interrupted",
        step=step,
        stage=stage,
        evidence=[f"replicas agree with each other; the trace has another digest of {stage} for step {step}"],
        remedy=["compare manifest.json with the environment as it is now; begin anew with --run.resume never"],
    )
    return _with_remedy(verdict)


def wiring_fault(error: WiringError, replica_ids: list[int], num_replicas: int) -> Verdict:
    """The verdict on a replica whose parts do not belong together; `replica_ids`: where it was found."""
    others = [replica_id for replica_id in range(num_replicas) if replica_id not in replica_ids]
    return Verdict(
        agreed=False,
        cause=error.code,
        summary=f"{error.code}: {error}",
        step=0,
        stage="optimizer" if error.code != "storage-shared" else "weights",
        tensor=error.tensor,
        suspects=replica_ids,
        classes=[ids for ids in (others, replica_ids) if ids],
        evidence=[f"found by identity checks on replicas {replica_ids} before the first step"],
        remedy=error.remedies,
    )


def config_differs(differences: Sequence[Difference], classes: list[list[int]], suspects: list[int]) -> Verdict:
    """The verdict on replicas that were given different configs; `differences`: the keys with their values."""
    verdict = Verdict(
        False,
        "config-differs",
        f"replicas were started with different configs: {differences[0]}",
        suspects=suspects,
        classes=classes,
        evidence=[str(item) for item in differences],
    )
    return _with_remedy(verdict)


def environment_differs(differences: Sequence[Difference], classes: list[list[int]], suspects: list[int]) -> Verdict:
    """The verdict on manifest fields that must match and do not."""
    verdict = Verdict(
        False,
        "environment-differs",
        f"replicas run on different things: {differences[0]}",
        suspects=suspects,
        classes=classes,
        evidence=[str(item) for item in differences],
    )
    flags = [item.field for item in differences if item.field.startswith("numerics.")]
    if len(flags) == len(differences):  # the config's were set alike
        who = "code of the job, a library that it imports or an environment variable may set it on some"
        verdict = verdict.with_(remedy=[f"let all replicas have the same {', '.join(flags)}: {who}"])
    return _with_remedy(verdict)


def replica_lost(lost: Sequence[Lost], step: int | None, noticed: str) -> Verdict:
    """The verdict on replicas that are gone; `noticed`: what the survivor saw."""
    evidence = [f"replica {item.replica_id}: {item.reason}" for item in lost] + [f"noticed as: {noticed}"]
    names = ", ".join(str(item.replica_id) for item in lost) or "unknown"
    when = "before the first step" if step is None else f"in step {step + 1}"
    first = f": {lost[0].reason}" if lost else ""
    verdict = Verdict(
        False,
        "replica-lost",
        f"replica {names} was lost {when}{first}",
        step=None if step is None else step + 1,
        suspects=[item.replica_id for item in lost],
        evidence=evidence,
    )
    if lost and all(item.raised for item in lost):
        verdict = verdict.with_(remedy=[f"fix this error, whose traceback is above: {lost[0].failure}"])
    return _with_remedy(verdict)


def not_learning(step: int, epoch: int, replica_ids: list[int], evidence: list[str]) -> Verdict:
    """The verdict on replicas whose weights did not change over a whole epoch. They may agree all the same."""
    names = ", ".join(map(str, replica_ids))
    summary = f"no trainable weight of replica {names} has changed in {step} steps"
    verdict = Verdict(
        True,
        "not-learning",
        summary,
        step=step,
        epoch=epoch,
        stage="weights",
        suspects=replica_ids,
        classes=[replica_ids],
        evidence=evidence,
    )
    return _with_remedy(verdict)


def conclude_build(found: Verdict, facts: RunFacts) -> Verdict:
    """The cause of a difference at the build, as far as seeds and generators tell it."""
    found = found.with_(remedy=[])  # the comparison's own is for a loop that seeds by itself
    if _declares_build(facts.overrides, found.classes):
        return _name(found, "declared-override", ["replicas differ exactly as their declared settings of the build do"])
    if found.cause != "unexplained":
        return found
    seeds = [build.seed for build in facts.builds]
    reseeded = [i for i, build in enumerate(facts.builds) if build.seed_after != build.seed]
    if not facts.seeded:
        evidence = [f"seed.model is null; the seeds drawn were {seeds}"]
        return _name(found, "build-not-seeded", evidence)
    if not facts.shared_seed:
        remedy = ["--seed.model 42  # one seed for all", "--agreement.expect auto  # or: expect them to differ"]
        line = f"seed.model gives the replicas different seeds: {seeds}"
        return _name(found, "declared-override", [line]).with_(remedy=remedy)
    if reseeded and len({facts.builds[i].seed_after for i in range(len(seeds))}) > 1:
        after = [build.seed_after for build in facts.builds]
        evidence = [
            f"the build seeded torch again on replicas {reseeded}: torch.initial_seed() was {seeds} before the "
            f"build and {after} after it"
        ]
        remedy = ["take the seeding out of the build: every generator is seeded from seed.model before it"]
        return _name(found, "build-not-seeded", evidence).with_(remedy=remedy)
    before = {build.rng_before for build in facts.builds}
    after_build = {build.rng_after for build in facts.builds}
    if facts.builds and len(before) > 1:
        return _name(found, "build-rng-differs", ["the generators already differed when the build began"])
    if facts.builds and len(after_build) > 1:
        evidence = [
            "the generators were equal when the build began and differ after it: a build drew other or more "
            "random numbers than another"
        ]
        return _name(found, "build-rng-differs", evidence)
    line = "the generators were equal before and after the build on all replicas: what differs was not drawn from them"
    remedy = ["make nothing in the build depend on the rank, the host, the time, or a generator that is not seeded"]
    return found.with_(evidence=[*found.evidence, line], remedy=remedy)


def _declares_build(overrides: Mapping[int, Mapping[str, Any]], classes: list[list[int]]) -> bool:
    """Whether replicas are built alike exactly where they declare the same for their build."""
    sections = ("model", "replica", "criterion", "optim")
    count = sum(len(ids) for ids in classes)
    declared = [repr({key: overrides.get(r, {}).get(key) for key in sections}) for r in range(count)]
    return len(set(declared)) > 1 and all(len({declared[r] for r in ids}) == 1 for ids in classes)


def _explain_nondeterminism(found: Verdict, facts: RunFacts) -> Verdict:
    """What is documented of a non-deterministic operator, and how the settings stood on the replica in question."""
    if found.cause != "nondeterministic-operator" or found.operator is None or not facts.manifests:
        return found
    manifest = facts.manifests[found.suspects[0]]
    explanation = explain_operator(found.operator, manifest["device"]["type"], manifest["numerics"])
    return found.with_(evidence=[*found.evidence, explanation.text], remedy=list(explanation.remedy))


def _with_cards(verdict: Verdict, manifests: Sequence[Mapping[str, Any]]) -> Verdict:
    """Names what the suspects run on, or all where none is singled out, if hardware may have to do with it."""
    hosts, cards = [row["host"] for row in manifests], [card_of(row) for row in manifests]
    if verdict.cause not in _OF_HARDWARE or (len(set(hosts)) < 2 and not any(cards)):
        return verdict
    replica_ids = verdict.suspects or sorted(r for ids in verdict.classes for r in ids)
    lines = []
    for replica_id in replica_ids:
        here = hosts[replica_id], cards[replica_id]
        others = [r for r in range(len(cards)) if r != replica_id and here[1] and (hosts[r], cards[r]) == here]
        shared = f", shared with replicas {others}" if others else ""
        lines.append(f"replica {replica_id} runs on {spell_device(manifests[replica_id])}{shared}")
    remedy = []
    for line in verdict.remedy:
        if line.startswith(_ASK_CARD) and all(cards[r] for r in replica_ids):
            named = dict.fromkeys((cards[r], hosts[r]) for r in replica_ids)
            remedy += [
                line.replace(" -d", f" -i {card} -d").partition("  #")[0] + f"  # on host {host}"
                for card, host in named
            ]
        else:
            remedy.append(line)
    return verdict.with_(evidence=[*verdict.evidence, *lines], remedy=remedy)


def _name(found: Verdict, cause: str, evidence: list[str]) -> Verdict:
    return found.with_(cause=cause, evidence=[*found.evidence, *evidence])


def _with_remedy(verdict: Verdict) -> Verdict:
    cause = CAUSES[verdict.cause]
    return verdict.with_(
        summary=f"{verdict.cause}: {verdict.summary}",
        evidence=[cause.explanation, *verdict.evidence],
        remedy=verdict.remedy or list(cause.remedy),
    )


def _singled_out(classes: list[list[int]], overrides: Mapping[int, Any]) -> list[int]:
    """Without a majority, the replicas that declare a difference, if they are exactly one of the two classes."""
    declared = sorted(overrides)
    return declared if len(classes) == 2 and declared in [sorted(ids) for ids in classes] else []


def _dotted(partial: Mapping[str, Any], prefix: str = "") -> str:
    parts = []
    for key, value in partial.items():
        nested = isinstance(value, Mapping)
        parts.append(_dotted(value, f"{prefix}{key}.") if nested else f"{prefix}{key}={value!r}")
    return ", ".join(parts)
