"""Warnings about what the ranks of one data-parallel model should not share: batches and dropout."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from dreplica.agreement.hasher import Hasher, Observation
from dreplica.agreement.notices.warning_texts import warning
from dreplica.agreement.subject import Batch
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.distributed.channel import Channel
from dreplica.state.fingerprint.fingerprint import UnhashableError
from dreplica.state.stages import batch_entries, digest_entry

_STEPS = 2
"""Compared steps that are looked at."""

_Facts = Mapping[str, Any]
"""Digests of a step on one rank, as hex, under `batch`, `loss` and `rng`; None where there is none."""


class RankWatch:
    """Watch for batches and random draws that are the same on several ranks, in the first compared steps.

    Args:
        channel: The control channel between all ranks.
        hasher: Hashes the batch.
        model: The model.
    """

    def __init__(self, channel: Channel, hasher: Hasher, model: nn.Module) -> None:
        self._channel, self._hasher, self._model = channel, hasher, model
        self._own: dict[int, tuple[Observation | None, dict[str, Any]]] = {}
        self._rows: dict[int, list[_Facts]] = {}

    def step(self, step: int, batch: Batch | None, loss: Tensor | None) -> None:
        """Hash the batch of a step, without waiting for a device.

        Args:
            step: The step, which will be compared.
            batch: Its batch, or None.
            loss: Its loss, or None.
        """
        if len(self._rows) >= _STEPS:
            self._own.clear()
            return
        observation = None
        if batch is not None:
            try:
                observation = self._hasher.start({"batch": batch_entries(batch)})
            except UnhashableError:  # batches of DDP ranks are not compared, so they may contain anything
                observation = None
        values = None if loss is None or loss.numel() != 1 else loss.detach().clone()
        facts = {"loss": values, "rng": self._generator(), "module": _random_module(self._model)}
        self._own = {number: self._own[number] for number in [*self._own][-1:]}  # with a lag, it is compared now
        self._own[step] = observation, facts

    def compared(self, step: int) -> Iterable[Evidence]:
        """Exchange the digests of a step on which all ranks agree, and return warnings.

        Note:
            Collective in the first two compared steps.

        Args:
            step: The step that was compared.
        """
        if len(self._rows) >= _STEPS or step not in self._own:
            return ()
        observation, facts = self._own[step]
        loss = facts["loss"]
        own = {
            "batch": None if observation is None else observation.stages["batch"].digest.hex(),
            "loss": None if loss is None else _digest_of_loss(loss),
            "rng": facts["rng"],
            "module": facts["module"],
        }
        self._rows[step] = self._channel.gather(own)
        return [*self._report()] if len(self._rows) == _STEPS else ()

    def _generator(self) -> str:
        """Return the digest of the generator that dropout draws from."""
        device = next((tensor.device for tensor in self._model.parameters()), torch.device("cpu"))
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        return digest_entry("rng", state).hex()

    def _report(self) -> Iterator[Evidence]:
        steps = sorted(self._rows)
        rows = [self._rows[step] for step in steps]
        same = _ranks_with_equal(rows, "batch")
        if same:
            yield warning("batches-identical", ranks=same, steps=_listed(steps))
        elif all(row["batch"] is None for facts in rows for row in facts):
            same = _ranks_with_equal(rows, "loss")
            if same:
                yield warning("losses-identical", ranks=same, steps=_listed(steps))
        drawn = _ranks_with_equal(rows, "rng")
        module = rows[-1][drawn[0]]["module"] if drawn else None
        if module is not None and rows[0][drawn[0]]["rng"] != rows[-1][drawn[0]]["rng"]:
            name, kind = module
            yield warning("dropout-identical", ranks=drawn, steps=_listed(steps), module=name, kind=kind)


def _ranks_with_equal(rows: Sequence[Sequence[_Facts]], key: str) -> list[int]:
    """Return the largest group of two or more ranks that have the same value in each step, or an empty list."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank, facts in enumerate(zip(*rows, strict=True)):
        values = tuple(row[key] for row in facts)
        if None not in values:
            groups.setdefault(values, []).append(rank)
    largest = max(groups.values(), key=len, default=[])
    return largest if len(largest) > 1 else []


def _digest_of_loss(loss: Tensor) -> str | None:
    """Return the digest of a loss, or None for one that different batches may share: 0, NaN or infinity."""
    value = loss.double().item()
    return None if value == 0 or value - value != 0 else digest_entry("loss", loss).hex()


def _listed(steps: Sequence[int]) -> str:
    return " and ".join(map(str, steps))


def _random_module(model: nn.Module) -> list[str] | None:
    """Return name and class of the first module that draws random numbers in training, or None."""
    for name, module in model.named_modules():
        if module.training and _draws(module):
            return [name or "the model", type(module).__name__]
    return None


def _draws(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    return isinstance(module, nn.RReLU) or (type(module).__name__ == "DropPath" and bool(vars(module).get("drop_prob")))
