"""`dreplica.diagnose`: why a step of anyone's own loop does not come to the same on all replicas."""

import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from dreplica.agreement.agreement import Batch
from dreplica.agreement.subject import Models, Subject
from dreplica.agreement.verdict.location import describe, first_difference
from dreplica.agreement.verdict.verdict import Verdict, split_into_classes
from dreplica.diagnosis.decision.conclude import RunFacts, conclude
from dreplica.diagnosis.decision.decide import decide
from dreplica.diagnosis.decision.overrides import divides_as
from dreplica.diagnosis.diagnose_run import as_verdict, put_back
from dreplica.diagnosis.evidence.observation import Decision, Witness, could_have_made, difference_behind, first_stage
from dreplica.diagnosis.evidence.observation import first_difference as first_operator
from dreplica.diagnosis.measurement.full_tensors import add, compare_outputs
from dreplica.diagnosis.replay.replay_run import Replayed
from dreplica.diagnosis.replay.replay_step import NO_INDICES, Repeated
from dreplica.diagnosis.replay.shared_state import differing_shapes, shapes, share_state
from dreplica.distributed.attempt import AttemptFailed, attempt
from dreplica.distributed.channel import Channel, gloo_channel
from dreplica.distributed.process_group import World
from dreplica.environment.device import Device
from dreplica.environment.manifest import Difference, collect_manifest, compare_manifests
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
    """Takes a training step twice on every replica, from one state, and names the first operator at which they part.

    ::

        try:
            agreement.step(batch=batch, loss=loss)
        except dreplica.Divergence as divergence:
            print(dreplica.diagnose(training_step, batch, model, optimizer, found=divergence.verdict))

    A collective: every replica calls it, with the same batch. Where replicas do not hold the same state, that of the
    first one of the largest class is given to all for the time of the diagnosis. Afterwards model, optimizer, `others`
    and the global generators are as they were, byte for byte; what else the step changes (a counter of its own, a file)
    stays changed. The verdict has no step or epoch of its own, only those of `found`.

    Args:
        step: takes one step on the batch it is given: forward, backward, optimizer. What it returns (a loss, outputs)
            is compared, too, so let it return the outputs as well: what rounds to the same loss is then told apart.
            It must not communicate with other processes.
        batch: what it is given: a tensor, or tensors in dicts, lists and tuples. The step gets a copy.
        model: what the step trains; several by name. Not wrapped in DistributedDataParallel; of `torch.compile(model)`
            what that returns, so that the step runs as it is compiled.
        optimizer: what trains it; several by name.
        others: further objects with a `state_dict` that the step changes: scheduler, GradScaler.
        found: the verdict of a `Divergence` that the step is to explain.
        channel: how replicas talk; by default a gloo group of its own.

    Returns the verdict: `none` if every replica comes to the same both times and there is no `found`; `unexplained`
    if it does but there is one, or if what is seen does not account for it.

    Raises ValueError for a model in DistributedDataParallel, and `ReplicaLost` when a replica is gone.
    """
    subject = Subject(model, optimizer, others)
    if subject.is_ddp:
        raise ValueError(
            "model: it is in DistributedDataParallel, whose backward pass waits for other ranks. Give model.module, a "
            "step that calls it, and the same batch on all ranks: they must then come to the same."
        )
    channel = channel or gloo_channel()
    facts, differing = _environment(subject, channel)
    try:
        repeated = attempt(channel, lambda: Repeated(step, batch, subject))
    except AttemptFailed as error:
        return _conclude(_failed(found, channel, error), facts)
    try:
        verdict = _diagnose(repeated, found, channel, differing)
    except AttemptFailed as error:
        verdict = _failed(found, channel, error)
    except BaseException:  # Ctrl-C, or another replica is gone: nobody is left to agree on anything with
        repeated.close()
        raise
    return _conclude(put_back(verdict, repeated, channel), facts)


