"""Models that jobs under test name in their configs, slow enough to be interrupted."""

import os
import time

from torch import nn

from tests.fixtures import tiny_model

NUM_EPOCHS = 40
"""Of 5 steps: a minute and more until the job has been requeued, a second or two from then on."""
_STEP_SECONDS = 0.3


def until_requeued(num_classes: int) -> nn.Module:
    """`tiny_model`, slowed down until Slurm has requeued the job; what it computes is the same."""
    model = tiny_model(num_classes)
    if "SLURM_RESTART_COUNT" not in os.environ:
        model.register_forward_pre_hook(lambda module, _: time.sleep(_STEP_SECONDS * module.training))
    return model
