"""Models for jobs under test, slow enough to be interrupted."""

import os
import time

from torch import nn

from tests.fixtures import tiny_model

NUM_EPOCHS = 40
"""Epochs of 5 steps each: over a minute until the job is requeued, then one or two seconds."""
_STEP_SECONDS = 0.3


def until_requeued(num_classes: int) -> nn.Module:
    """Return `tiny_model`, slowed down until Slurm has requeued the job.

    The results do not change.
    """
    model = tiny_model(num_classes)
    if "SLURM_RESTART_COUNT" not in os.environ:
        model.register_forward_pre_hook(lambda module, _: time.sleep(_STEP_SECONDS * module.training))
    return model
