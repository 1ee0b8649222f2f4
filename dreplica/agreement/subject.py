"""The models and optimizers whose state is compared, bare or wrapped, and which of their stages must agree."""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dreplica.agreement.arguments import invalid_argument
from dreplica.errors import UsageError
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
"""One model, or several by name."""

Batch = Tensor | Mapping[str, Any] | Sequence[Any]
"""A tensor, or tensors in dicts, lists and tuples."""

Expect = Literal["identical", "independent", "ddp"]

_WHOLE_FLAT_PARAMETERS = (
    "with FullyShardedDataParallel.summon_full_params(model): dreplica.fingerprint(dict(model.named_parameters()))"
)

DDP_STAGES = ("gradients", "optimizer", "weights")
"""Stages that the ranks of one data-parallel model share after every step. Buffers, too, unless DDP broadcasts them."""


class Subject:
    """Models and optimizers under the names that a verdict gives to their tensors.

    Args:
        model: One model, or several by name.
        optimizer: One optimizer, several by name, or None.
        others: Further objects with a `state_dict`. None items are skipped.
        generators: Returns the entries of the stage `rng`.

    Raises:
        UsageError: If an argument has the wrong type, a model is in FullyShardedDataParallel, or a model's name is
            invalid.

    Attributes:
        model: The model without DistributedDataParallel and `torch.compile`; several models as one `nn.ModuleDict`.
        given: The model as it was passed, with its wrappers.
        optimizers: Name to optimizer; a single optimizer has the name "".
        others: Further objects with a `state_dict`.
        is_ddp: True if a model is wrapped in DistributedDataParallel or FullyShardedDataParallel (NO_SHARD), or has
            DTensors as parameters.
        group: The process group in which DistributedDataParallel averages the gradients, None without it.
    """

    def __init__(
        self,
        model: Models,
        optimizer: Optimizers = None,
        others: Sequence[Any] = (),
        generators: Callable[[], Iterable[Entry]] = rng_entries,
    ) -> None:
        models = model if isinstance(model, Mapping) else {"": model}
        _check_arguments(models, by_name(optimizer), others)
        self.model = nn.ModuleDict(_checked(models)) if isinstance(model, Mapping) else unwrapped(model)
        self.given = nn.ModuleDict(dict(models)) if isinstance(model, Mapping) else model
        self.optimizers = by_name(optimizer)
        self._generators = generators
        self.others = tuple(other for other in others if other is not None)
        wrapped = [each for each in models.values() if _in_ddp(each) is not None or _fsdp_modules(each)]
        is_sharded = any(hasattr(each, "placements") for each in self.model.parameters())
        self.is_ddp = bool(wrapped) or is_sharded
        in_ddp = [_in_ddp(each) for each in wrapped]
        groups = {each.process_group for each in in_ddp if each is not None}
        self.group = groups.pop() if len(groups) == 1 else None
        self._broadcasts_buffers = not is_sharded and all(
            each is not None and each.broadcast_buffers for each in in_ddp
        )

    def tensors(self) -> Iterable[Tensor]:
        """Return all parameters and buffers."""
        return (*self.model.parameters(), *self.model.buffers())

    def gradients(self) -> Iterable[Entry]:
        """Return the entries of the current gradients."""
        return gradient_entries(named_weights(self.model))

    def state(self) -> dict[str, Iterable[Entry]]:
        """Return the entries of the stages that exist at any time."""
        return self._state(named_weights(self.model))

    def _state(self, named: dict[str, nn.Parameter]) -> dict[str, Iterable[Entry]]:
        stages: dict[str, Iterable[Entry]] = {
            "buffers": named_buffers(self.model).items(),
            "weights": named.items(),
            "rng": self._generators(),
        }
        if self.optimizers:
            stages["optimizer"] = optimizer_entries(named, self.optimizers, *self.others)
        return stages

    def after_step(
        self, indices: Tensor | None, batch: Batch | None, outputs: Batch | None, loss: Tensor | None
    ) -> dict[str, Iterable[Entry]]:
        """Return the entries of all stages after a training step.

        Args:
            indices: Indices of the samples, int64.
            batch: What the model was given.
            outputs: The model's output.
            loss: The loss, 0-dim.

        Returns:
            Stage to entries. A stage whose argument is None is left out.
        """
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
        """Return the names of the stages to compare: those given, or all that must agree."""
        if stages is not None:
            return frozenset(stages)
        if expect == "ddp":
            return frozenset(DDP_STAGES if self._broadcasts_buffers else (*DDP_STAGES, "buffers"))
        return frozenset(INDEPENDENT_STAGES if expect == "independent" else STAGES)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel and `torch.compile`, nested in any order."""
    within = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", model)
    return model if within is model else unwrapped(within)


def _fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the submodules that are wrapped in FullyShardedDataParallel."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes a second, and few programs use it
    return [] if fsdp is None else fsdp.FullyShardedDataParallel.fsdp_modules(model)


def _in_ddp(model: nn.Module) -> DistributedDataParallel | None:
    within = getattr(model, "_orig_mod", model)
    return within if isinstance(within, DistributedDataParallel) else None


def _check_arguments(models: Mapping[str, Any], optimizers: Mapping[str, Any], others: Any) -> None:
    if not models:
        raise invalid_argument("model", models, "model must name at least one nn.Module, got {}.")
    for each in models.values():
        if not isinstance(each, nn.Module):
            raise _wrong_type("model", each, "an nn.Module, or several by name: {'generator': g, 'critic': c}")
        for module in _fsdp_modules(each):
            strategy = module.sharding_strategy.name
            if strategy != "NO_SHARD":
                raise _sharded(each, "it is in FullyShardedDataParallel", strategy, _WHOLE_FLAT_PARAMETERS)
    for each in optimizers.values():
        if not hasattr(each, "param_groups"):
            raise _wrong_type("optimizer", each, "an optimizer, or several by name: {'generator': g, 'critic': c}")
    if not isinstance(others, Sequence):
        raise _wrong_type("others", others, "a list of objects with a state_dict: [scheduler, scaler]")
    for each in others:
        if not (each is None or hasattr(each, "state_dict")):
            raise _wrong_type("others", each, "a list of objects with a state_dict: [scheduler, scaler]", "one with a ")


def _sharded(model: nn.Module, what: str, how: str, whole: str) -> UsageError:
    return invalid_argument(
        "model",
        model,
        f"model: {what}, so each rank holds different values by design ({how}). Compare whole tensors between runs "
        f"instead: {whole}.",
        code="sharded-model",
    )


def _wrong_type(name: str, value: Any, expected: str, container: str = "") -> UsageError:
    return invalid_argument(name, value, f"{name} must be {expected}, got {container}{type(value).__name__}.")


def _checked(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    for name in models:
        if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
            text = f"model: {name!r} is not a valid name for a model. Use an identifier such as 'generator'."
            raise invalid_argument("model", name, text)
    return {name: unwrapped(model) for name, model in models.items()}
