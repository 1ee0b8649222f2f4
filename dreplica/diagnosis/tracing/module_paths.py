"""Lookup of the module that an operator belongs to, in forward and backward passes.

`torch.utils.module_tracker.ModuleTracker` keeps a set of the entered modules, which does not show which one is
innermost, and in the backward pass it needs gradients to flow through every input and output of a module. Here the
backward pass is looked up instead. Autograd numbers its nodes in the order in which the forward pass creates them, so a
node belongs to the module that was running when the counter had the node's number.
"""

import threading
from bisect import bisect_right
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


class ModulePaths:
    """Context manager that follows which module is running, in the thread that enters it and in autograd's threads.

    Paths are those of `model.named_modules()`. For a module outside of `model`, they are relative to the first module
    called. A compiled model has no paths, because hooks would be compiled with it and change its code. With re-entrant
    `torch.utils.checkpoint` on a GPU, paths in the backward pass are not reliable, because a separate thread numbers
    the graph.

    Args:
        model: The model whose paths to use. Required if it is compiled.

    Attributes:
        is_compiled: True if a part of the model is compiled.
        backward_seen: True if a backward pass has run since a module was last called in a forward pass.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._names: dict[int, str] = {}
        self._owners: dict[int, str] = {}
        self._named: list[nn.Module] = []
        self._running: list[tuple[int, str]] = []
        self._numbers: list[int] = []
        self._paths: list[str] = []
        self._handles: list[Any] = []
        self._thread = threading.get_ident()
        self.backward_seen = False
        self.is_compiled = model is not None and any(map(_is_compiled, model.modules()))
        if model is not None:
            self._name(model)

    def __enter__(self) -> "ModulePaths":
        self._thread = threading.get_ident()
        if self.is_compiled:
            return self
        self._handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._named.clear()

    @property
    def in_module(self) -> bool:
        """True while the forward pass of a module is running."""
        return bool(self._running)

    def current(self) -> str:
        """Return the path of the innermost module that is running, forward or backward. Empty outside of modules."""
        if self._running:
            return self._running[-1][1]
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        variable = getattr(node, "variable", None)
        if variable is not None:
            return self._owners.get(id(variable), "")
        position = bisect_right(self._numbers, node._sequence_nr()) - 1
        return self._paths[position] if position >= 0 else ""

    def in_backward(self) -> bool:
        """Return True while autograd is running a backward pass."""
        running = torch._C._current_graph_task_id() != -1
        self.backward_seen |= running
        return running

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        if not self.in_backward():
            self.backward_seen = False
        if id(module) not in self._names:
            self._name(module)
        self._running.append((id(module), self._names[id(module)]))
        self._note()

    def _leave_module(self, module: nn.Module, *_: Any) -> None:
        # Modules left by an exception may lack this call; activation checkpointing ends recomputation with one.
        while self._running and self._running.pop()[0] != id(module):
            pass
        self._note()

    def _note(self) -> None:
        if threading.get_ident() == self._thread:
            self._numbers.append(torch.autograd._get_sequence_nr())
            self._paths.append(self._running[-1][1] if self._running else "")

    def _name(self, root: nn.Module) -> None:
        self._named.append(root)  # keeps the ids valid
        for path, module in root.named_modules():
            self._names.setdefault(id(module), path)
            for parameter in module.parameters(recurse=False):
                self._owners.setdefault(id(parameter), path)


def _is_compiled(module: nn.Module) -> bool:
    """Return True if compiled by `torch.compile(module)`, which wraps the module, or by `module.compile()`."""
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
