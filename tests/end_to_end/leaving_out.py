"""Model factories that have checkpoints leave something out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import dreplica.training.checkpoint.manager
from dreplica.state.rng import get_rng_state
from dreplica.training.checkpoint.file_format import rng_to_json
from dreplica.training.checkpoint.replica_state import StateCopy, copy_state
from tests.fixtures import tiny_model


def _generators(copied: StateCopy) -> None:
    copied.state["rng"]["torch"] = rng_to_json(get_rng_state() | {"torch": torch.Generator().get_state()})["torch"]


def _momentum(copied: StateCopy) -> None:
    copied.optimizer["optimizers"][0]["state"].clear()


def _scheduler(copied: StateCopy) -> None:
    copied.optimizer["others"][0]["last_epoch"] = 0


def _position(copied: StateCopy) -> None:
    copied.state["position"]["num_batches"] = 1


def _model_without(leave_out: Callable[[StateCopy], None]) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        def save(*arguments: Any) -> StateCopy:
            copied = copy_state(*arguments)
            leave_out(copied)
            return copied

        dreplica.training.checkpoint.manager.copy_state = save
        return tiny_model(num_classes)

    return build


nothing, position, generators, momentum, scheduler = map(
    _model_without, [lambda _: None, _position, _generators, _momentum, _scheduler]
)
