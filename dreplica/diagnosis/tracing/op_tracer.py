"""Records every operator of a step: name, module, phase, and digests of what went in and came out.

A record holds digests, never tensors, so the memory it takes does not grow with the model's.
"""

import os
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dreplica.config.paths import PACKAGE_ROOT
from dreplica.diagnosis.tracing.module_paths import ModulePaths
from dreplica.diagnosis.tracing.op_signature import signature_of, tensors_in
from dreplica.state.fingerprint.fingerprint import ABSENT, digest_tensor
from dreplica.state.stages import Optimizers, by_name

_TORCH = str(Path(torch.__file__).parent) + os.sep
_OWN_CODE = tuple(str(PACKAGE_ROOT / name) + os.sep for name in ("diagnosis", "training"))


@dataclass(frozen=True)
class OpRecord:
    """One operator of one step."""

    name: str
    """As in `aten.convolution.default`."""
    module: str
    """Path of the innermost module whose forward (or whose backward) it belongs to; empty outside of modules."""
    phase: str
    """`forward`; `backward`, recomputed activations included; or `optimizer`: everything after the backward pass and
    outside of modules, from unscaling and clipping the gradients to the optimizer's step."""
    inputs: bytes
    """16 bytes for each tensor that is read; for a view, which computes nothing, the shapes instead."""
    outputs: bytes
    """16 bytes for each tensor result and each argument written to; for a view, the shapes instead."""
    source: str
    """`file:line` of the user's code that called it; empty if torch (as in most of the backward pass) or the training
    step did."""
    scalars: str = ""
    """Its other arguments, numbers and dtypes, in the order of the call."""
    shows: bytes = field(default=b"", compare=False)
    """For a view, 16 bytes for the tensor viewed and for each result: not compared, but to follow contents by."""
    earlier: bool = field(default=False, compare=False)
    """Whether another forward or backward pass follows the optimizer's step that it precedes or belongs to."""

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.name}{where} ({self.phase})"

    def same_operator(self, other: "OpRecord") -> bool:
        """Whether the two are the same operator at the same place."""
        return (self.name, self.module, self.phase) == (other.name, other.module, other.phase)