def _diagnose(repeated: Repeated, found: Verdict | None, channel: Channel, differing: Sequence[Difference]) -> Verdict:
    batches, states, tensors = zip(
        *channel.gather((repeated.batch, repeated.state, shapes(repeated.parts))), strict=True
    )
    if len(_classes(batches)) > 1:
        return _parted(found, "replicas were given different batches", batches)
    if names := differing_shapes(tensors):
        line = f"replicas do not have the same tensors, in the same shapes: first {names[0]}"
        return _parted(found, "replicas are not built alike", states).with_(cause="structure-differs", evidence=[line])
    lines = _begin(repeated, states, channel)
    first, second = attempt(channel, lambda: (repeated.again(), repeated.again()))
    runs = list(zip(*channel.gather((first.stages, second.stages)), strict=True))
    if len(_classes(runs[0])) == 1 < len(_classes(runs[1])):
        first, second, runs = second, first, runs[::-1]
    stage = first_stage([{name: made.digest for name, made in row.items()} for row in runs[0]])
    witnesses = channel.gather(_witness(first, second, stage))
    talks = sorted({r.name for row in witnesses for r in row.records if r.name.startswith(_COLLECTIVES)})
    if talks:
        line = f"the step communicates ({', '.join(talks)}): what one replica does in it depends on the others"
        return _unexplained(found, channel, "the step could not be diagnosed", [*lines, line])
    if stage is None and all(row.first == row.second for row in witnesses):
        return _alike(found, channel, lines)
    if stage is None:
        verdict = _unexplained(found, channel, "the step does not come to the same twice", [])
    else:
        verdict = _parted(found, "taken from one state, the step parts replicas", runs[0])
    decision = decide(witnesses, {}, differing)
    decision = compare_outputs(decision, repeated, NO_INDICES, channel)
    decision = _blame_varying(decision, witnesses)
    decision = _doubt(decision, stage, found, differing)
    verdict = as_verdict(verdict, replace(decision, evidence=[*lines, *decision.evidence]))
    if decision.cause != "environment-differs":
        return verdict
    return verdict.with_(remedy=[f"let all replicas have the same {row.field}" for row in differing if not row.allowed])


def _begin(repeated: Repeated, states: Sequence[Mapping[str, Stage]], channel: Channel) -> list[str]:
    """Has all replicas begin with one state; returns what is to be said of it. A collective."""
    classes = _classes(states)
    lines = []
    if len(classes) > 1:
        source, place = classes[0][0], first_difference([0] * channel.size, states)
        share_state(repeated.parts, source, channel)
        parted = f"{place.stage}, {place.tensor}" if place.tensor else place.stage
        lines.append(f"replicas did not hold the same state ({parted}): all began with replica {source}'s")
    attempt(channel, repeated.begin)
    return lines


def _classes(rows: Sequence[Mapping[str, Stage]]) -> list[list[int]]:
    return split_into_classes([b"".join(stage.digest for stage in row.values()) for row in rows])


def _witness(first: Replayed, second: Replayed, stage: str | None) -> Witness:
    """The first of the two, which parts replicas in `stage`, stands for what happened: there is no other original."""
    records = first.tracer.records, second.tracer.records
    digests, again = ({name: stage.digest for name, stage in row.stages.items()} for row in (first, second))
    return Witness(
        original=digests,
        first=digests,
        second=again,
        records=first.tracer.records,
        against_itself=difference_behind(*records, stage) or first_operator(*records),
        contents=first.contents,
        indices_intact=True,
        generator=first.generator,
        generator_struck=False,
        sample_digests=[],
        layout=first.layout,
    )


def _alike(found: Verdict | None, channel: Channel, lines: list[str]) -> Verdict:
    """The verdict where the step comes to the same everywhere, both times."""
    if found is not None:
        line = "taken twice from one state, the step comes to the same on every replica: the difference is not its own"
        return _unexplained(found, channel, "", [*lines, line])
    replicas = f"{channel.size} replica{'s' * (channel.size > 1)}"
    summary = f"{replicas}: from one state the step comes to the same on each, bit for bit, both times"
    return Verdict(True, "none", summary, classes=[list(range(channel.size))], evidence=lines)


def _blame_varying(decision: Decision, witnesses: Sequence[Witness]) -> Decision:
    """The operator that parts replicas may vary on one by itself, without its showing in what the step returns."""
    place = decision.operator
    if place is None or not place.made_here or decision.cause == "nondeterministic-operator":
        return decision
    own = [row.against_itself for row in witnesses]
    varying = [r for r, each in enumerate(own) if each is not None and each.made_here and each.index == place.index]
    if not varying:
        return decision
    line = f"on replicas {varying} that operator gave other outputs for the same inputs in two runs"
    return add(decision, [line], cause="nondeterministic-operator", suspects=varying)


