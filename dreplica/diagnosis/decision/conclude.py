"""Verdicts that need no replay, and the last step of every verdict: explanation, evidence and remedies."""

from collections.abc import Mapping, Sequence
from typing import Any

from dreplica.agreement.verdict.advice import advise
from dreplica.agreement.verdict.causes import CAUSES
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.signs import Sign
from dreplica.agreement.verdict.verdict import Verdict, split_into_groups, suspects_of
from dreplica.agreement.wiring.fault import WiringError
from dreplica.diagnosis.decision.facts import RunFacts
from dreplica.diagnosis.decision.nondeterministic_ops import explain_operator
from dreplica.diagnosis.decision.rules import name_cause
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.environment.manifest import Difference, card_of, spell_device

_OF_HARDWARE = {"transient-fault", "persistent-fault", "nondeterministic-operator", "unexplained"}
"""Causes that a host or a GPU may be behind."""


def conclude(found: Verdict, facts: RunFacts) -> Verdict:
    """Return the final verdict: the finding with explanation, evidence of the run and remedies."""
    verdict = _explain_nondeterminism(found, facts)
    declared = [
        Evidence.of("declared-settings", replica=replica_id, settings=_dotted(partial))
        for replica_id, partial in facts.overrides.items()
    ]
    environment = [_difference("allowed-difference", difference) for difference in facts.differences]
    if verdict.cause == "declared-override" and not verdict.suspects and found.groups:
        verdict = verdict.with_(suspects=_singled_out(found.groups, facts.overrides))
    lines = [*verdict.evidence, *declared, *_compiled_draws(verdict, facts), *environment]
    verdict = with_remedy(verdict.with_(evidence=lines))
    return _with_cards(verdict, facts.manifests)


def agreed(facts: RunFacts, steps: int, independent: bool, compared: bool) -> Verdict:
    """Return the verdict on a run in which no difference was found.

    Args:
        facts: The facts of the run.
        steps: Number of steps taken.
        independent: True if only samples were compared, since replicas are meant to have different states.
        compared: True if steps were compared, rather than the final state only.
    """
    replicas = f"{facts.num_replicas} replica{'s' * (facts.num_replicas > 1)}"
    what = "same samples in the same order, states independent" if independent else "bit-identical"
    if not compared:
        what = "nothing compared (agreement.every 0)" if independent else "only the final state compared: bit-identical"
    if facts.num_replicas == 1:
        what = "recorded (a single replica has no other to agree with)"
    groups = (
        [[replica_id] for replica_id in range(facts.num_replicas)] if independent else [list(range(facts.num_replicas))]
    )
    summary = f"{replicas}, {steps} step{'s' * (steps != 1)}: {what}"
    return Verdict(facts.num_replicas > 1, "none", summary, groups=groups)


def results_differ(epoch: int, what: str, values: Sequence[float]) -> Verdict:
    """Return the verdict on replicas whose compared state agrees but whose reported results differ.

    Args:
        epoch: The epoch of the results.
        what: The name of the result.
        values: The result of each replica.
    """
    groups = split_into_groups([repr(value).encode() for value in values])
    verdict = Verdict(
        False,
        "unexplained",
        f"replicas agree in all compared state, but not in the {what} of epoch {epoch}: {list(values)}",
        epoch=epoch,
        stage="predictions",
        phase="evaluation",
        suspects=suspects_of(groups),
        groups=groups,
        evidence=[Evidence.of("reported-values-differ", result=what, epoch=epoch, values=list(values))],
    )
    return with_remedy(verdict)


def not_reproduced(step: int, stage: str) -> Verdict:
    """Return the verdict on a resumed run that does not reproduce the steps recorded before its interruption.

    Args:
        step: The repeated step.
        stage: The first of its stages whose digest differs from the recorded one.
    """
    verdict = Verdict(
        False,
        "unexplained",
        f"the resumed run does not reproduce what it recorded at step {step} before it was interrupted",
        step=step,
        stage=stage,
        evidence=[Evidence.of("trace-differs", stage=stage, step=step)],
        remedy=[Remedy.of("compare-manifest"), Remedy.of("start-anew")],
    )
    return with_remedy(verdict)


def wiring_fault(error: WiringError, replica_ids: list[int], num_replicas: int) -> Verdict:
    """Return the verdict on replicas whose model, optimizer and scheduler do not belong together.

    Args:
        error: The fault, as the first of these replicas found it.
        replica_ids: The replicas that found a fault.
        num_replicas: Number of replicas in the run.
    """
    others = [replica_id for replica_id in range(num_replicas) if replica_id not in replica_ids]
    return Verdict(
        agreed=False,
        cause=error.code,
        summary=f"{error.code}: {error}",
        step=0,
        stage="optimizer" if error.code != "storage-shared" else "weights",
        tensor=error.tensor,
        suspects=replica_ids,
        groups=[ids for ids in (others, replica_ids) if ids],
        evidence=[Evidence.of("wiring-checked", replicas=replica_ids)],
        remedy=error.remedies,
    )


