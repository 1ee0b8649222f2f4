"""`dreplica.diagnose`: the cause of a divergence in a custom training loop."""

import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dreplica.agreement.agreement import Batch
from dreplica.agreement.subject import Models, Subject
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.location import describe, first_difference
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Verdict, split_into_groups, suspects_of
from dreplica.diagnosis.decision.code_remedies import as_code
from dreplica.diagnosis.decision.conclude import conclude
from dreplica.diagnosis.decision.decide import decide
from dreplica.diagnosis.decision.decide_layout import explained_by_order, find_layout, structure_verdict
from dreplica.diagnosis.decision.facts import RunFacts
from dreplica.diagnosis.decision.overrides import divides_as
from dreplica.diagnosis.decision.rules import may_be_hardware, name_in
from dreplica.diagnosis.diagnose_run import as_verdict, close_replayer, field_evidence
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import (
    Decision,
    Witness,
    could_have_made,
    difference_behind,
    first_stage,
    with_findings,
    with_lines,
)
from dreplica.diagnosis.evidence.observation import first_difference as first_operator
from dreplica.diagnosis.evidence.place import findings_of_replays
from dreplica.diagnosis.measurement.full_tensors import compare_outputs
from dreplica.diagnosis.replay.replay_run import Replayed
from dreplica.diagnosis.replay.replay_step import NO_INDICES, Repeated
from dreplica.diagnosis.replay.shared_state import share_state
from dreplica.diagnosis.replay.state_layout import LayoutDifferences, gather_layouts
from dreplica.distributed.attempt import AttemptFailed, attempt
from dreplica.distributed.channel import Channel
from dreplica.distributed.control import channel_of_body
from dreplica.distributed.failure import describe_exception
from dreplica.distributed.process_group import World
from dreplica.environment.device import Device
from dreplica.environment.manifest import Difference, collect_manifest, compare_manifests, gather_manifests
from dreplica.errors import UsageError
from dreplica.state.stages import STAGES, Optimizers, Stage

_COLLECTIVES = ("c10d.", "_c10d_functional.")


def diagnose(
    step: Callable[[Any], Any],
    batch: Batch,
    model: Models,
    optimizer: Optimizers = None,
    *,
    others: Sequence[Any] = (),
    found: Verdict | None = None,
    channel: Channel | None = None,
) -> Verdict:
    """Run a training step twice on every replica, from one state, and locate the first operator that differs.

    ```python
    try:
        agreement.step(batch=batch, loss=loss)
    except dreplica.Divergence as divergence:
        verdict = dreplica.diagnose(training_step, batch, model, optimizer, found=divergence.verdict)
        print(verdict.cause, verdict.operator)
    ```

    If replicas hold different states, all use the state of the first replica of the largest group during the
    diagnosis. Afterwards model, optimizer, `others` and the global generators are restored byte for byte. Anything else
    that the step changes (its own counter, a file) stays changed. The verdict's step and epoch are those of `found`.

    Note:
        Collective: call it on every rank, with the same batch.

    Args:
        step: Function that takes one step on the batch that it is given: forward, backward, optimizer. Its return
            value (a loss, outputs) is compared too. Return the outputs as well as the loss, since different outputs can
            round to the same loss. The step must not communicate with other processes.
        batch: The step's argument: a tensor, or tensors in dicts, lists and tuples. The step gets a copy.
        model: The model that the step trains, or several models by name. Pass a model without
            DistributedDataParallel. Pass a compiled model as `torch.compile` returned it, so that the compiled step is
            run.
        optimizer: The optimizer of the model, or several optimizers by name.
        others: Further objects with a `state_dict` that the step changes, such as a scheduler or a GradScaler.
        found: The verdict of the `Divergence` to explain.
        channel: Internal, may change without notice: the control channel. By default, a new gloo group of all ranks.

    Returns:
        The verdict. Its cause is `none` if every replica gets the same result both times and there is no `found`, and
        `unexplained` if `found` cannot be reproduced or the observations do not explain it.

    Raises:
        UsageError: If an argument cannot be used, such as a model wrapped in DistributedDataParallel. It is raised on
            all ranks, also if the arguments of one rank are wrong.
        ReplicaLost: If another replica ended, failed or stopped responding.
    """
    if channel is None:
        with channel_of_body() as own:
            return diagnose(step, batch, model, optimizer, others=others, found=found, channel=own)
    world = World(channel.rank, channel.size, channel, None, socket.gethostname())
    subject = world.together(lambda: _subject(model, optimizer, others))
    facts = RunFacts(channel.size)
    try:
        facts, differing = _environment(subject, world)
        repeated = attempt(channel, lambda: Repeated(step, batch, subject))
    except AttemptFailed as error:
        return _conclude(_failed(found, channel, error), facts)
    try:
        verdict = _diagnose(repeated, found, channel, differing)
    except AttemptFailed as error:
        verdict = _failed(found, channel, error)
    except BaseException:  # Ctrl-C, or a lost replica: the replicas cannot agree on anything any more.
        repeated.close()
        raise
    return _conclude(close_replayer(verdict, repeated, channel), facts)


