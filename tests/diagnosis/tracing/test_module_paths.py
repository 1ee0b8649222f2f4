"""Which module is running, forward and backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

from dreplica.diagnosis.tracing.module_paths import ModulePaths


class Seen(TorchDispatchMode):
    """Notes for each operator where it ran."""

    def __init__(self, paths: ModulePaths) -> None:
        super().__init__()
        self.paths = paths
        self.seen: list[tuple[str, str, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.seen.append((str(func).split(".")[1], self.paths.current(), self.paths.in_backward()))
        return func(*args, **(kwargs or {}))


def places(model: nn.Module, inputs: Tensor, named: bool = True) -> list[tuple[str, str, bool]]:
    paths = ModulePaths(model if named else None)
    with paths, Seen(paths) as seen:
        model(inputs).sum().backward()
    return seen.seen


def where(seen: list[tuple[str, str, bool]], name: str, backward: bool) -> list[str]:
    return [path for operator, path, in_backward in seen if operator == name and in_backward is backward]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs).exp() * self.scale


def make() -> nn.Module:
    return nn.Sequential(Block(), Block())


def test_path_is_of_innermost_module() -> None:
    seen = places(make(), torch.randn(2, 4))
    assert where(seen, "addmm", False) == ["0.inner.0", "1.inner.0"]
    assert where(seen, "tanh", False) == ["0.inner.1", "1.inner.1"]
    assert where(seen, "exp", False) == ["0", "1"]
    assert where(seen, "sum", False)[-1] == ""


def test_backward_paths_mirror_forward() -> None:
    seen = places(make(), torch.randn(2, 4, requires_grad=True))
    assert where(seen, "tanh_backward", True) == ["1.inner.1", "0.inner.1"]
    assert where(seen, "mm", True) == ["1.inner.0", "1.inner.0", "0.inner.0", "0.inner.0"]
    assert set(where(seen, "expand", True)) == {""}  # of the sum, outside


def test_module_used_twice_has_one_path() -> None:
    block = Block()
    seen = places(nn.Sequential(block, nn.Tanh(), block), torch.randn(2, 4))
    assert where(seen, "addmm", False) == ["0.inner.0", "0.inner.0"]
    assert set(where(seen, "tanh_backward", True)) == {"0.inner.1", "1"}


def test_paths_without_model_are_relative() -> None:
    block = Block()
    holder = nn.ModuleDict({"block": block})
    assert where(places(block, torch.randn(2, 4), named=False), "tanh", False) == ["inner.1"]
    paths = ModulePaths(holder)
    with paths, Seen(paths) as seen:
        block(torch.randn(2, 4))
    assert where(seen.seen, "tanh", False) == ["block.inner.1"]


@pytest.mark.parametrize("kind", [ValueError, GeneratorExit])  # of the second kind torch tells no hook
def test_module_left_by_exception(kind: type[BaseException]) -> None:
    class Fails(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            raise kind

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.Sequential(nn.Sequential(Fails()))

        def forward(self, inputs: Tensor) -> Tensor:
            try:
                return self.deep(inputs)
            except kind:
                return inputs

    paths = ModulePaths(model := nn.Sequential(Catches(), nn.Tanh()))
    with paths, Seen(paths) as seen:
        model(torch.randn(2, 4)).exp()
        assert not paths.in_module
    assert where(seen.seen, "tanh", False) == ["1"]
    assert where(seen.seen, "exp", False) == [""]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_are_backward(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(self.block, inputs, use_reentrant=reentrant)

    seen = places(Checkpointed(), torch.randn(2, 4, requires_grad=True))
    assert where(seen, "tanh", False) == ["block.inner.1"]
    assert where(seen, "tanh", True) == ["block.inner.1"]
    assert where(seen, "tanh_backward", True) == ["block.inner.1"]


def test_backward_seen_until_next_forward() -> None:
    paths = ModulePaths(model := make())
    with paths, Seen(paths):
        loss = model(torch.randn(2, 4)).sum()
        assert not paths.backward_seen
        loss.backward()
        assert paths.backward_seen
        model(torch.randn(2, 4))
        assert not paths.backward_seen


def test_compiled_model_has_no_paths() -> None:
    model = make()
    model[0].compile(backend="eager")
    before = len(torch_module._global_forward_hooks)
    with ModulePaths(model) as paths:
        assert len(torch_module._global_forward_hooks) == before
        assert paths.current() == ""


def test_module_paths_removes_hooks() -> None:
    class Fails(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            raise ValueError(f"{len(torch_module._global_forward_hooks)} hooks")

    before = len(torch_module._global_forward_hooks), len(torch_module._global_forward_pre_hooks)
    with pytest.raises(ValueError, match=f"{before[0] + 1} hooks"):
        places(Fails(), torch.ones(1))
    assert (len(torch_module._global_forward_hooks), len(torch_module._global_forward_pre_hooks)) == before
