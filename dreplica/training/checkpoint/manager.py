"""Saving of a run, and resuming from its newest valid checkpoint."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dreplica.config.schema import CheckpointConfig
from dreplica.distributed.process_group import World
from dreplica.errors import SharedUsageError
from dreplica.state.progress import Position
from dreplica.state.replica import Replica
from dreplica.training.checkpoint.async_writer import Saver
from dreplica.training.checkpoint.file_format import (
    CheckpointError,
    checkpoint_name,
    list_checkpoints,
    parse,
    read_files,
    remove_leftovers,
)
from dreplica.training.checkpoint.replica_state import attributes_as_built, copy_state, restore_state

log = logging.getLogger(__name__)

_FOLDER = "checkpoints"
_Failure = tuple[str, str]
"""Code and text of a `CheckpointError`."""


@dataclass(frozen=True)
class SkippedCheckpoint:
    """A checkpoint that could not be restored."""

    name: str
    """Name of its folder, such as `step_000005`."""
    replica: int
    """The first replica that could not restore it."""
    code: str
    """Code of the `CheckpointError`."""
    reason: str
    """Text of the `CheckpointError`."""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason} (replica {self.replica})"


@dataclass(frozen=True)
class Start:
    """The position at which a run begins or resumes."""

    position: Position = field(default_factory=Position)
    """Position in the data."""
    step: int = 0
    """Number of steps already taken."""
    data_seed: int | None = None
    """Seed of the order of samples. None if it has not been drawn yet."""
    steps_checked: int = 0
    """Number of steps already compared."""
    num_trace_lines: int = 0
    """Number of lines in `trace.jsonl` at the time of the checkpoint."""
    skipped: tuple[SkippedCheckpoint, ...] = ()
    """Newer checkpoints that could not be restored."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        config: The config's section `checkpoint`.
        world: The replicas of the run.
        replica: This replica.
        folder: The run folder.
        shared: True if all replicas have the same state. Rank 0 then writes one copy, and sends it to all replicas of a
            resumed run, whose number may differ. Otherwise each replica writes and reads its own copy.

    Note:
        Every method is collective: call it on every rank.
    """

    def __init__(self, config: CheckpointConfig, world: World, replica: Replica, folder: Path, shared: bool) -> None:
        self._world, self._replica, self._shared = world, replica, shared
        self._folder = folder / _FOLDER
        self._part = None if shared else f"replica_{world.replica_id}"
        self._as_built = attributes_as_built(replica)
        records = [folder / "trace.jsonl", folder / "metrics.jsonl"]
        self._saver = Saver(self._folder, config.keep, self._part, records)
        self._saved_step: int | None = None

    def restore(self) -> Start:
        """Restore the newest valid checkpoint into the replica.

        Returns:
            Where the run resumes, with the newer checkpoints that were skipped. The beginning if there is no
            checkpoint.

        Raises:
            SharedUsageError: There are checkpoints, but none can be restored.
        """
        if self._world.is_coordinator:
            remove_leftovers(self._folder)
        names = self._world.channel.gather([path.name for path in list_checkpoints(self._folder)])[0]
        skipped: list[SkippedCheckpoint] = []
        for name in names:
            state, failure = self._restore(self._folder / name)
            failures = [
                SkippedCheckpoint(name, rank, *each)
                for rank, each in enumerate(self._world.channel.gather(failure))
                if each is not None
            ]
            if not failures:
                assert state is not None
                log.info("resuming from %s", self._folder / name)
                self._saved_step = state["step"]
                return Start(
                    Position(**state["position"]),
                    state["step"],
                    state["data_seed"],
                    state["steps_checked"],
                    state["num_trace_lines"],
                    tuple(skipped),
                )
            self._saver.unusable.add(name)
            skipped.append(failures[0])
            if self._world.is_coordinator:
                log.warning("run.resume: skipped %s", skipped[-1])
        if names:
            raise SharedUsageError(
                f"run.resume: no checkpoint in {str(self._folder)!r} can be restored: "
                f"{'; '.join(map(str, skipped))}. Start over with --run.resume never.",
                code="no-usable-checkpoint",
                folder=str(self._folder),
                skipped=[asdict(each) for each in skipped],
            )
        return Start()

    def _restore(self, place: Path) -> tuple[Mapping[str, Any] | None, _Failure | None]:
        """Restore a checkpoint and return its `state.json`, or the failure."""
        files: Mapping[str, bytes] | None = None
        failure = None
        try:
            if self._world.is_coordinator or not self._shared:
                files = read_files(place if self._part is None else place / self._part)
        except CheckpointError as error:
            failure = error.code, str(error)
        if self._shared:
            files, failure = self._send_to_all(files, failure)
        if files is None:
            return None, failure
        try:
            contents = parse(files)
            restore_state(self._replica, contents, self._as_built)
        except CheckpointError as error:
            return None, (error.code, str(error))
        return contents.state, None

    def _send_to_all(
        self, files: Mapping[str, bytes] | None, failure: _Failure | None
    ) -> tuple[Mapping[str, bytes] | None, _Failure | None]:
        """Send rank 0's files, or its failure to read them, to every replica."""
        own = None if files is None else {name: len(content) for name, content in files.items()}
        sizes, failure = self._world.channel.gather((own, failure))[0]
        if sizes is None:
            return None, failure
        received = {}
        for name, size in sizes.items():
            content = bytearray(size) if files is None else bytearray(files[name])
            if size:
                self._world.channel.broadcast(torch.frombuffer(content, dtype=torch.uint8))
            received[name] = bytes(content)
        return received, None

    def save(self, position: Position, data_seed: int, steps_checked: int, num_trace_lines: int) -> None:
        """Copy the replica's state, and write it while training continues.

        Args:
            position: Position in the data to resume from.
            data_seed: Seed of the order of samples.
            steps_checked: Number of steps compared so far.
            num_trace_lines: Number of lines in `trace.jsonl`.
        """
        if self._replica.steps_done == self._saved_step:
            return
        before, self._saved_step = self._saved_step, self._replica.steps_done
        if not self._shared and before is not None and not self.newest_is_there():
            self._saver.unusable.add(checkpoint_name(before))  # a part of it is missing: older ones must be kept
        if self._world.is_coordinator or not self._shared:
            run = {"data_seed": data_seed, "steps_checked": steps_checked, "num_trace_lines": num_trace_lines}
            self._saver.save(copy_state(self._replica, position, run, self._as_built))

    def newest_is_there(self) -> bool:
        """Wait for the newest checkpoint, and return True if every replica's part has been written."""
        self._saver.wait()
        return all(self._world.channel.gather(not self._saver.newest_failed))

    def finish(self) -> list[str]:
        """Wait until all is written, and return a line for each failure on any replica."""
        complete = self.newest_is_there()
        failures = [line for lines in self._world.channel.gather(self._saver.failures) for line in lines]
        if complete and (self._world.is_coordinator or not self._shared):
            self._saver.prune()
        return failures
