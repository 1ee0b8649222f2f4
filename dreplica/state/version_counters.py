"""Version counters of a replica's tensors, which every operator that writes to a tensor in place increases."""

import weakref
from collections.abc import Mapping

from torch import Tensor

from dreplica.state.replica import Parts
from dreplica.state.walk import StateWalk


class GradientCounters:
    """The version counters of gradients at one time.

    Most gradients are freed when a step begins, and others may take their place in memory. So they are held by weak
    references.

    Args:
        parameters: The parameters by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters
        grads = ((name, parameter.grad) for name, parameter in parameters.items())
        self._kept = {name: (weakref.ref(grad), grad._version) for name, grad in grads if grad is not None}

    def steps(self) -> dict[str, int]:
        """Return the steps of each counter since then, those of a newer gradient since it was made."""
        found = {}
        for name, parameter in self._parameters.items():
            grad = parameter.grad
            if grad is not None:
                kept, before = self._kept.get(name, (None, 0))
                is_same = kept is not None and kept() is grad
                found[f"gradients.{name}"] = grad._version - before * is_same
        return found


class VersionCounters:
    """The version counters of parameters, buffers, optimizer state and gradients at one time.

    Args:
        parts: The replica's state.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._versions = _versions_of(parts)
        self._gradients = GradientCounters(StateWalk(parts).parameters())

    def steps(self) -> dict[str, int]:
        """Return the steps of each counter since then, by name: `model.0.bias`, `gradients.model.0.bias`."""
        after = _versions_of(self._parts)
        held = {name: after[name] - count for name, count in self._versions.items() if name in after}
        return {**held, **self._gradients.steps()}


def _versions_of(parts: Parts) -> dict[str, int]:
    tensors = StateWalk(parts).tensors()
    return {name: tensor._version for name, tensor in tensors.items() if not tensor.is_inference()}