def config_differs(differences: Sequence[Difference], groups: list[list[int]], suspects: list[int]) -> Verdict:
    """Return the verdict on replicas that were started with different configs.

    Args:
        differences: The keys that differ, with each replica's value.
        groups: The replicas grouped by equal configs.
        suspects: The replicas outside the majority.
    """
    verdict = Verdict(
        False,
        "config-differs",
        f"replicas were started with different configs: {differences[0]}",
        suspects=suspects,
        groups=groups,
        evidence=[_difference("field-differs", item) for item in differences],
    )
    return with_remedy(verdict)


def environment_differs(differences: Sequence[Difference], groups: list[list[int]], suspects: list[int]) -> Verdict:
    """Return the verdict on replicas that differ in manifest fields which must be equal.

    Args:
        differences: The fields, with each replica's value.
        groups: The replicas grouped by the first field's value.
        suspects: The replicas outside the majority.
    """
    verdict = Verdict(
        False,
        "environment-differs",
        f"replicas run in different environments: {differences[0]}",
        suspects=suspects,
        groups=groups,
        evidence=[_difference("field-differs", item) for item in differences],
    )
    flags = [item.field for item in differences if item.field.startswith("numerics.")]
    if len(flags) == len(differences):  # The configs are equal, so something else has set the flags.
        verdict = verdict.with_(remedy=[Remedy.of("set-fields-alike", fields=flags)])
    return with_remedy(verdict)


def not_learning(step: int, epoch: int, replica_ids: list[int], evidence: list[Evidence]) -> Verdict:
    """Return the verdict on replicas whose weights did not change over a whole epoch, whether they agree or not.

    Args:
        step: Number of steps taken.
        epoch: The epoch after which this was found.
        replica_ids: The replicas whose weights did not change.
        evidence: What the first of them shows of gradients, buffers and learning rates.
    """
    names = ", ".join(map(str, replica_ids))
    verdict = Verdict(
        True,
        "not-learning",
        f"no trainable weight of replica {names} has changed in {step} steps",
        step=step,
        epoch=epoch,
        stage="weights",
        suspects=replica_ids,
        groups=[replica_ids],
        evidence=evidence,
    )
    return with_remedy(verdict)


def conclude_build(found: Verdict, facts: RunFacts) -> Verdict:
    """Name the cause of a divergence at the build as far as seeds and generators determine it."""
    found = found.with_(remedy=[])  # The comparison's own remedy is for a training loop that seeds itself.
    finding, remedy = _find_in_build(found, facts)
    if finding is None:
        return found
    cause = name_cause([finding.kind])
    if cause == "unexplained" and found.cause != "unexplained":
        return found  # something drew after the build
    if cause == "unexplained":
        remedy = [Remedy.of("build-without-hidden-inputs")]
    return found.with_(cause=cause, evidence=[*found.evidence, *finding.lines], remedy=remedy)


def _find_in_build(found: Verdict, facts: RunFacts) -> tuple[Finding | None, list[Remedy]]:
    """Return the first finding on the seeds and generators of the build, with its remedies."""
    if _declares_build(facts.overrides, found.groups):
        return Finding(Kind.BUILD_SEEDS_DECLARED, [Evidence.of("build-matches-overrides")]), []
    if found.cause not in ("unexplained", "generators-differ"):
        return None, []
    seeds = [build.seed for build in facts.builds]
    seeds_after = [build.seed_after for build in facts.builds]
    seeded_again = [i for i, build in enumerate(facts.builds) if build.seed_after != build.seed]
    if not facts.seeded:
        return Finding(Kind.BUILD_UNSEEDED, [Evidence.of("build-seeds-drawn", seeds=seeds)]), []
    if not facts.shared_seed:
        line = Evidence.of("build-seeds-differ", seeds=seeds)
        return Finding(Kind.BUILD_SEEDS_DECLARED, [line]), [Remedy.of("seed-build"), Remedy.of("expect-auto")]
    if seeded_again and len(set(seeds_after)) > 1:
        line = Evidence.of("build-seeded-again", replicas=seeded_again, before=seeds, after=seeds_after)
        return Finding(Kind.BUILD_SEEDED_AGAIN, [line]), [Remedy.of("do-not-seed-in-build")]
    if facts.builds and len({build.rng_before for build in facts.builds}) > 1:
        return Finding(Kind.BUILD_DRAWS_DIFFER, [Evidence.of("generators-differ-before-build")]), []
    if facts.builds and len({build.rng_after for build in facts.builds}) > 1:
        return Finding(Kind.BUILD_DRAWS_DIFFER, [Evidence.of("generators-differ-after-build")]), []
    return Finding(Kind.BUILD_DRAWS_AGREE, [Evidence.of("generators-equal-around-build")]), []


