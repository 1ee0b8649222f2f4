"""Fault injection: corrupt a replica's state at a chosen step, as a faulty memory cell or processor would.

Corruption is invisible to autograd and to operator tracing, except that of an operator's result: the operator itself is
seen to return it. A fault with `repeat` is injected at every step from its own step on, replays included. Otherwise it
is injected once.
"""

import random
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from dreplica.config.messages import nearest
from dreplica.config.schema import FaultConfig
from dreplica.data.loading.index_stream import IndexSampler, IndexStream, draw_order
from dreplica.distributed.channel import Channel
from dreplica.errors import UsageError
from dreplica.state.replica import Replica
from dreplica.state.stages import named_buffers, named_weights, plain_name
from dreplica.training.corruption import check_fits, check_range, corrupt
from dreplica.training.faulty_operator import FaultyOperators

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
        self._operators: FaultyOperators | None = None
        for fault in faults:
            # A hook changes the compiled code of a model, so all replicas get the hook, with a fault or without.
            if fault.target != "operator" and (fault.replica == replica_id or fault.target in {"activation", "batch"}):
                self._attach(fault)
        names = {fault.tensor for fault in faults if fault.target == "operator" and fault.tensor is not None}
        if names:
            self._attach_to_operators(names)

    def indices(self, step: int, indices: Tensor, num_samples: int) -> None:
        """Inject the faults of a step into its batch indices, in place.

        Args:
            step: Number of the step, from 1.
            indices: Sample indices, shape (batch,), int64. A changed index remains within the data set.
            num_samples: Samples in the data set.
        """
        width = max(1, (num_samples - 1).bit_length())
        for fault in self._due("indices", step):
            check_range(fault, len(indices), width)
            draw = _draw(fault, step)
            position = draw.randrange(len(indices)) if fault.element is None else fault.element
            bits = draw.sample(range(width), min(fault.bits, width)) if fault.bit is None else [fault.bit]
            index = int(indices[position])
            changed = (index ^ sum(1 << bit for bit in bits)) % num_samples
            indices[position] = changed if changed != index else (index + 1) % num_samples

    def close(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._operators is not None:
            self._operators.__exit__(None, None, None)
            self._operators = None

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
            check_fits(_choose(fault, _weights(self._replica), "tensor"), fault)
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: self._inject_named(fault, _gradients)))
        elif fault.target == "rng":
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._inject_rng(fault)))
        elif fault.target != "indices":
            tensors = _NAMED[fault.target]
            if fault.target != "optimizer":  # its state exists only after a step
                check_fits(_choose(fault, tensors(self._replica), "tensor"), fault)
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._inject_named(fault, tensors)))

    def _attach_to_operators(self, names: Collection[str]) -> None:
        """Enter the mode that corrupts results of operators, from each step's forward pass to its optimizer step."""
        model, optimizer = self._replica.model, self._replica.optimizer
        operators = FaultyOperators(names, self._inject_operator)
        begin = torch.compiler.disable(operators.begin) if _is_compiled(model) else operators.begin
        self._handles += [
            model.register_forward_pre_hook(lambda *_: begin(self._step) if self._trains() else None),
            optimizer.register_step_post_hook(lambda *_: operators.end()),
        ]
        self._operators = operators.__enter__()

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
        if self._trains() and self._is_due(fault, self._step):
            corrupt(tensors[0], fault, _draw(fault, self._step))

    def _inject_named(self, fault: FaultConfig, tensors: Callable[[Replica], dict[str, Tensor]]) -> None:
        if self._is_due(fault, self._step):
            corrupt(_choose(fault, tensors(self._replica), "tensor"), fault, _draw(fault, self._step))

    def _inject_operator(self, name: str, result: Tensor) -> None:
        for fault in [fault for fault in self._waiting if (fault.target, fault.tensor) == ("operator", name)]:
            if self._is_due(fault, self._step):
                corrupt(result, fault, _draw(fault, self._step))

    def _trains(self) -> bool:
        return self._replica.model.training and torch.is_grad_enabled()

    def _inject_rng(self, fault: FaultConfig) -> None:
        if self._is_due(fault, self._step):
            with _disable_current_modes():
                state = torch.get_rng_state()
                words = state[_MT19937_STATE].view(torch.int64)
                check_range(fault, len(words), 32)
                element = fault.element
                places = range(len(words) * 32) if element is None else range(element * 32, (element + 1) * 32)
                places = places if fault.bit is None else places[fault.bit :: 32]
                for place in _draw(fault, self._step).sample(places, min(fault.bits, len(places))):
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
        """Return the coordinator's stream, with faults injected into its batches as they are received.

        Args:
            num_samples: Samples in the training set.
            batch_size: Samples per batch.
            epoch: Number of the epoch, from 1.
            first: Position of the first batch to yield.
        """
        order = draw_order(num_samples, self.seed, epoch) if self._channel.rank == 0 else None
        self._passes += 1
        steps_before = (epoch - 1) * -(-num_samples // batch_size)

        def inject(number: int, indices: Tensor) -> None:
            self._injector.indices(steps_before + number + 1, indices, num_samples)

        return _FaultyStream(inject, self._channel, order, num_samples, batch_size, self._passes, first)


class _FaultyStream(IndexStream):
    """The batches of a training epoch, with faults injected into each on its arrival."""

    def __init__(self, inject: Callable[[int, Tensor], None], *arguments: Any) -> None:
        self._inject = inject
        self._next = arguments[-1]
        super().__init__(*arguments)

    def _receive(self) -> None:
        super()._receive()
        for number in range(self._next, self.num_received):
            self._inject(number, self.batch(number))
        self._next = self.num_received


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
