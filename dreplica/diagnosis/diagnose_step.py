"""`dreplica.diagnose`: the cause of a divergence in a custom training loop."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from dreplica.agreement.agreement import Agreement, Batch
from dreplica.agreement.kept_state import Original
from dreplica.agreement.subject import Models, Subject
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.decision.decide import decide
from dreplica.diagnosis.decision.decide_layout import find_layout, structure_verdict
from dreplica.diagnosis.decision.equal_values import describe_values, find_equal_values, what_of
from dreplica.diagnosis.decision.facts import RunFacts
from dreplica.diagnosis.decision.loop_verdicts import all_agree, diverged, failed, finish, kept_remedies, unexplained
from dreplica.diagnosis.decision.overrides import divides_as
from dreplica.diagnosis.decision.rules import may_be_hardware, name_in
from dreplica.diagnosis.diagnose_run import as_verdict, close_replayer, field_evidence, find_settings
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import (
    Decision,
    Witness,
    could_have_made,
    difference_behind,
    with_findings,
    with_lines,
)
from dreplica.diagnosis.evidence.observation import first_difference as first_operator
from dreplica.diagnosis.evidence.place import findings_of_replays
from dreplica.diagnosis.measurement.full_tensors import compare_outputs
from dreplica.diagnosis.replay.own_runs import groups_of, run_with_own
from dreplica.diagnosis.replay.replay_run import Replayed
from dreplica.diagnosis.replay.replay_step import NO_INDICES, Repeated
from dreplica.diagnosis.replay.reproduction import original_digests
from dreplica.diagnosis.replay.start import begin
from dreplica.diagnosis.replay.state_layout import gather_layouts
from dreplica.distributed.attempt import AttemptFailed, attempt
from dreplica.distributed.channel import Channel
from dreplica.distributed.control import channel_of_body
from dreplica.distributed.failure import describe_exception
from dreplica.distributed.process_group import World
from dreplica.environment.device import Device
from dreplica.environment.manifest import Difference, collect_manifest, compare_manifests, gather_manifests
from dreplica.errors import UsageError
from dreplica.state.stages import STAGES, Optimizers


def diagnose(
    step: Callable[[Any], Any],
    batch: Batch,
    model: Models,
    optimizer: Optimizers = None,
    *,
    others: Sequence[Any] = (),
    found: Verdict | None = None,
    agreement: Agreement | None = None,
    channel: Channel | None = None,
) -> Verdict:
    """Replay a training step on every replica, and find the cause of a divergence in it.

    ```python
    agreement.keep_state()
    loss = training_step(batch)
    try:
        agreement.step(batch=batch, loss=loss)
    except dreplica.Divergence:
        verdict = dreplica.diagnose(training_step, batch, model, optimizer, agreement=agreement)
        print(verdict)
    ```

    With an `agreement` that has kept the state (`Agreement.keep_state`), each replica replays the step from the state
    that it had, and the replays are compared with the original step. Otherwise all replicas get the present tensors of
    the first replica of the largest group, if they differ. In both cases each replica keeps its own generators,
    settings of optimizers and schedulers, modes and plain attributes. What differs of these is then made equal, one by
    one, to see whether the divergence is gone.

    Afterwards model, optimizer, `others` and the global generators are restored byte for byte. Anything else that the
    step changes (its own counter, a file) stays changed. The verdict's step and epoch are those of the divergence.

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
        found: The verdict of the `Divergence` to explain. By default, that of `agreement`.
        agreement: The `Agreement` that has found the divergence.
        channel: Internal, may change without notice: the control channel. By default, a new gloo group of all ranks.

    Returns:
        The verdict. Its cause is `none` if every replica gets the same result both times and there is no `found`, and
        `unexplained` if `found` cannot be reproduced or the observations do not explain it.

    Raises:
        UsageError: If an argument cannot be used, such as a model that is sharded or in DistributedDataParallel. It
            is raised on all ranks, also if the arguments of one rank are wrong.
        ReplicaLost: If another replica ended, failed or stopped responding.
    """
    if channel is None:
        with channel_of_body() as own:
            given = {"others": others, "found": found, "agreement": agreement, "channel": own}
            return diagnose(step, batch, model, optimizer, **given)  # type: ignore[arg-type]
    world = World(channel.rank, channel.size, channel, None, socket.gethostname())
    original = None if agreement is None else agreement.original
    if found is None and original is not None:
        found = original.found
    subject = world.together(lambda: _subject(model, optimizer, others, original))
    facts = RunFacts(channel.size)
    try:
        facts, differing = _environment(subject, world)
        repeated = attempt(channel, lambda: Repeated(step, batch, subject))
    except AttemptFailed as error:
        return finish(failed(found, channel, error), facts)
    try:
        verdict = _diagnose(repeated, found, original, channel, differing)
    except AttemptFailed as error:
        verdict = failed(found, channel, error)
    except BaseException:  # Ctrl-C, or a lost replica: the replicas cannot agree on anything any more.
        repeated.close()
        raise
    return finish(close_replayer(verdict, repeated, channel), facts)


def _subject(model: Models, optimizer: Optimizers, others: Sequence[Any], original: Original | None) -> Subject:
    try:
        if original is not None:
            optimizer, others = optimizer or original.subject.optimizers, others or original.subject.others
        subject = Subject(model, optimizer, others)
        is_other = original is not None and _objects(subject) != _objects(original.subject)
    except UsageError:
        raise
    except Exception as error:  # the other replicas would wait for this one
        text = f"model, optimizer or others cannot be read: {describe_exception(error)}"
        raise UsageError(text, code="unreadable-state") from error
    if any(hasattr(parameter, "placements") for parameter in subject.model.parameters()):
        raise UsageError(
            "model is sharded, so its step communicates, and one rank cannot replay it alone. Build the model without "
            "sharding, and pass it with a step that calls it, and the same batch on all ranks.",
            code="sharded-model",
        )
    if subject.is_ddp:
        raise UsageError(
            "model is wrapped in DistributedDataParallel, whose backward pass waits for other ranks. Pass "
            "model.module, a step that calls it, and the same batch on all ranks, which must then get the same result.",
            code="ddp-model",
        )
    if is_other:
        raise UsageError(
            "agreement compares another model, optimizer or others than those passed. Pass the same ones, under the "
            "same names, as to dreplica.Agreement.",
            code="other-subject",
        )
    return subject


def _objects(subject: Subject) -> Any:
    """Return the identities of everything whose state is kept."""
    parameters = {name: id(parameter) for name, parameter in subject.model.named_parameters()}
    return parameters, {name: id(each) for name, each in subject.optimizers.items()}, list(map(id, subject.others))


def _diagnose(
    repeated: Repeated,
    found: Verdict | None,
    original: Original | None,
    channel: Channel,
    differing: Sequence[Difference],
) -> Verdict:
    batches = channel.gather(repeated.batch)
    layouts = gather_layouts(repeated.parts, repeated.given, channel)
    if len(groups_of(batches)) > 1:
        verdict = diverged(found, "replicas were given different batches", batches).with_(cause="batch-differs")
        return verdict if layouts.batch is None else verdict.with_(evidence=[*verdict.evidence, layouts.batch])
    structure = layouts.structure()
    if structure is not None:
        return structure_verdict(structure, found)
    repeated.by_name = layouts.order is not None
    start = begin(repeated, original, found, channel)
    done = run_with_own(repeated, start, found, original, channel)
    runs, stage = done.runs, done.runs.stage
    lines = [*start.lines, *done.equalised]
    if runs.collectives:
        line = Evidence.of("step-communicates", operators=runs.collectives)
        return unexplained(found, channel, "the step could not be diagnosed", [*lines, line])
    if done.without_effect:
        lines += describe_values(done.without_effect)
        lines.append(Evidence.of("equal-values-diverge", what=what_of(done.without_effect)))
    witnesses = channel.gather(replace(_witness(runs.first, runs.second, stage), findings=done.findings))
    originals = original_digests([row.first for row in witnesses], done.reproductions) if done.reproductions else None
    if done.reproductions and originals is None:
        lines.append(Evidence.of("original-not-reproduced"))
    if originals is not None:
        witnesses = [replace(row, original=each) for row, each in zip(witnesses, originals, strict=True)]
    if stage is None and runs.repeats and all(row.original == row.first for row in witnesses):
        return all_agree(found, channel, start, lines, layouts)
    if stage is None:
        summary = "the step does not give the same result twice"
        verdict = unexplained(found, channel, summary, [])
    else:
        how = "from the state that each replica had" if start.kept else "run from one state"
        verdict = diverged(found, f"{how}, the step diverges", runs.rows)
    decision = decide(witnesses, {}, differing)
    decision = find_equal_values(decision, done.needed, witnesses, stage, found, start.is_ddp)
    decision = find_settings(decision, found) if found is not None else decision
    if start.equalised:
        decision = with_findings(decision, Finding(Kind.EQUALISED))
    arbitrates = may_be_hardware(decision)
    decision = compare_outputs(decision, repeated, NO_INDICES, channel, arbitrates=arbitrates, votes=False)
    decision = _find_varying(decision, witnesses)
    decision = _find_differences(decision, stage, None if originals is not None else found, differing)
    decision = name_in(find_layout(decision, witnesses, layouts, stage, found))
    verdict = as_verdict(verdict, replace(decision, evidence=[*lines, *decision.evidence]))
    if decision.cause == "unexplained":
        if found is not None and any(line.code == "draws-by-design" for line in decision.evidence):
            return unexplained(found, channel, found.summary, [*lines, *decision.evidence])
        return verdict.with_(remedy=verdict.remedy or kept_remedies(found))
    if decision.cause != "environment-differs":
        return verdict
    fields = [row.field for row in differing if not row.allowed]
    return verdict.with_(remedy=[Remedy.of("set-field-alike", field=field) for field in fields])


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
        foreign=first.foreign,
        at_itself=findings_of_replays(itself, *records, first.contents.before),
        contents=first.contents,
        indices_intact=True,
        generator=first.generator,
        generator_changed=False,
        sample_digests=[],
        layout=first.layout,
    )


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
