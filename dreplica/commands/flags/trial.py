"""One start of the job with one setting of its flags: train twice from the seed, compare every step, then time steps.

Replicas are compared with each other at every step, and the second training with the first one. Both trainings run in
one process, whose memory has other contents the second time. This detects values that happen to be equal on all
replicas, and one replica is enough. Each setting gets its own processes, because cuBLAS reads its environment variable
once and cuDNN keeps the algorithms that it has picked. Only step times are measured in one process together with strict
mode, where these two do not matter: two processes that do the same work differ by more than most flags cost.
"""

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dreplica.agreement.reference import Reference, ReferenceDiffers
from dreplica.agreement.trace.reader import TENSORS_NAME, TRACE_NAME
from dreplica.agreement.trace.tensor_digests import TensorRecord
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.commands.flags.refusal import describe_refusal, describe_unrun
from dreplica.config.schema import DeterminismConfig
from dreplica.diagnosis.decision.decide_reference import AgainstReference
from dreplica.diagnosis.tracing.refused_op import is_refusal
from dreplica.distributed.liveness.lost import ReplicaLost
from dreplica.distributed.signals import StoppedOnRequest
from dreplica.environment.determinism import apply_determinism
from dreplica.errors import ExitCode, UsageError
from dreplica.run.bootstrap import exit_now, start_replica
from dreplica.run.session import Concluded, Session
from dreplica.training.events import StepDone, Stopped
from dreplica.training.history import History

FOUND_NAME = "found.json"
"""The result of a start that ran to its end."""
REFUSED_NAME = "refused.json"
"""What strict mode, or memory, did not let run."""
LOST_NAME = "lost.json"
"""The replicas that were lost."""

_TIMED_STEPS = 4
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Difference:
    """A difference between two trainings, or a run that ended before its first step."""

    verdict: Verdict
    """The verdict with the cause."""
    between: Literal["replicas", "repetitions", "preparation"]
    """What differs. `preparation`: replicas got different inputs, or one is not wired correctly."""


