"""Provenance: the origin of every tensor that a step read or left behind.

What an operator reads must be what the step began with or what an earlier operator wrote. On a replica where it is not,
memory was changed behind the operators' backs: that replica is at fault, even where there is no majority to say so.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dreplica.data.loading.loader import Batch
from dreplica.diagnosis.tracing.op_tracer import OpRecord
from dreplica.state.fingerprint.fingerprint import digest_tensor
from dreplica.state.replica import Parts
from dreplica.state.stages import named_buffers, named_weights, parameter_names

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Contents:
    """Digests of tensors' contents alone, as operator records have them."""

    before: frozenset[bytes]
    """Digests of everything the step began with: parameters, buffers, optimizer state, batch."""
    after: Mapping[str, Mapping[str, bytes]]
    """Digests of what the step left behind: stage (weights, buffers, gradients, optimizer) to name to digest."""


def contents_before(replica: Parts, batch: Batch) -> frozenset[bytes]:
    """Compute the digests of everything that a step on `batch` begins with."""
    stages = contents_after(replica)
    held = {digest for name, stage in stages.items() if name != "gradients" for digest in stage.values()}
    criterion = [*replica.criterion.parameters(), *replica.criterion.buffers()]
    return frozenset(held | set(_digests([batch.inputs, batch.labels, *criterion])))


def contents_after(replica: Parts) -> dict[str, dict[str, bytes]]:
    """Compute the digests of the replica's state, by stage and name."""
    weights = named_weights(replica.model)
    return {
        "weights": {name: digest_tensor("", tensor) for name, tensor in weights.items()},
        "buffers": {name: digest_tensor("", tensor) for name, tensor in named_buffers(replica.model).items()},
        "gradients": {
            name: digest_tensor("", tensor.grad) for name, tensor in weights.items() if tensor.grad is not None
        },
        "optimizer": {name: digest_tensor("", tensor) for name, tensor in optimizer_tensors(replica).items()},
    }


def state_tensors(replica: Parts) -> list[Tensor]:
    """Return the tensors that a step of the replica begins with, except its batch."""
    model = [*named_weights(replica.model).values(), *named_buffers(replica.model).values()]
    gradients = [tensor.grad for tensor in model if tensor.grad is not None]
    criterion = [*replica.criterion.parameters(), *replica.criterion.buffers()]
    return [*model, *gradients, *criterion, *optimizer_tensors(replica).values()]


def optimizer_tensors(replica: Parts) -> dict[str, Tensor]:
    """Return the tensors of the stage `optimizer` by name: state, and parameters that are not the model's."""
    own = {id(parameter) for parameter in replica.model.parameters()}
    tensors: dict[str, Tensor] = {}
    for own_name, optimizer in replica.optimizers.items():
        names = parameter_names(replica.model, optimizer, own_name)
        tensors |= {name: parameter for parameter, name in names.items() if id(parameter) not in own}
        for parameter, state in optimizer.state.items():
            tensors |= {
                f"{names.get(parameter, '')}.{key}": value for key, value in state.items() if isinstance(value, Tensor)
            }
    return tensors


def reads_unaccounted(records: Sequence[OpRecord], contents: Contents, index: int) -> list[int]:
    """Find inputs of an operator that are neither contents the step began with nor an earlier result.

    Args:
        records: The operators of the step.
        contents: Digests of the tensors that the step began and ended with.
        index: Position of the operator.

    Returns:
        Positions among the operator's tensor arguments.
    """
    known = _known(records[:index], contents)
    return [number for number, digest in enumerate(_split(records[index].inputs)) if digest not in known]


def left_unaccounted(records: Sequence[OpRecord], contents: Contents, stage: str) -> list[str]:
    """Find tensors that a step left with contents that no operator wrote.

    Args:
        records: The operators of the step.
        contents: Digests of the tensors that the step began and ended with.
        stage: The stage to look at.

    Returns:
        Names of the tensors.
    """
    known = _known(records, contents)
    return [name for name, digest in contents.after.get(stage, {}).items() if digest not in known]


def last_writer(records: Sequence[OpRecord], index: int, changed: bytes) -> int | None:
    """Find the operator that wrote the contents that another operator reads.

    Args:
        records: The operators of the step.
        index: Position of the reading operator.
        changed: Another record of its inputs; the first input that differs counts.

    Returns:
        Position of the writing operator, or None if the contents were not written in this step.
    """
    for sound, other in zip(_split(records[index].inputs), _split(changed), strict=False):
        if sound != other:
            return _trace_back(records[:index], sound)
    return None


def _trace_back(records: Sequence[OpRecord], contents: bytes) -> int | None:
    """Find the last operator that wrote the contents, or contents of which a view shows them."""
    for number in reversed(range(len(records))):
        if records[number].shows:
            viewed, *shown = _split(records[number].shows)
            contents = viewed if contents in shown else contents
        elif contents in _split(records[number].outputs):
            return number
    return None


def differing_inputs(records: Sequence[Sequence[OpRecord]], index: int) -> set[int]:
    """Return the positions of an operator's tensor arguments that differ between the replicas' records."""
    columns = zip(*(_split(row[index].inputs) for row in records if index < len(row)), strict=False)
    return {position for position, column in enumerate(columns) if len(set(column)) > 1}


def _known(records: Iterable[OpRecord], contents: Contents) -> set[bytes]:
    known = set(contents.before)
    for record in records:
        if record.shows:
            viewed, *shown = _split(record.shows)
            known.update(shown if viewed in known else ())
        else:
            known.update(_split(record.outputs))
    return known


def _split(digests: bytes) -> list[bytes]:
    return [digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)]


def _digests(tensors: Iterable[Tensor]) -> list[bytes]:
    return [digest_tensor("", tensor) for tensor in tensors]
