"""Where the time of an epoch goes."""

import time

PHASES = ("loading", "forward", "backward", "optimizer", "checks", "saving", "evaluation")
"""`loading`: waiting for batches, moved to the device. `checks`: fingerprints, waiting for the other replicas' and
snapshots. `saving`: checkpoints and progress."""


class PhaseTimer:
    """Adds up the seconds that this replica's process spends in each phase.

    A GPU works on while the process goes on: what it takes shows in the phase in which the process waits for it, which
    is that of the checks where every step is compared.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What has gone by since the last call belongs to `phase`, one of `PHASES`."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._last
        self._last = now