class Trial:
    """One start of the job, on one replica.

    The methods are defined in the order in which they are called.

    Args:
        session: The session of this replica.
        steps: Number of steps of each training. The job itself may end earlier.
        others: Further `determinism` sections to time. They must be able to follow the job's own in one process.
        folder: Where rank 0 writes the result and the trace of the first training.
    """

    def __init__(self, session: Session, steps: int, others: Sequence[DeterminismConfig], folder: Path) -> None:
        self.session, self.steps, self.folder = session, steps, folder
        self.world, self.channel, self.own = session.world, session.channel, session.own
        self.timed = [self.own.determinism, *others]
        self.steps_done = 0

    def conduct(self) -> ExitCode:
        """Run the trial. found.json is written if and only if it runs to its end."""
        try:
            return self.measure()
        except ReplicaLost:
            if self.world.monitor is not None:
                rows = [lost.as_dict() for lost in self.world.monitor.find_lost()]
                self.write_first(LOST_NAME, {"lost": rows})
                for row in rows:
                    print(f"replica {row['replica_id']} was lost: {row['reason']}", file=sys.stderr)
                exit_now(ExitCode.FAILED)
            raise
        except RuntimeError as error:
            found = describe_unrun(error, self.world.replica_id)
            if found is not None:
                self.write_first(REFUSED_NAME, found)
            raise

    def measure(self) -> ExitCode:
        """Look for a difference, time the steps and write the result."""
        seconds: list[list[float]] = []
        session = self.session
        try:
            session.choose_hasher()
            session.prepare()
            self.world.together(self.check_epoch)
            session.open_index_stream(session.data_seed)
            difference = self.train_twice()
            seconds = self.time()
        except Concluded as end:
            difference = Difference(end.verdict, "preparation")
        except StoppedOnRequest:
            return ExitCode.STOPPED
        if self.world.is_coordinator:
            found = {
                "device": session.device.type,
                "steps": self.steps_done,
                "verdict": None if difference is None else difference.verdict.as_dict(),
                "between": None if difference is None else difference.between,
                "seconds_per_step": seconds,
            }
            (self.folder / FOUND_NAME).write_text(json.dumps(found), encoding="utf-8")
        return ExitCode.AGREED

    def check_epoch(self) -> None:
        """Raise UsageError if an evaluation follows each step, and would be timed with it."""
        if self.session.num_batches < 2:
            size = self.own.data.batch_size
            raise UsageError(
                f"data.batch_size: expected at least two batches per epoch, got one with batch_size {size}. "
                "Use a smaller batch_size, so that steps can be timed without an evaluation.",
                code="one-batch",
                batch_size=size,
            )

    def train_twice(self) -> Difference | None:
        """Train, build again and train again. Return the first difference, or None."""
        path, tensors = None, None
        if self.world.is_coordinator:
            path, tensors = self.folder / TRACE_NAME, TensorRecord(self.folder / TENSORS_NAME)
        with self.trace(path, tensors) as trace:
            difference = self.train_once(trace, None)
        if difference is not None:
            return difference
        del self.session.replica  # free its memory for the next build
        self.session.injector = None
        gc.collect()
        self.session.rebuild()
        reference = None if path is None else Reference(path, self.session.hasher.algorithm)
        with self.trace(None) as trace:
            return self.train_once(trace, reference)

    def trace(self, path: Path | None, tensors: TensorRecord | None = None) -> TraceWriter:
        """Open a new trace."""
        return TraceWriter(path, self.world.num_replicas, 0, tensors, self.session.hasher.algorithm)

    def train_once(self, trace: TraceWriter, reference: Reference | None) -> Difference | None:
        """Train the built replica up to the first difference, and diagnose it.

        Args:
            trace: The trace to record.
            reference: The trace of the first training to compare with, on rank 0.

        Returns:
            The difference, or None if there is none.
        """
        session = self.session
        agreement = history = None
        try:
            agreement = session.compare(trace, reference)
            history = session.keep_history()
            with closing(session.steps(agreement, history)) as events:
                for event in events:
                    if isinstance(event, Stopped):
                        raise StoppedOnRequest
                    if isinstance(event, StepDone) and event.step == self.steps:
                        break
            agreement.finish()
        except ReferenceDiffers as difference:
            place = difference.difference.place
            found = difference.verdict.with_(summary=f"diverged from the first training {place.when}: {place.where}")
            unseeded = frozenset({"seed.model"} if self.own.seed.model is None else ())
            against = AgainstReference(difference.difference, [], [], unseeded)
            verdict = session.explainer().explain_reference(found, against, agreement, history)
            return Difference(verdict, "repetitions")
        except Divergence as divergence:
            return Difference(session.explainer().explain(divergence.verdict, agreement, history), "replicas")
        except RuntimeError as error:
            if agreement is not None and is_refusal(error):
                explainer = session.explainer()
                refusal = describe_refusal(error, agreement.steps_done, session.num_batches, explainer)
                self.write_first(REFUSED_NAME, refusal)
            raise
        self.steps_done = agreement.steps_done
        return None

    def write_first(self, name: str, found: Any) -> None:
        """Write a JSON file from this replica alone, unless another one has.

        The other replicas, rank 0 included, need not run into the same error.
        """
        path = self.folder / name
        if not path.exists():  # the first record says most
            written = path.with_name(f".{name}.{self.world.replica_id}")
            written.write_text(json.dumps(found), encoding="utf-8")
            written.replace(path)  # atomic: this process may be terminated as soon as another one has failed

    def time(self) -> list[list[float]]:
        """Return seconds per step without checks, of the slowest replica: per section in `timed`, one per round.

        Rounds alternate between the sections, so that drift in the machine's speed affects all of them alike. The first
        round is a warm-up.
        """
        steps = min(_TIMED_STEPS, self.session.num_batches - 1)
        rounds = max(_LEAST_ROUNDS, -(-self.steps // steps))
        seconds: list[list[float]] = [[] for _ in self.timed]
        for number in range(rounds + 1):
            order = range(len(self.timed))
            for index in order if number % 2 else reversed(order):
                if any(self.channel.gather(bool(self.session.stop_request))):
                    raise StoppedOnRequest
                apply_determinism(self.timed[index])
                slowest = max(self.channel.gather(self.time_steps(steps)))
                if number > 0:
                    seconds[index].append(slowest)
        return seconds

    def time_steps(self, steps: int) -> float:
        """Return seconds per step over `steps` steps of an epoch, after a first one, which starts the loader."""
        session = self.session
        agreement, history = session.compare_for_timing(every=0), History(session.replica, 0)
        with closing(session.steps_to_time(agreement, history)) as events:
            next(events)
            session.synchronize()
            started = time.perf_counter()
            for _ in itertools.islice(events, steps):
                pass
            session.synchronize()
            return (time.perf_counter() - started) / steps


def work(argv: Sequence[str]) -> ExitCode:
    """Run one replica of a start of `dreplica flags`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--others", type=json.loads, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    known, settings = parser.parse_known_args(argv)
    others = [DeterminismConfig.model_validate(section) for section in known.others]
    return start_replica(
        settings,
        lambda prepared, world, stop: Trial(
            Session(prepared, world, stop), known.steps, others, known.folder
        ).conduct(),
    )
