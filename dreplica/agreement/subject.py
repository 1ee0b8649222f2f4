"""Whose state is compared: one model or several, bare or wrapped, with what trains them; and what of it must agree."""

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dreplica.config.messages import nearest
from dreplica.state.fingerprint.stage import INDEPENDENT_STAGES
from dreplica.state.stages import (
    STAGES,
    Entry,
    Optimizers,
    batch_entries,
    by_name,
    gradient_entries,
    named_buffers,
    named_weights,
    optimizer_entries,
    rng_entries,
)

Models = nn.Module | Mapping[str, nn.Module]
"""One, or several by name."""

Batch = Tensor | Mapping[str, Any] | Sequence[Any]
"""A tensor, or tensors in dicts, lists and tuples."""

Expect = Literal["identical", "independent", "ddp"]

_WHOLE_DTENSORS = "dreplica.fingerprint({name: p.full_tensor() for name, p in model.named_parameters()})"
_WHOLE_FLAT_PARAMETERS = (
    "with FullyShardedDataParallel.summon_full_params(model): dreplica.fingerprint(dict(model.named_parameters()))"
)

DDP_STAGES = ("gradients", "optimizer", "weights")
"""What the ranks of one data-parallel model share after every step; buffers, too, if no forward pass mends them."""


class Subject:
    """Models and optimizers under the names that a verdict gives to their tensors.

    Raises ValueError for what is none, and for several of them that have no names.

    Attributes:
        model: without DistributedDataParallel and `torch.compile` around it; several models as one, `nn.ModuleDict`.
        given: with what is around it.
        optimizers: by name; the only one under "".
        others: further objects with a `state_dict`.
    """

    def __init__(self, model: Models, optimizer: Optimizers = None, others: Sequence[Any] = ()) -> None:
        models = model if isinstance(model, Mapping) else {"": model}
        _check_arguments(models, by_name(optimizer), others)
        self.model = nn.ModuleDict(_checked(models)) if isinstance(model, Mapping) else unwrapped(model)
        self.given = nn.ModuleDict(dict(models)) if isinstance(model, Mapping) else model
        self.optimizers = by_name(optimizer)
        self.others = tuple(other for other in others if other is not None)
        wrapped = [each for each in models.values() if _in_ddp(each) is not None or _fsdp_modules(each)]
        self.is_ddp = bool(wrapped)
        in_ddp = [_in_ddp(each) for each in wrapped]
        self._mends_buffers = all(each is not None and each.broadcast_buffers for each in in_ddp)

    def tensors(self) -> Iterable[Tensor]:
        """Parameters and buffers."""
        return (*self.model.parameters(), *self.model.buffers())

    def gradients(self) -> Iterable[Entry]:
        """As they are now."""
        return gradient_entries(named_weights(self.model))

    def state(self) -> dict[str, Iterable[Entry]]:
        """The entries of the stages that exist at any time."""
        return self._state(named_weights(self.model))

    def _state(self, named: dict[str, nn.Parameter]) -> dict[str, Iterable[Entry]]:
        stages: dict[str, Iterable[Entry]] = {
            "buffers": named_buffers(self.model).items(),
            "weights": named.items(),
            "rng": rng_entries(),
        }
        if self.optimizers:
            stages["optimizer"] = optimizer_entries(named, self.optimizers, *self.others)
        return stages

    def after_step(
        self, indices: Tensor | None, batch: Batch | None, outputs: Batch | None, loss: Tensor | None
    ) -> dict[str, Iterable[Entry]]:
        """The entries of all stages there are after a step to which these belong."""
        named = named_weights(self.model)  # once: in a large model it takes longer than the rest
        stages = {"gradients": gradient_entries(named)} | self._state(named)
        output = {name: value for name, value in (("logits", outputs), ("loss", loss)) if value is not None}
        if indices is not None:
            stages["indices"] = [("indices", indices)]
        if batch is not None:
            stages["batch"] = batch_entries(batch)
        if output:
            stages["output"] = batch_entries(output)
        return stages

    def compared(self, expect: Expect, stages: Collection[str] | None) -> frozenset[str]:
        """The stages to compare: those given, or all that must agree.

        Raises ValueError for a name that is no stage, and for one that independent replicas do not share.
        """
        comparable = INDEPENDENT_STAGES if expect == "independent" else STAGES
        if isinstance(stages, str):
            raise ValueError(f"stages: {stages!r} will not do: give several, or one in a list: [{stages!r}].")
        for name in stages or ():
            if name not in STAGES:
                raise ValueError(f"stages: {name!r} is no stage. {nearest(name, STAGES)}")
            if name not in comparable:
                raise ValueError(
                    f"stages: {name!r} is not compared where expect is 'independent', only {', '.join(comparable)}. "
                    "Leave it out, or use expect='identical' with the stages that must agree."
                )
        if stages is not None and not stages:
            raise ValueError(f"stages: {stages!r} will not do: nothing would be compared. Name some, or leave it out.")
        if stages is not None:
            return frozenset(stages)
        if expect == "ddp":
            return frozenset(DDP_STAGES if self._mends_buffers else (*DDP_STAGES, "buffers"))
        return frozenset(comparable)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within DistributedDataParallel and `torch.compile`, in whatever order."""
    within = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", model)
    return model if within is model else unwrapped(within)


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """Those of its modules that are in FullyShardedDataParallel."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # to import it takes a second, and few have
    return [] if fsdp is None else fsdp.FullyShardedDataParallel.fsdp_modules(model)


def _in_ddp(model: nn.Module) -> DistributedDataParallel | None:
    within = getattr(model, "_orig_mod", model)
    return within if isinstance(within, DistributedDataParallel) else None


def _check_arguments(models: Mapping[str, Any], optimizers: Mapping[str, Any], others: Any) -> None:
    if not models:
        raise ValueError("model: there is none in {}, and nothing would be compared.")
    for each in models.values():
        if not isinstance(each, nn.Module):
            raise _refused("model", each, "an nn.Module, or several by name: {'generator': g, 'critic': c}")
        for name, parameter in each.named_parameters():
            if hasattr(parameter, "placements"):
                raise _sharded(f"{name!r} is a {type(parameter).__name__}", "fully_shard, say", _WHOLE_DTENSORS)
        for module in _fsdp_modules(each):
            strategy = module.sharding_strategy.name
            if strategy != "NO_SHARD":
                raise _sharded("it is in FullyShardedDataParallel", strategy, _WHOLE_FLAT_PARAMETERS)
    for each in optimizers.values():
        if not hasattr(each, "param_groups"):
            raise _refused("optimizer", each, "one, or several by name: {'generator': g, 'critic': c}")
    if not isinstance(others, Sequence):
        raise _refused("others", others, "a list: [scheduler, scaler]")
    for each in others:
        if not (each is None or hasattr(each, "state_dict")):
            raise _refused("others", each, "what has a state_dict: [scheduler, scaler]")


def _sharded(what: str, how: str, whole: str) -> ValueError:
    return ValueError(
        f"model: {what}: each rank holds a part of its own ({how}), and parts differ by design. "
        f"Compare whole tensors instead, run against run: {whole}."
    )


def _refused(name: str, value: Any, hint: str) -> ValueError:
    return ValueError(f"{name}: a {type(value).__name__} will not do; give {hint}.")


def _checked(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    for name in models:
        if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise ValueError(f"model: {name!r} cannot be a model's name; give another word, such as 'generator'.")
    return {name: unwrapped(model) for name, model in models.items()}