def _subject(model: Models, optimizer: Optimizers, others: Sequence[Any]) -> Subject:
    try:
        subject = Subject(model, optimizer, others)
    except UsageError:
        raise
    except Exception as error:  # the other replicas would wait for this one
        text = f"model, optimizer or others cannot be read: {describe_exception(error)}"
        raise UsageError(text, code="unreadable-state") from error
    if subject.is_ddp:
        raise UsageError(
            "model is wrapped in DistributedDataParallel, whose backward pass waits for other ranks. Pass "
            "model.module, a step that calls it, and the same batch on all ranks, which must then get the same result.",
            code="ddp-model",
        )
    return subject


def _diagnose(repeated: Repeated, found: Verdict | None, channel: Channel, differing: Sequence[Difference]) -> Verdict:
    batches = channel.gather(repeated.batch)
    layouts = gather_layouts(repeated.parts, repeated.given, channel)
    if len(_groups(batches)) > 1:
        verdict = _diverged(found, "replicas were given different batches", batches).with_(cause="batch-differs")
        return verdict if layouts.batch is None else verdict.with_(evidence=[*verdict.evidence, layouts.batch])
    structure = layouts.structure()
    if structure is not None:
        return structure_verdict(structure, found)
    repeated.by_name = layouts.order is not None
    lines = _begin(repeated, channel.gather(attempt(channel, repeated.state)), channel)
    first, second = attempt(channel, lambda: (repeated.again(), repeated.again()))
    runs = list(zip(*channel.gather((first.stages, second.stages)), strict=True))
    if len(_groups(runs[0])) == 1 < len(_groups(runs[1])):
        first, second, runs = second, first, runs[::-1]
    stage = first_stage([{name: made.digest for name, made in row.items()} for row in runs[0]])
    witnesses = channel.gather(_witness(first, second, stage))
    talks = sorted({r.name for row in witnesses for r in row.records if r.name.startswith(_COLLECTIVES)})
    if talks:
        line = Evidence.of("step-communicates", operators=talks)
        return _unexplained(found, channel, "the step could not be diagnosed", [*lines, line])
    if stage is None and all(row.first == row.second for row in witnesses):
        return _all_agree(found, channel, lines, layouts)
    if stage is None:
        verdict = _unexplained(found, channel, "the step does not give the same result twice", [])
    else:
        verdict = _diverged(found, "run from one state, the step diverges", runs[0])
    decision = decide(witnesses, {}, differing)
    arbitrates = may_be_hardware(decision)
    decision = compare_outputs(decision, repeated, NO_INDICES, channel, arbitrates=arbitrates, votes=False)
    decision = _find_varying(decision, witnesses)
    decision = _find_differences(decision, stage, found, differing)
    decision = name_in(find_layout(decision, witnesses, layouts, stage, found))
    verdict = as_verdict(verdict, replace(decision, evidence=[*lines, *decision.evidence]))
    if decision.cause != "environment-differs":
        return verdict
    fields = [row.field for row in differing if not row.allowed]
    return verdict.with_(remedy=[Remedy.of("set-field-alike", field=field) for field in fields])


def _begin(repeated: Repeated, states: Sequence[Mapping[str, Stage]], channel: Channel) -> list[Evidence]:
    """Make all replicas begin with one state. Collective. Returns evidence if their states differed."""
    groups = _groups(states)
    lines = []
    if len(groups) > 1:
        source, place = groups[0][0], first_difference([0] * channel.size, states)
        share_state(repeated.parts, source, channel)
        where = f"{place.stage}, {place.tensor}" if place.tensor else place.stage
        lines.append(Evidence.of("state-shared", place=where, replica=source))
    attempt(channel, repeated.begin)
    return lines


def _groups(rows: Sequence[Mapping[str, Stage]]) -> list[list[int]]:
    return split_into_groups([b"".join(stage.digest for stage in row.values()) for row in rows])


def _witness(first: Replayed, second: Replayed, stage: str | None) -> Witness:
    """Return this replica's observations. The first run serves as the original: there is no other."""
    records = first.tracer.records, second.tracer.records
    digests, again = ({name: stage.digest for name, stage in row.stages.items()} for row in (first, second))
    itself = difference_behind(*records, stage) or first_operator(*records)
    return Witness(
        original=digests,
        first=digests,
        second=again,
        records=first.tracer.records,
        against_itself=itself,
        at_itself=findings_of_replays(itself, *records, first.contents.before),
        contents=first.contents,
        indices_intact=True,
        generator=first.generator,
        generator_changed=False,
        sample_digests=[],
        layout=first.layout,
    )


