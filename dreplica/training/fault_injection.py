"""Fault injection: flip bits of a replica's state at a chosen step, as a faulty memory cell or processor would.

Flips are invisible to autograd and to operator tracing. A fault with `repeat` is injected at every step from its own
step on, replays included. Otherwise it is injected once.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from dreplica.config.messages import nearest
from dreplica.config.schema import FaultConfig
from dreplica.data.loading.index_stream import IndexSampler, IndexStream
from dreplica.distributed.channel import Channel
from dreplica.errors import UsageError
from dreplica.state.replica import Replica
from dreplica.state.stages import named_buffers, named_weights, plain_name

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MT19937_STATE = slice(24, 24 + 624 * 8)
"""Bytes of torch's CPU generator state with its 624 words: 8 bytes each, of which the low 4 are used."""


class Injector:
    """The faults to inject into one replica, each at its step. `close` removes its hooks.

    Args:
        faults: The faults of all replicas.
        replica_id: This replica.
        replica: The replica to inject into.

    Attributes:
        not_injected: This replica's faults that have not been injected yet.

    Raises:
        UsageError: A fault names a tensor that does not exist, or its target has none.
    """

    def __init__(self, faults: Sequence[FaultConfig], replica_id: int, replica: Replica) -> None:
        self._replica = replica
        self.not_injected = [fault for fault in faults if fault.replica == replica_id]
        self._waiting = [fault for fault in faults if fault.replica == replica_id]
        self._handles: list[Any] = []
        for fault in faults:
            # A hook changes the compiled code of a model, so all replicas get the hook, with a fault or without.
            if fault.replica == replica_id or fault.target in {"activation", "batch"}:
                self._attach(fault)

    def indices(self, step: int, indices: Tensor, num_samples: int) -> None:
        """Inject the faults of a step into its batch indices, in place.

        Args:
            step: Number of the step, from 1.
            indices: Sample indices, shape (batch,), int64. A changed index remains within the data set.
            num_samples: Samples in the data set.
        """
        for fault in self._due("indices", step):
            draw = _draw(fault, step)
            position, width = draw.randrange(len(indices)), max(1, (num_samples - 1).bit_length())
            mask = sum(1 << bit for bit in draw.sample(range(width), min(fault.bits, width)))
            index = int(indices[position])
            changed = (index ^ mask) % num_samples
            indices[position] = changed if changed != index else (index + 1) % num_samples

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()

    def _attach(self, fault: FaultConfig) -> None:
        model, optimizer = self._replica.model, self._replica.optimizer
        inject = torch.compiler.disable(self._inject) if _is_compiled(model) else self._inject
        if fault.target == "batch":
            self._handles.append(model.register_forward_pre_hook(lambda _, args: inject(fault, _tensors_in(args))))
        elif fault.target == "activation":
            module = _choose(fault, dict(_leaf_modules(model)), "module")
            self._handles.append(
                module.register_forward_hook(lambda _m, _a, output: inject(fault, _tensors_in(output)))
            )
        elif fault.target == "gradients":
            _choose(fault, _weights(self._replica), "tensor")
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: self._inject_named(fault, _gradients)))
        elif fault.target == "rng":
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._inject_rng(fault)))
        elif fault.target != "indices":
            tensors = _NAMED[fault.target]
            if fault.target != "optimizer":  # its state exists only after a step
                _choose(fault, tensors(self._replica), "tensor")
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._inject_named(fault, tensors)))

    def _is_due(self, fault: FaultConfig, step: int) -> bool:
        """Return True if a fault is to be injected now, and remove it if it is injected once."""
        if fault not in self._waiting or not (step == fault.step or (fault.repeat and step > fault.step)):
            return False
        if not fault.repeat:
            self._waiting.remove(fault)
        if fault in self.not_injected:
            self.not_injected.remove(fault)
        return True

    def _due(self, target: str, step: int) -> list[FaultConfig]:
        return [fault for fault in list(self._waiting) if fault.target == target and self._is_due(fault, step)]

    @property
    def _step(self) -> int:
        return self._replica.steps_done + 1

    def _inject(self, fault: FaultConfig, tensors: list[Tensor]) -> None:
        if self._replica.model.training and torch.is_grad_enabled() and self._is_due(fault, self._step):
            flip_bits(tensors[0], fault.bits, _draw(fault, self._step))

    def _inject_named(self, fault: FaultConfig, tensors: Callable[[Replica], dict[str, Tensor]]) -> None:
        if self._is_due(fault, self._step):
            flip_bits(_choose(fault, tensors(self._replica), "tensor"), fault.bits, _draw(fault, self._step))

    def _inject_rng(self, fault: FaultConfig) -> None:
        if self._is_due(fault, self._step):
            with _disable_current_modes():
                state = torch.get_rng_state()
                words = state[_MT19937_STATE].view(torch.int64)
                draw = _draw(fault, self._step)
                for place in draw.sample(range(len(words) * 32), fault.bits):
                    words[place // 32] ^= 1 << (place % 32)
                torch.set_rng_state(state)


class FaultyCoordinator(IndexSampler):
    """A coordinator that injects faults into the indices that its replica has received.

    Args:
        channel: The channel between all replicas.
        seed: The seed of the order of samples.
        injector: Injects the faults of this replica.
    """

    def __init__(self, channel: Channel, seed: int, injector: Injector) -> None:
        super().__init__(channel, seed)
        self._injector = injector

    def training_batches(self, num_samples: int, batch_size: int, epoch: int, first: int = 0) -> IndexStream:
        """Return the coordinator's stream with faults injected into batches of the first two windows.

        Args:
            num_samples: Samples in the training set.
            batch_size: Samples per batch.
            epoch: Number of the epoch, from 1.
            first: Position of the first batch to yield.
        """
        stream = super().training_batches(num_samples, batch_size, epoch, first)
        steps_before = (epoch - 1) * len(stream)
        for number in range(first, min(len(stream), stream.num_received)):
            self._injector.indices(steps_before + number + 1, stream.batch(number), num_samples)
        return stream


def flip_bits(tensor: Tensor, bits: int, draw: random.Random) -> None:
    """Flip bits of a tensor in place, without autograd, version counters or dispatch modes noticing.

    Args:
        tensor: The tensor.
        bits: Number of different bits to flip; all if the tensor has fewer.
        draw: Chooses the bits.
    """
    with _disable_current_modes(), torch.no_grad():
        data = tensor.data
        if data.is_complex():
            data = torch.view_as_real(data.conj() if data.is_conj() else data)
        flat = data.view(_INTEGERS[data.element_size()]) if data.dtype is not torch.bool else data.view(torch.uint8)
        width = 1 if data.dtype is torch.bool else 8 * data.element_size()
        for place in draw.sample(range(flat.numel() * width), min(bits, flat.numel() * width)):
            index = torch.unravel_index(torch.tensor(place // width), flat.shape) if flat.dim() else ()
            bit = place % width
            # The sign bit cannot be written as a positive number of a signed dtype.
            mask = -(1 << bit) if bit == 8 * flat.element_size() - 1 and flat.dtype is not torch.uint8 else 1 << bit
            flat[index] = flat[index] ^ mask


def _tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(part, "_orig_mod") or part._compiled_call_impl is not None for part in model.modules())


def _draw(fault: FaultConfig, step: int) -> random.Random:
    return random.Random(f"{fault.seed} {fault.replica} {fault.target} {step}")


def target_name(fault: FaultConfig, replica: Replica) -> str:
    """Return the name of the tensor, for `activation` of the module, into which a fault is injected.

    Only for targets whose tensors have names. Those of the optimizer exist once it has taken a step.
    """
    named = {"activation": lambda replica: dict(_leaf_modules(replica.model)), **_NAMED}[fault.target]
    return _choose_name(fault, named(replica), "tensor")


def _choose(fault: FaultConfig, named: dict[str, Any], what: str) -> Any:
    return named[_choose_name(fault, named, what)]


def _choose_name(fault: FaultConfig, named: dict[str, Any], what: str) -> str:
    if fault.tensor is None:
        candidates = [name for name, value in named.items() if not isinstance(value, Tensor) or value.numel()]
        if not candidates:
            raise UsageError(
                f"inject: no {what} in target {fault.target!r}. Choose another target.",
                code="empty-target",
                target=fault.target,
            )
        return random.Random(f"{fault.seed} {fault.replica} {fault.target}").choice(candidates)
    if fault.tensor not in named:
        raise UsageError(
            f"inject: no {what} {fault.tensor!r} in target {fault.target!r}. {nearest(fault.tensor, named)}",
            code="unknown-tensor",
            target=fault.target,
            tensor=fault.tensor,
        )
    return fault.tensor


def _leaf_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (plain_name(name), module) for name, module in model.named_modules() if name and not list(module.children())
    ]


def _weights(replica: Replica) -> dict[str, Tensor]:
    return dict(named_weights(replica.model))


def _buffers(replica: Replica) -> dict[str, Tensor]:
    return named_buffers(replica.model)


def _gradients(replica: Replica) -> dict[str, Tensor]:
    return {name: p.grad for name, p in named_weights(replica.model).items() if p.grad is not None}


def _optimizer_state(replica: Replica) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in named_weights(replica.model).items()}
    return {
        f"{names.get(parameter, 'unnamed')}.{key}": value
        for parameter, state in replica.optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


_NAMED: dict[str, Callable[[Replica], dict[str, Any]]] = {
    "weights": _weights,
    "gradients": _gradients,
    "buffers": _buffers,
    "optimizer": _optimizer_state,
}
