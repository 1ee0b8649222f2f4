"""Factories of models and replicas whose code acts once, on replica 1, in its third training step."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dreplica
from dreplica.distributed.process_group import env_rank
from tests.fixtures import tiny_model


class _Once(nn.Module):
    def __init__(self, num_classes: int, act: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.body = tiny_model(num_classes)
        self._act = act
        self._calls = itertools.count(1)  # no replay restores it

    def forward(self, images: Tensor) -> Tensor:
        if self.training and next(self._calls) == 3 and env_rank() == 1:
            changed = self._act(self.body, images)
            images = changed if isinstance(changed, Tensor) else images
        return self.body(images)


def clamp(num_classes: int) -> nn.Module:
    """Clamp a bias."""

    def act(body: nn.Module, _images: Tensor) -> None:
        with torch.no_grad():
            body[5].bias.clamp_(-1e-4, 1e-4)

    return _Once(num_classes, act)


def monitoring(num_classes: int) -> nn.Module:
    """Run a part of the model once more, in training mode."""

    def act(body: nn.Module, images: Tensor) -> None:
        with torch.no_grad():
            body[1](body[0](images * 0.5))

    return _Once(num_classes, act)


def draw(num_classes: int) -> nn.Module:
    """Draw one more number from torch's generator."""
    return _Once(num_classes, lambda _body, _images: [torch.randint(10, (1,))])


def draw_of_python(num_classes: int) -> nn.Module:
    """Draw one more number from Python's generator, which nothing else uses."""
    return _Once(num_classes, lambda _body, _images: random.random())


def scaled_inputs(num_classes: int) -> nn.Module:
    """Change the inputs, without any trace."""
    return _Once(num_classes, lambda _body, images: images * 1.001)


class _SkipsOnce(torch.optim.SGD):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._calls = itertools.count(1)

    def step(self, closure: Any = None) -> Any:
        """Leave out the third step."""
        return None if next(self._calls) == 3 and env_rank() == 1 else super().step(closure)


def skipped_step(_config: Any, num_classes: int, _device: torch.device) -> dreplica.Replica:
    """Leave out one step of the optimizer."""
    torch.manual_seed(0)
    model = tiny_model(num_classes)
    return dreplica.Replica(model, nn.CrossEntropyLoss(), _SkipsOnce(model.parameters(), lr=0.1, momentum=0.9))
