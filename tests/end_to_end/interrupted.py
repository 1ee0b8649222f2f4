"""Models that jobs under test name in their configs, and that are interrupted."""

import os
import signal
from pathlib import Path

from torch import Tensor, nn

from tests import fixtures


class KilledOnce(nn.Module):
    """On the replica that the environment names, as `KILL=replica:step:mark`, killed in mid-step, the first time."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = fixtures.tiny_model(num_classes)
        self.calls = 0
        """Kept in checkpoints, as any number of a module's is."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        self.calls += self.training
        replica, step, mark = os.environ.get("KILL", "9:9:/").split(":")
        if self.training and (os.environ["RANK"], self.calls) == (replica, int(step)) and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.body(inputs)
