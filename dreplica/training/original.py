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
from dreplica.state.version_counters import GradientCounters
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
    passing: Mapping[str, int]
    """The same of the batch, the outputs and the gradients, which are not kept: `batch.inputs`, `gradients.0.bias`."""


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
        self._parameters: dict[str, Tensor] = {}
        self._num_states = -1
        self._nodes = 0
        self._versions: list[int] = []
        self._gradients = GradientCounters({})
        self._batch: dict[str, int] = {}

    def start(self, batch: Batch) -> None:
        """Read the counters before a step on a batch."""
        if len(self._replica.optimizer.state) != self._num_states:
            self._list_tensors()
        self._versions = [tensor._version for tensor in self._tensors.values()]
        self._gradients = GradientCounters(self._parameters)
        self._batch = {name: tensor._version for name, tensor in batch.tensors().items()}
        self._nodes = torch.autograd._get_sequence_nr()

    def stop(self, batch: Batch, output: StepOutput) -> Footprint:
        """Read the counters after the step."""
        nodes = torch.autograd._get_sequence_nr() - self._nodes
        versions = (tensor._version for tensor in self._tensors.values())
        writes = tuple(after - before for after, before in zip(versions, self._versions, strict=True))
        passing = {f"batch.{name}": tensor._version - self._batch[name] for name, tensor in batch.tensors().items()}
        passing |= {f"output.{name}": tensor._version for name, tensor in output.tensors().items()}
        return Footprint(nodes, self._tensors, writes, passing | self._gradients.steps())

    def _list_tensors(self) -> None:
        walk = StateWalk(self._replica)
        self._tensors = {name: tensor for name, tensor in walk.tensors().items() if not tensor.is_inference()}
        self._parameters = dict(walk.parameters())
        self._num_states = len(self._replica.optimizer.state)
