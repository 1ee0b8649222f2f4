"""Traces written for a test, through the same `TraceWriter` that a run writes with."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from dreplica.agreement.trace.reader import TENSORS_NAME, TRACE_NAME
from dreplica.agreement.trace.tensor_digests import TensorRecord
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.state.stages import Stage, tensors_stage

Change = tuple[int, str, str]
"""A step, a stage and a tensor that has another value there."""


def stages_of(
    step: int, changes: Iterable[Change] = (), names: Iterable[str] = ("batch", "weights")
) -> dict[str, Stage]:
    """Two tensors in each stage, whose values are the step's unless changed."""
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
) -> Path:
    """A run folder with a trace, or with more of it; returns the folder."""
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        beside = TensorRecord(folder / TENSORS_NAME) if tensors else None
        trace = stack.enter_context(TraceWriter(folder / TRACE_NAME, num_replicas, num_lines, beside))
        for step in steps:
            epoch = (epochs or {}).get(step)
            trace.step(step, epoch, agreed, stages_of(step, changes, names))
            if step in evaluated:
                trace.step(step, epoch, agreed, stages_of(step, changes, ["predictions"]))
    return folder