@dataclass(frozen=True)
class Captured:
    """The tensors of one operator, kept for a comparison in full; on the CPU."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    function: str
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    """Positional and keyword arguments as called, tensors replaced by copies."""
    device_type: str = "cpu"
    """Where the operator ran: `cpu` or `cuda`."""


class OpTracer(TorchDispatchMode):
    """A context in which every operator is recorded; with `capture`, the tensors of that one operator are kept instead.

    Args:
        optimizer: its step is the phase `optimizer`, even before any backward pass; several by name.
        capture: the number of an operator in `records` of a run that takes the same course.
        generators: also record that Python's or NumPy's global generator was drawn from between two operators.
        model: whose module paths to use; without it, paths begin beneath the first module called. Must be given if it
            is compiled.

    Of a compiled model, only those operators are seen that its code calls through torch's dispatcher (not kernels that
    the compiler has generated), and without a module path.
    """

    def __init__(
        self,
        optimizer: Optimizers = None,
        capture: int | None = None,
        model: nn.Module | None = None,
        generators: bool = False,
    ) -> None:
        super().__init__()
        self.records: list[OpRecord] = []
        self.captured: Captured | None = None
        self.generator_struck = False
        """Whether torch's CPU generator was changed by anything but an operator that draws from it."""
        self._generators = _generator_states() if generators else None
        self._generator = b""
        self._capture = capture
        self._count = 0
        self._optimizers = by_name(optimizer).values()
        self._in_optimizer = False
        self._modules = ModulePaths(model)
        self._handles: list[Any] = []

    def __enter__(self) -> "OpTracer":
        for optimizer in self._optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(lambda *_: self._set_in_optimizer(True)),
                optimizer.register_step_post_hook(lambda *_: self._set_in_optimizer(False)),
            ]
        self._generator = _cpu_generator()
        self._modules.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._watch_generator()
        self._modules.__exit__(kind, error, traceback)
        for handle in self._handles:
            handle.remove()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code stays compiled while it is traced: what is replayed is what was run (torch asks for this)."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        signature = signature_of(func)
        if not signature.recorded:
            return func(*args, **kwargs)
        number, self._count = self._count, self._count + 1
        if self._capture is not None:
            return self._call_and_capture(number, func, args, kwargs)
        if self._generators is not None:
            self._record_draws(self._generators)
        digests = _shapes if signature.is_view else _digests
        inputs = digests(signature.inputs(args, kwargs))
        if signature.draws:
            self._watch_generator()
            inputs += _generator_digest(args, kwargs)
        result = func(*args, **kwargs)
        if signature.draws:
            self._generator = _cpu_generator()
        record = OpRecord(
            name=signature.name,
            module=self._modules.current(),
            phase=self._phase(),
            inputs=inputs,
            outputs=digests(signature.outputs(result, args, kwargs)),
            source=_user_source(),
            scalars=_scalars((args, kwargs)),
            shows=_digests(tensors_in([args[0], result])) if signature.shows_part else b"",
        )
        self.records.append(record)
        return result

    def _call_and_capture(self, number: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number != self._capture:
            return func(*args, **kwargs)
        copies = tree_map(lambda leaf: _to_cpu(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        result = func(*args, **kwargs)
        outputs = signature_of(func).outputs(result, args, kwargs)
        device_type = "cuda" if any(tensor.is_cuda for tensor in outputs) else "cpu"
        self.captured = Captured(
            tensors_in(copies), [_to_cpu(tensor) for tensor in outputs], str(func), copies, device_type
        )
        return result

    def _watch_generator(self) -> None:
        self.generator_struck = self.generator_struck or self._generator != _cpu_generator()

    def _record_draws(self, before: dict[str, int]) -> None:
        """Python's and NumPy's generators are not torch's: that one was drawn from shows in its state, afterwards."""
        self._generators = _generator_states()
        for name, state in self._generators.items():
            if state != before[name]:
                self.records.append(OpRecord(f"{name} was drawn from", "", self._phase(), b"", b"", _user_source()))

    def _phase(self) -> str:
        if self._modules.in_backward():
            return "backward"
        if self._modules.in_module:
            return "forward"
        return "optimizer" if self._in_optimizer or self._modules.backward_seen else "forward"

    def _set_in_optimizer(self, value: bool) -> None:
        self._in_optimizer = value


def _scalars(arguments: Any) -> str:
    kinds = (bool, int, float, complex, str, torch.dtype)
    return ", ".join(repr(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, kinds))


def _digests(tensors: Iterable[Tensor]) -> bytes:
    return b"".join(map(_digest, tensors))


def _digest(tensor: Tensor) -> bytes:
    """Of no use where there are no bytes of its own to take: a tensor on the meta device, a quantized or nested one."""
    layouts = (torch.strided, torch.sparse_coo)
    if tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.layout not in layouts:
        return ABSENT
    return digest_tensor("", tensor)


def _shapes(tensors: Iterable[Tensor]) -> bytes:
    # A view computes nothing, and of memory that was not written yet it shows whatever was there.
    return repr([None if t.is_nested else (t.dtype, tuple(t.shape)) for t in tensors]).encode()


def _generator_digest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Of the generator that the operator draws from: the one it was given, or its device's default."""
    generator = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)), None)
    if generator is not None:
        return digest_tensor("", generator.get_state())
    device = kwargs.get("device")  # of a new tensor
    on_gpu = any(tensor.is_cuda for tensor in tensors_in((args, kwargs)))
    on_gpu = on_gpu or (device is not None and torch.device(device).type == "cuda")
    return digest_tensor("", torch.cuda.get_rng_state() if on_gpu else torch.get_rng_state())


def _cpu_generator() -> bytes:
    return digest_tensor("", torch.get_rng_state())


def _generator_states() -> dict[str, int]:
    numpy_state: Any = numpy.random.get_state()
    return {"python's random": hash(random.getstate()), "numpy.random": hash(numpy_state[1].tobytes())}


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _user_source() -> str:
    """The innermost frame that is not torch's, unless the training step is reached before it."""
    frame = sys._getframe()  # autograd's threads for GPUs may have no frame but the tracer's own
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OWN_CODE) and file != __file__:
            return ""
        if file != __file__ and not file.startswith((_TORCH, "<")):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
