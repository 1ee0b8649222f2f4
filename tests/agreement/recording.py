"""Traces for tests, written with the `TraceWriter` that runs use."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from dreplica.agreement.trace.reader import TENSORS_NAME, TRACE_NAME
from dreplica.agreement.trace.tensor_digests import TensorRecord
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.state.fingerprint.fingerprint import ALGORITHM
from dreplica.state.stages import Stage, tensors_stage

Change = tuple[int, str, str]
"""A step, a stage and a tensor that has a different value there."""


def stages_of(
    step: int, changes: Iterable[Change] = (), names: Iterable[str] = ("batch", "weights")
) -> dict[str, Stage]:
    """Return stages of two tensors each, with the step as value unless changed."""
    values = {name: {tensor: float(step) for tensor in ("one", "two")} for name in names}
    for at, stage, tensor in changes:
        if at == step and stage in values:
            values[stage][tensor] += 0.5
    return {
        name: tensors_stage({tensor: torch.tensor(value) for tensor, value in row.items()})
        for name, row in values.items()
    }


def record(
    folder: Path,
    steps: Iterable[int],
    *changes: Change,
    names: Iterable[str] = ("batch", "weights"),
    num_replicas: int = 2,
    num_lines: int = 0,
    agreed: bool = True,
    tensors: bool = False,
    evaluated: Iterable[int] = (),
    epochs: Mapping[int, int] | None = None,
    algorithm: str = ALGORITHM,
) -> Path:
    """Write or extend the trace of a run folder, and return the folder."""
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        tensors_file = TensorRecord(folder / TENSORS_NAME) if tensors else None
        path = folder / TRACE_NAME
        trace = stack.enter_context(TraceWriter(path, num_replicas, num_lines, tensors_file, algorithm))
        for step in steps:
            epoch = (epochs or {}).get(step)
            trace.step(step, epoch, agreed, stages_of(step, changes, names))
            if step in evaluated:
                trace.step(step, epoch, agreed, stages_of(step, changes, ["predictions"]), is_evaluation=True)
    return folder
