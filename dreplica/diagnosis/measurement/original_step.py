"""Comparison of the original step with its replay on one replica: traces of code, and the exact change.

A change is proved to be whole by intervention: the replay is repeated with exactly this change, and must then give
every digest of the original step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.data.loading.loader import Batch
from dreplica.diagnosis.evidence.aftermath import Aftermath, Change, compare_tensors
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.original_step import (
    find_counters,
    find_generator_size,
    find_overwritten,
    find_size,
    find_skipped_step,
    find_traces,
    reads_values,
)
from dreplica.diagnosis.evidence.tensor_diff import Difference
from dreplica.diagnosis.measurement.activation_flip import find_activation_flip, flipped_activation
from dreplica.diagnosis.replay.replay_run import Replayer
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.state.fingerprint.changed_word import recover_tensor
from dreplica.state.stages import STAGES, Stage

_SPREAD_OVER = {"output", "gradients", "buffers"}
"""Stages over which a forward or backward pass spreads a single wrong value."""


def examine_original(
    replayer: Replayer,
    indices: Tensor,
    original: Mapping[str, Stage],
    records: Sequence[OpRecord],
    stage: str | None,
    replica_id: int,
) -> list[Finding]:
    """Compare the original step of this replica with a replay of it.

    Args:
        replayer: Has approached the step.
        indices: Sample indices of the step, shape (batch,), int64.
        original: Stages of the original step, as compared.
        records: Operators of a traced replay.
        stage: The first stage in which the replicas had diverged.
        replica_id: This replica.

    Returns:
        The findings. Empty if this replica's original step differs from its replay in another stage first. Traces of
        code are also returned where the original step is reproduced: what replicas have in common does not divide them.
    """
    happened = replayer.original()
    stages, replayed = replayer.untraced(indices)
    differing = _differing(original, stages)
    if not differing:
        return find_traces(happened, replayed, replica_id)
    if differing[0] != stage:
        return []
    happened = _recover(happened, replayed, original[stage], stages[stage], stage)
    proof, base = _reproduce(replayer, indices, original, happened, replayed, differing)
    findings = find_traces(happened, base, replica_id)
    if proof is None and differing[0] in STAGES[: STAGES.index("optimizer")] and reads_values(records):
        findings = []  # a wrong value may have taken the step's code down another path
    if proof is None and not replayer.follows_comparison:  # the step may have begun with another state
        line = Evidence.of("original-began-unknown", replica=replica_id)
        return [*findings, Finding(Kind.SPREAD, [line], [replica_id])]
    if differing == ["rng"]:
        drawn = any(finding.kind is Kind.DRAWN_FURTHER for finding in findings)
        return findings if drawn else findings + find_generator_size(happened, replayed, replica_id)
    findings += find_counters(happened, base, replica_id)
    if not _may_skip(replayer, happened, base):
        findings += find_skipped_step(happened, base, replayer.before(), replica_id)
        findings += _find_overwritten(replayer, happened, replayed, differing, proof, replica_id)
    spreads = stage in _SPREAD_OVER or _optimizer_spreads(replayer, replayed, stage)
    change = _change(stage, original, stages, happened, replayed)
    if stage == "output" and proof is not None:  # the loss follows from the logits
        change = replace(change, names=[name for name in change.names if name != "loss"])
    sizes = find_size(change, spreads, proof, replica_id)
    if not findings and [each.kind for each in sizes] == [Kind.SPREAD] and "output" in happened.tensors:
        flips = find_activation_flip(replayer, indices, original, happened.tensors["output"]["logits"])
        sizes = [flipped_activation(flips, replica_id)] if flips else sizes
    findings += sizes
    replayer.untraced(indices)  # leaves the replica as a replay does
    return findings


def _recover(happened: Aftermath, replayed: Aftermath, there: Stage, here: Stage, stage: str) -> Aftermath:
    """Add the overwritten tensors of a stage whose digests show the one word that differed."""
    if stage in happened.tensors or stage not in replayed.tensors or there.names != here.names:
        return happened
    own, digests, others = replayed.tensors[stage], here.entries(), there.entries()
    differing = [name for name, digest in digests.items() if digest != others[name]]
    if len(differing) != 1 or differing[0] not in own:
        return happened
    (name,) = differing
    tensor = recover_tensor(own[name], digests[name], others[name])
    if tensor is None:
        return happened
    return replace(happened, tensors={**happened.tensors, stage: {**own, name: tensor}})


def _change(
    stage: str, original: Mapping[str, Stage], again: Mapping[str, Stage], happened: Aftermath, replayed: Aftermath
) -> Change:
    there, here = original[stage].entries(), again[stage].entries()
    names = [name for name in dict.fromkeys([*there, *here]) if there.get(name) != here.get(name)]
    differences = compare_tensors(happened.tensors.get(stage, {}), replayed.tensors.get(stage, {}))
    return Change(stage, names, len(here), {name: each for name, each in differences.items() if name in names})


def _reproduce(
    replayer: Replayer,
    indices: Tensor,
    original: Mapping[str, Stage],
    happened: Aftermath,
    replayed: Aftermath,
    differing: Sequence[str],
) -> tuple[str | None, Aftermath]:
    """Repeat the replay with the change in the first stage that differs.

    Returns:
        Why the change is the whole difference, and the replay to compare with. None and the plain replay if it is not.
    """
    first, rest = differing[0], differing[1:]
    if not rest and first not in ("indices", "batch", "output"):
        return "everything else agrees", replayed
    if first not in happened.tensors:
        return None, replayed
    changed = happened.tensors[first]
    if first == "gradients" and set(rest) <= {"optimizer", "weights"}:
        replayer.optimize(changed)
        if {"optimizer", "weights"} & set(_differing(original, replayer.digests())):
            return None, replayed
        return "the optimizer makes the original step's weights of these gradients", replayed
    if first == "indices":
        stages, again = replayer.untraced(changed["indices"])
    elif first == "batch":
        own = {name: tensor.clone() for name, tensor in changed.items()}
        stages, again = replayer.untraced(indices, batch=Batch(indices, **own))
    elif first == "output" and "logits" in changed:
        stages, again = replayer.untraced(indices, within=partial(_forced_output, changed["logits"]))
    else:
        return None, replayed
    if _differing(original, stages):
        return None, replayed
    return f"a replay with the original step's {first} gives all of its results", again


@contextmanager
def _forced_output(logits: Tensor, model: nn.Module) -> Iterator[None]:
    """Overwrite the model's outputs with the rows of `logits`, unnoticed by autograd."""
    done = 0

    def overwrite(_model: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal done
        output.data.copy_(logits[done : done + len(output)])
        done += len(output)

    handle = model.register_forward_hook(overwrite)
    try:
        yield
    finally:
        handle.remove()


def _find_overwritten(
    replayer: Replayer,
    happened: Aftermath,
    replayed: Aftermath,
    differing: Sequence[str],
    proof: str | None,
    replica_id: int,
) -> list[Finding]:
    """Run only the optimizer, with the original step's gradients."""
    if proof is not None or "weights" not in differing or not {"weights", "gradients"} <= happened.tensors.keys():
        return []
    if _optimizer_spreads(replayer, replayed, "weights"):
        return []
    return find_overwritten(happened, replayer.optimize(happened.tensors["gradients"]), replica_id)


def _optimizer_spreads(replayer: Replayer, replayed: Aftermath, stage: str) -> bool:
    """Return True if one wrong weight may change others in the optimizer's step, or if the step cannot be repeated."""
    if stage not in ("optimizer", "weights"):
        return False
    gradients = replayed.tensors["gradients"]
    control = replayer.optimize(gradients)
    if any(_compare(control, replayed, name) for name in ("optimizer", "weights")):
        return True
    weights = replayed.tensors["weights"]
    name = next((name for name, weight in weights.items() if name in gradients and weight.numel()), None)
    if name is None:
        return True
    changed = _compare(control, replayer.optimize(gradients, changed=name), "weights")
    return sum(each.num_differing for each in changed.values() if isinstance(each, Difference)) > 1


def _compare(one: Aftermath, other: Aftermath, stage: str) -> dict[str, Difference | str]:
    return compare_tensors(one.tensors[stage], other.tensors[stage])


def _may_skip(replayer: Replayer, *sides: Aftermath) -> bool:
    """Return True if a scaler may have skipped the optimizer's step, since a gradient is not finite."""
    gradients = [each for side in sides for each in side.tensors.get("gradients", {}).values()]
    return replayer.scaler is not None and not all(bool(torch.isfinite(each).all()) for each in gradients)


def _differing(one: Mapping[str, Stage], other: Mapping[str, Stage]) -> list[str]:
    common = [stage for stage in STAGES if stage in one and stage in other]
    return [stage for stage in common if one[stage].digest != other[stage].digest]
