"""Search for flipped bits in an activation that account for a step, proved by a replay in which they are flipped.

A wrong element of an activation spreads over the rest of the step. To first order, it moves the logits in the direction
of their derivative by this element. The element whose direction matches the original logits is found by a few
vector-Jacobian products, the bit by the distance. A replay with this bit flipped must then give every result of the
original step. Several bits of one activation are found one after the other.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.memory_corruption import FEW_BITS
from dreplica.diagnosis.replay.replay_run import Replayer
from dreplica.state.stages import Stage, plain_name

log = logging.getLogger(__name__)

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUM_PRODUCTS = 6
"""Vector-Jacobian products for each step of the search."""
_MOST_CANDIDATES = 24
"""Candidates that are tried in each step of the search, with a replay each."""
_MOST_SECONDS = 60.0
"""Time after which the search ends without a result."""
_MOST_ELEMENTS = 2**26
"""Elements of all activations above which nothing is searched: the search takes 16 bytes for each."""
_TOLERANCE = 0.02
"""Relative error of the distance, which is linear only to first order."""
_IMPROVES = 0.1
"""Factor by which a flip must reduce the difference of the logits it was found by."""


@dataclass(frozen=True)
class Flip:
    """One flipped bit of the output of a module."""

    module: str
    """Path of the module."""
    call: int
    """Number of the call of the module in the step, from 0."""
    element: int
    """Position in the output, in row-major order."""
    bit: int
    """The bit, from 0 for the lowest."""


def find_activation_flip(
    replayer: Replayer, indices: Tensor, original: Mapping[str, Stage], logits: Tensor
) -> list[Flip]:
    """Search for at most 8 bits of one activation that turn the replay into the original step.

    Args:
        replayer: Has approached the step.
        indices: Sample indices of the step, shape (batch,), int64.
        original: Stages of the original step, as compared.
        logits: The model's output in the original step, shape (batch, num_classes).

    Returns:
        The bits, with which a replay gives all digests of the original step. Empty if none are found.
    """
    try:
        return _search(replayer, indices, original, logits)
    except RuntimeError as error:  # autograd cannot differentiate this step, or not twice
        log.info("no search for a flipped activation: %s", error)
        return []


def _search(replayer: Replayer, indices: Tensor, original: Mapping[str, Stage], logits: Tensor) -> list[Flip]:
    flips: list[Flip] = []
    started = time.monotonic()
    while len(flips) < FEW_BITS:
        probe = _Probe(flips, logits, scores=True)
        replayer.untraced(indices, within=probe.attach)
        nearest, distance = None, _IMPROVES * probe.distance
        for flip in probe.candidates[:_MOST_CANDIDATES]:
            if time.monotonic() - started > _MOST_SECONDS:
                return []
            if flips and (flip.module, flip.call) != (flips[0].module, flips[0].call):
                continue
            trial = _Probe([*flips, flip], logits, row=probe.row)
            stages, _ = replayer.untraced(indices, within=trial.attach)
            if all(stages[name].digest == stage.digest for name, stage in original.items() if name in stages):
                return [*flips, flip]
            if trial.distance <= distance:
                nearest, distance = flip, trial.distance
        if nearest is None:
            return []
        flips = [*flips, nearest]
    return []


def flipped_activation(flips: Sequence[Flip], replica_id: int) -> Finding:
    """Return the finding that bits of one activation flipped.

    Args:
        flips: The bits, at least one.
        replica_id: The replica.
    """
    places = [f"bit {flip.bit} of element {flip.element}" for flip in flips]
    line = Evidence.of("original-activation-flipped", replica=replica_id, module=flips[0].module, places=places)
    return Finding(Kind.FEW_BITS, [line], [replica_id])


class _Probe:
    """Hooks on a model that flip bits of activations, and compare the logits with others.

    Args:
        flips: The bits to flip.
        target: The logits to compare with.
        row: The row of the logits to compare. None for the one that differs most.
        scores: True to search for the element that explains the difference.

    Attributes:
        row: The row that was compared.
        distance: Sum of the absolute differences in this row.
        candidates: Bits whose flip may explain the difference in this row, the likelier first.
    """

    def __init__(self, flips: Sequence[Flip], target: Tensor, row: int | None = None, scores: bool = False) -> None:
        self._flips, self._target, self._scores = flips, target, scores
        self._outputs: dict[tuple[str, int], Tensor] = {}
        self._calls: dict[str, int] = {}
        self.row, self.distance = row, float("inf")
        self.candidates: list[Flip] = []

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        """Register the hooks, and remove them at the end of the block."""
        leaves = [(plain_name(name), each) for name, each in model.named_modules() if not list(each.children())]
        handles = [each.register_forward_hook(self._hook(name)) for name, each in leaves]
        handles.append(model.register_forward_hook(self._compare))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._outputs.clear()

    def _hook(self, name: str) -> Any:
        """Make the hook of one module, which flips its bits and keeps its output for the scores."""

        def visit(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point() or output.element_size() == 1:
                return
            call = self._calls[name] = self._calls.get(name, -1) + 1
            for flip in self._flips:
                if (flip.module, flip.call) == (name, call):
                    _flip(output, flip)
            if self._scores and output.requires_grad:
                self._outputs[name, call] = output

        return visit

    def _compare(self, _module: nn.Module, _inputs: Any, logits: Tensor) -> None:
        if logits.shape != self._target.shape:
            return  # a part of the batch
        difference = self._target.double() - logits.detach().double()
        rows = difference.abs().flatten(1).sum(1)
        if self.row is None:
            self.row = int(torch.where(rows.isfinite(), rows, -1.0).argmax())
        self.distance = float(rows[self.row])
        if self._scores and torch.isfinite(rows[self.row]) and self.distance > 0:
            self._score(logits, difference[self.row])

    def _score(self, logits: Tensor, difference: Tensor) -> None:
        """Score every element of every activation by how much of the difference its direction explains."""
        generator = torch.Generator().manual_seed(0)  # the global one belongs to the step
        keys, outputs = [*self._outputs], [*self._outputs.values()]
        if not outputs or sum(tensor.numel() for tensor in outputs) > _MOST_ELEMENTS:
            return
        products = [torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device) for tensor in outputs]
        squares = [torch.zeros_like(tensor) for tensor in products]
        total = 0.0
        for _ in range(_NUM_PRODUCTS):
            vector = torch.randn(difference.shape, dtype=torch.float64, generator=generator).to(difference.device)
            wanted = float((vector * difference).sum())
            total += wanted**2
            scalar = (logits[self.row].double() * vector).sum()
            gradients = torch.autograd.grad(scalar, outputs, retain_graph=True, allow_unused=True)
            for number, gradient in enumerate(gradients):
                if gradient is not None:
                    products[number] += gradient.double() * wanted
                    squares[number] += gradient.double() ** 2
        found: list[tuple[float, float, Flip]] = []
        for (name, call), tensor, product, square in zip(keys, outputs, products, squares, strict=True):
            explained = torch.where(square > 0, product**2 / square, 0.0).flatten() / total
            best = torch.topk(explained, min(4, explained.numel()))
            for score, element in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                distance = float(product.flatten()[element] / square.flatten()[element])
                bits = _bits_at_distance(tensor.detach().flatten()[element], distance)
                found += [(round(-score, 4), error, Flip(name, call, element, bit)) for bit, error in bits.items()]
        self.candidates = [flip for *_, flip in sorted(found, key=itemgetter(0, 1))]


def _bits_at_distance(value: Tensor, distance: float) -> dict[int, float]:
    """Find the bits whose flip changes a number, or its positive part, by about a distance.

    A rectifier behind the number passes only its positive part on.

    Returns:
        Bit to the relative error of the distance.
    """
    bits, before = {}, float(value)
    for bit in range(8 * value.element_size()):
        flipped = value.clone().reshape(1)
        _flip(flipped, Flip("", 0, 0, bit))
        after = float(flipped)
        errors = abs(after - before - distance), abs(max(after, 0.0) - max(before, 0.0) - distance)
        if min(errors) <= _TOLERANCE * abs(distance):
            bits[bit] = min(errors) / abs(distance)
    return bits


def _flip(tensor: Tensor, flip: Flip) -> None:
    with _disable_current_modes(), torch.no_grad():
        words = tensor.data.view(_INTEGERS[tensor.element_size()])
        width = 8 * tensor.element_size()
        index = torch.unravel_index(torch.tensor(flip.element), words.shape)
        # The sign bit cannot be written as a positive number of a signed dtype.
        words[index] = words[index] ^ (-(1 << flip.bit) if flip.bit == width - 1 else 1 << flip.bit)