def _all_agree(found: Verdict | None, channel: Channel, lines: list[Evidence], layouts: LayoutDifferences) -> Verdict:
    """Return the verdict on a step that gives the same result on every replica, both times."""
    order = layouts.order
    lines = [*lines, *(line for line in (order, layouts.modes) if line is not None)]
    if order is not None and explained_by_order(found):
        groups = split_into_groups([repr(name).encode() for name in order.data["names"]])
        summary = "replicas hold the same values under the same names, in different orders"
        own = Verdict(False, "order-differs", f"{summary}; groups {groups}", stage=order.data["stage"], groups=groups)
        verdict = found or own.with_(suspects=suspects_of(groups))
        return verdict.with_(cause="order-differs", remedy=[], evidence=[*verdict.evidence, *lines])
    if found is not None:
        return _unexplained(found, channel, "", [*lines, Evidence.of("step-agrees")])
    replicas = f"{channel.size} replica{'s' * (channel.size > 1)}"
    summary = f"{replicas}: from one state, the step gives bit-identical results on each, both times"
    return Verdict(True, "none", summary, groups=[list(range(channel.size))], evidence=lines)


def _find_varying(decision: Decision, witnesses: Sequence[Witness]) -> Decision:
    """Find an operator that varies on one replica without a difference in the step's stages."""
    place = decision.operator
    if place is None or not place.made_here or Kind.OPERATOR_VARIES in decision.kinds:
        return decision
    own = [row.against_itself for row in witnesses]
    varying = [r for r, each in enumerate(own) if each is not None and each.made_here and each.index == place.index]
    if not varying:
        return decision
    line = Evidence.of("operator-varies-on", replicas=varying)
    return with_findings(decision, Finding(Kind.OPERATOR_VARIES, [line], varying), suspects=varying)


def _find_differences(
    decision: Decision, stage: str | None, found: Verdict | None, differing: Sequence[Difference]
) -> Decision:
    """Find undeclared differences between the replicas, and whether the place explains `found`."""
    undeclared = [difference for difference in differing if not difference.allowed]
    others = [difference for difference in undeclared if not difference.field.startswith("numerics.")]
    if Kind.OPERATOR_MADE_IT in decision.kinds and others:
        dividing = any(divides_as([repr(value) for value in d.values], decision.groups or []) for d in others)
        decision = with_findings(decision, Finding(Kind.ENVIRONMENT_DIVIDES if dividing else Kind.DIFFERS_TOO))
    if found is not None and found.stage in STAGES:
        record = None if decision.operator is None else decision.operator.record
        later = stage is not None and STAGES.index(stage) > STAGES.index(found.stage)
        if later or (record is not None and not could_have_made(record, found.stage)):
            line = Evidence.of("stage-not-explained", stage=found.stage)
            decision = with_findings(decision, Finding(Kind.NOT_EXPLAINED, [line]))
    named = {line.data.get("field") for line in decision.evidence}
    lines = [field_evidence("undeclared-difference", row) for row in undeclared if row.field not in named]
    return with_lines(decision, *lines)


def _environment(subject: Subject, world: World) -> tuple[RunFacts, list[Difference]]:
    """Gather what each replica runs on, and the manifest fields that differ. Collective."""
    tensor = next(subject.model.parameters(), torch.empty(0))
    own = attempt(world.channel, lambda: collect_manifest(world, Device(tensor.device), None, ""))
    manifests = gather_manifests(own, world.channel)
    differing = compare_manifests(manifests, {})
    allowed = [difference for difference in differing if difference.allowed]
    return RunFacts(world.num_replicas, differences=allowed, manifests=manifests), differing


def _diverged(found: Verdict | None, how: str, rows: Sequence[Mapping[str, Stage]]) -> Verdict:
    place = first_difference([0] * len(rows), rows)
    where = ", ".join(part for part in (place.stage, place.tensor) if part)
    summary = f"{how}: {where}; groups {place.groups}"
    verdict = describe(place, None, len(rows)).with_(summary=summary, step=None, remedy=[])
    return verdict if found is None else verdict.with_(step=found.step, epoch=found.epoch)


def _unexplained(found: Verdict | None, channel: Channel, summary: str, lines: list[Evidence]) -> Verdict:
    if found is not None:
        kept = [remedy for remedy in found.remedy if remedy.code != "diagnose-step"]
        return found.with_(cause="unexplained", remedy=kept, evidence=[*found.evidence, *lines])
    return Verdict(False, "unexplained", summary, groups=[list(range(channel.size))], evidence=lines)


def _failed(found: Verdict | None, channel: Channel, error: AttemptFailed) -> Verdict:
    line = Evidence.of("replay-failed", error=error)
    return _unexplained(found, channel, "the step could not be replayed", [line])


def _conclude(verdict: Verdict, facts: RunFacts) -> Verdict:
    if verdict.agreed:
        return verdict
    concluded = conclude(verdict, facts)
    return concluded.with_(remedy=as_code(concluded.remedy))