def _doubt(decision: Decision, stage: str | None, found: Verdict | None, differing: Sequence[Difference]) -> Decision:
    """What else may account for it, and whether it accounts for `found`. `stage`: in which the step parts replicas."""
    undeclared = [difference for difference in differing if not difference.allowed]
    others = [difference for difference in undeclared if not difference.field.startswith("numerics.")]
    if decision.cause == "persistent-fault" and others:
        dividing = [d for d in others if divides_as([repr(value) for value in d.values], decision.classes or [])]
        decision = replace(decision, cause="environment-differs" if dividing else "unexplained")
    if decision.cause == "persistent-fault" and not decision.settled:
        line = "only the vote says who is wrong, and the step may read what lies in memory otherwise on some replicas"
        decision = add(decision, [line], cause="unexplained")
    if found is not None and found.stage in STAGES:
        record = None if decision.operator is None else decision.operator.record
        later = stage is not None and STAGES.index(stage) > STAGES.index(found.stage)
        if later or (record is not None and not could_have_made(record, found.stage)):
            line = f"but replicas had parted in {found.stage}, which this does not account for"
            decision = add(decision, [line], cause="unexplained")
    named = "\n".join(decision.evidence)
    return add(decision, [f"differs: {row}" for row in undeclared if str(row) not in named])


def _environment(subject: Subject, channel: Channel) -> tuple[RunFacts, list[Difference]]:
    """What each replica runs on, and all in which they differ. A collective."""
    tensor = next(subject.model.parameters(), torch.empty(0))
    world = World(channel.rank, channel.size, channel, None, socket.gethostname())
    manifests = channel.gather(collect_manifest(world, Device(tensor.device), None, ""))
    differing = compare_manifests(manifests, {})
    allowed = [difference for difference in differing if difference.allowed]
    return RunFacts(channel.size, differences=allowed, manifests=manifests), differing


def _parted(found: Verdict | None, how: str, rows: Sequence[Mapping[str, Stage]]) -> Verdict:
    place = first_difference([0] * len(rows), rows)
    where = ", ".join(part for part in (place.stage, place.tensor) if part)
    summary = f"{how}: {where}; classes {place.classes}"
    told = describe(place, None, len(rows)).with_(summary=summary, step=None, remedy=[])
    return told if found is None else told.with_(step=found.step, epoch=found.epoch)


def _unexplained(found: Verdict | None, channel: Channel, summary: str, lines: list[str]) -> Verdict:
    if found is not None:
        return found.with_(cause="unexplained", remedy=[], evidence=[*found.evidence, *lines])
    return Verdict(False, "unexplained", summary, classes=[list(range(channel.size))], evidence=lines)


def _failed(found: Verdict | None, channel: Channel, error: AttemptFailed) -> Verdict:
    return _unexplained(found, channel, "the step could not be taken again", [f"it could not be taken again: {error}"])


def _conclude(verdict: Verdict, facts: RunFacts) -> Verdict:
    if verdict.agreed:
        return verdict
    concluded = conclude(verdict, facts)
    return concluded.with_(remedy=as_code(concluded.remedy))


_FLAGS = {
    "mode": "torch.use_deterministic_algorithms(True)",
    "threads": "torch.set_num_threads({})",
    "cudnn_deterministic": "torch.backends.cudnn.deterministic = True",
    "cudnn_benchmark": "torch.backends.cudnn.benchmark = False",
    "tf32": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False",
    "cublas_workspace_config": 'os.environ["CUBLAS_WORKSPACE_CONFIG"] = "{}"  # before anything uses CUDA',
}
_FLAG = re.compile(r"--determinism\.(\w+) (\S+)")


def as_code(remedy: Sequence[str]) -> list[str]:
    """The lines of a verdict's remedy, the trainer's flags as calls of torch's; without those for the trainer alone."""
    lines = []
    for line in remedy:
        if line.startswith("--"):
            calls = [_FLAGS[name].format(value) for name, value in _FLAG.findall(line) if name in _FLAGS]
            remark = line.partition("  #")[2]
            lines += [f"{call}  #{remark}" if remark and "  #" not in call else call for call in calls]
        elif not line.startswith("dreplica "):
            lines.append(line)
    return list(dict.fromkeys(lines))
