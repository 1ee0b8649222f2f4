"""What is kept of a training step until it is known to agree, so that its replay can be compared with it.

Tensors are kept by reference, and counters are read without touching memory that a step computes with. Of a step that
agrees, nothing is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dreplica.data.loading.loader import Batch
from dreplica.state.replica import Replica
from dreplica.state.walk import StateWalk
from dreplica.training.step import StepOutput


@dataclass(frozen=True)
class Footprint:
    """Counters that a step moved. Code moves them, a fault of memory does not."""

    nodes: int
    """Autograd nodes that the step made in this thread."""
    tensors: Mapping[str, Tensor]
    """The watched tensors, named as by `StateWalk.tensors`."""
    writes: tuple[int, ...]
    """Steps of each watched tensor's version counter, which every in-place operator moves."""

    def writes_to(self, name: str) -> int | None:
        """Return the steps of a watched tensor's version counter, None if the tensor is not watched."""
        return dict(zip(self.tensors, self.writes, strict=True)).get(name)


@dataclass(frozen=True)
class Original:
    """One training step as it ran."""

    batch: Batch | None
    """The batch that the step was given. None where it would take a GPU's memory during the next step."""
    output: StepOutput
    """Loss and logits."""
    generators: Mapping[str, Tensor | bytes | None]
    """State of each global generator after the step, named and packed as in the stage `rng`."""
    footprint: Footprint
    """The counters that the step moved."""


class StepMeter:
    """Reads the counters before and after a step.

    Args:
        replica: The replica whose parameters, buffers and optimizer state are watched.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._tensors: dict[str, Tensor] = {}
        self._num_states = -1
        self._nodes = 0
        self._versions: list[int] = []

    def start(self) -> None:
        """Read the counters before a step."""
        if len(self._replica.optimizer.state) != self._num_states:
            self._list_tensors()
        self._versions = [tensor._version for tensor in self._tensors.values()]
        self._nodes = torch.autograd._get_sequence_nr()

    def stop(self) -> Footprint:
        """Read the counters after the step."""
        nodes = torch.autograd._get_sequence_nr() - self._nodes
        writes = (
            tensor._version - before for tensor, before in zip(self._tensors.values(), self._versions, strict=True)
        )
        return Footprint(nodes, self._tensors, tuple(writes))

    def _list_tensors(self) -> None:
        tensors = StateWalk(self._replica).tensors()
        self._tensors = {name: tensor for name, tensor in tensors.items() if not tensor.is_inference()}
        self._num_states = len(self._replica.optimizer.state)