def _declares_build(overrides: Mapping[int, Mapping[str, Any]], groups: list[list[int]]) -> bool:
    """Return True if replicas are built alike exactly where they declare the same settings for their build."""
    sections = ("model", "replica", "criterion", "optim")
    count = sum(len(ids) for ids in groups)
    declared = [repr({key: overrides.get(r, {}).get(key) for key in sections}) for r in range(count)]
    return len(set(declared)) > 1 and all(len({declared[r] for r in ids}) == 1 for ids in groups)


def _explain_nondeterminism(found: Verdict, facts: RunFacts) -> Verdict:
    """Add what is documented of a nondeterministic operator, and the settings of the replica in question."""
    if found.cause != "nondeterministic-operator" or found.operator is None or not facts.manifests:
        return found
    manifest = facts.manifests[found.suspects[0]]
    explanation = explain_operator(found.operator, manifest["device"]["type"], manifest["numerics"])
    evidence = Evidence.of(
        "operator-documented",
        explanation=explanation.text,
        operator=found.operator,
        documented=explanation.known,
        status=explanation.status,
    )
    return found.with_(evidence=[*found.evidence, evidence], remedy=list(explanation.remedy))


def _compiled_draws(verdict: Verdict, facts: RunFacts) -> list[Evidence]:
    """Return evidence that a model which is compiled on some replicas only has drawn random numbers otherwise."""
    compiled = any("compile" in partial.get("model", {}) for partial in facts.overrides.values())
    drawn = verdict.signs.get(Sign.GENERATORS)
    return [Evidence.of("compiled-draws-differ", generators=drawn)] if compiled and drawn else []


def _with_cards(verdict: Verdict, manifests: Sequence[Mapping[str, Any]]) -> Verdict:
    """Name the devices of the suspects, or of all replicas without suspects, where hardware may be the cause."""
    hosts, cards = [row["host"] for row in manifests], [card_of(row) for row in manifests]
    if verdict.cause not in _OF_HARDWARE or (len(set(hosts)) < 2 and not any(cards)):
        return verdict
    replica_ids = verdict.suspects or sorted(r for ids in verdict.groups for r in ids)
    evidence = []
    for replica_id in replica_ids:
        here = hosts[replica_id], cards[replica_id]
        others = [r for r in range(len(cards)) if r != replica_id and here[1] and (hosts[r], cards[r]) == here]
        shared = f", shared with replicas {others}" if others else ""
        device = spell_device(manifests[replica_id])
        evidence.append(
            Evidence.of("runs-on", replica=replica_id, device=device, shared=shared, shared_with=others, host=here[0])
        )
    remedy = []
    for item in verdict.remedy:
        if item.code == "check-gpu-memory" and all(cards[r] for r in replica_ids):
            named = dict.fromkeys((cards[r], hosts[r]) for r in replica_ids)
            remedy += [Remedy.of("check-this-gpu-memory", card=card, host=host) for card, host in named]
        else:
            remedy.append(item)
    return verdict.with_(evidence=[*verdict.evidence, *evidence], remedy=remedy)


def _difference(code: str, difference: Difference) -> Evidence:
    return Evidence.of(code, difference=str(difference), field=difference.field, values=list(difference.values))


def with_remedy(verdict: Verdict) -> Verdict:
    """Add the cause to the summary, its explanation to the evidence, and its remedies where there are no others."""
    cause = CAUSES[verdict.cause]
    explanation = Evidence.of("cause", explanation=cause.explanation, cause=cause.code)
    return verdict.with_(
        summary=f"{verdict.cause}: {verdict.summary}",
        evidence=[explanation, *verdict.evidence],
        remedy=verdict.remedy or advise(verdict) or list(cause.remedy),
    )


def _singled_out(groups: list[list[int]], overrides: Mapping[int, Any]) -> list[int]:
    """Return the replicas that declare a difference, if they are exactly one of two groups without a majority."""
    declared = sorted(overrides)
    return declared if len(groups) == 2 and declared in [sorted(ids) for ids in groups] else []


def _dotted(partial: Mapping[str, Any], prefix: str = "") -> str:
    parts = []
    for key, value in partial.items():
        nested = isinstance(value, Mapping)
        parts.append(_dotted(value, f"{prefix}{key}.") if nested else f"{prefix}{key}={value!r}")
    return ", ".join(parts)
