"""Model factories that have checkpoints leave something out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dreplica.continuation
from dreplica.replica.rng import get_rng_state
from dreplica.training.checkpoint import Contents, rng_to_json
from dreplica.training.saved_state import save_state
from tests.fixtures import tiny_model


def _generators(contents: Contents) -> None:
    contents.state["rng"]["torch"] = rng_to_json(get_rng_state() | {"torch": torch.Generator().get_state()})["torch"]


def _momentum(contents: Contents) -> None:
    contents.optimizer["state"].clear()


def _scheduler(contents: Contents) -> None:
    contents.optimizer["others"][0]["last_epoch"] = 0


def _position(contents: Contents) -> None:
    contents.state["position"]["num_batches"] = 1


def _model_without(leave_out: Callable[[Contents], None]) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        def save(*arguments: Any) -> Contents:
            contents = save_state(*arguments)
            leave_out(contents)
            return contents

        dreplica.continuation.save_state = save
        return tiny_model(num_classes)

    return build


nothing, position, generators, momentum, scheduler = map(
    _model_without, [lambda _: None, _position, _generators, _momentum, _scheduler]
)
