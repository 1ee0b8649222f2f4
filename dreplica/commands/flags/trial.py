"""One start of the job in one setting of its flags: trained twice from its seed, compared at every step, then timed.

Replicas are compared with each other at every step, and the second training with the first: in one process, whose
memory is by then in another state, so that what happens to be equal on all replicas is found out, too, and one replica
is enough. Every setting has processes of its own, since cuBLAS reads its variable once, and cuDNN goes on with what it
has once picked. Only what a step takes is measured in one process, strict mode's beside it, where no such thing is in
the way: two processes that do the same differ by more than most flags cost.
"""

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.hasher import common_hasher
from dreplica.agreement.reference import Reference, ReferenceDiffers
from dreplica.agreement.trace.reader import TENSORS_NAME, TRACE_NAME
from dreplica.agreement.trace.tensor_digests import TensorRecord
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.verdict import Divergence, Verdict
from dreplica.commands.flags.refusal import describe_refusal, describe_unrun
from dreplica.config.schema import DeterminismConfig
from dreplica.data.loading.index_stream import Coordinator
from dreplica.diagnosis.decision.decide_reference import AgainstReference
from dreplica.diagnosis.tracing.refused_op import is_refusal
from dreplica.distributed.liveness import ReplicaLost
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StoppedOnRequest, StopRequest
from dreplica.environment.determinism import apply_determinism
from dreplica.errors import ExitCode, UsageError
from dreplica.run.bootstrap import Prepared, end_at_once, meet
from dreplica.run.explain import Explainer
from dreplica.run.run import AGREEMENT_LAG
from dreplica.run.setup import Concluded, Preparation
from dreplica.training.events import EpochDone, StepDone, Stopped
from dreplica.training.history import History
from dreplica.training.loop import train

Events = Generator[StepDone | EpochDone | Stopped, None, None]

FOUND_NAME, REFUSED_NAME, LOST_NAME = "found.json", "refused.json", "lost.json"
"""Files of a trial: what was found, what raised, and which replicas were lost."""

_TIMED_STEPS = 4
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Parted:
    """A difference."""

    verdict: Verdict
    between: Literal["replicas", "repetitions", "preparation"]
    """Of what; `preparation`: it ended before the first step, since replicas were not given the same, or not sound."""


class Trial:
    """One replica's part in it. The methods stand in the order in which they are called.

    Args:
        steps: how many to train each time, or fewer where the job itself ends before.
        others: sections `determinism` that are timed beside the job's own, and may follow it in one process.
        folder: where rank 0 leaves what was found, and the trace of the first training.
    """

    def __init__(
        self,
        prepared: Prepared,
        world: World,
        stop_request: StopRequest,
        steps: int,
        others: Sequence[DeterminismConfig],
        folder: Path,
    ) -> None:
        self.own, self.device = prepared.own, prepared.device.device
        self.world, self.channel, self.stop_request = world, world.channel, stop_request
        self.steps, self.folder = steps, folder
        self.timed = [self.own.determinism, *others]
        self.parts = Preparation(prepared, world)
        self.steps_done = 0

    def conduct(self) -> ExitCode:
        """The whole of it; found.json is there if and only if it got to its end."""
        try:
            return self.measure()
        except ReplicaLost:
            if self.world.monitor is not None:
                rows = [lost.as_dict() for lost in self.world.monitor.find_lost()]
                self.write_once(LOST_NAME, {"lost": rows})
                for row in rows:
                    print(f"replica {row['replica_id']} was lost: {row['reason']}", file=sys.stderr)
                end_at_once(ExitCode.FAILED)
            raise
        except RuntimeError as error:
            found = describe_unrun(error, self.world.replica_id)
            if found is not None:
                self.leave_word(found)
            raise

    def measure(self) -> ExitCode:
        """What is looked for, and how long a step takes."""
        self.world.together(lambda: None)  # another replica's input may be unusable
        seconds: list[list[float]] = []
        try:
            self.hasher, _ = common_hasher([self.device], self.channel)
            self.parts.prepare()
            self.world.together(self.check_epoch)
            self.coordinator = Coordinator(self.channel, self.parts.data_seed)
            parted = self.train_twice()
            seconds = self.time()
        except Concluded as end:
            parted = Parted(end.verdict, "preparation")
        except StoppedOnRequest:
            return ExitCode.STOPPED
        if self.world.is_coordinator:
            found = {
                "device": self.device.type,
                "steps": self.steps_done,
                "verdict": None if parted is None else parted.verdict.as_dict(),
                "between": None if parted is None else parted.between,
                "seconds_per_step": seconds,
            }
            (self.folder / FOUND_NAME).write_text(json.dumps(found), encoding="utf-8")
        return ExitCode.AGREED

    def check_epoch(self) -> None:
        """Raises UsageError if there is no step to time that an evaluation does not follow."""
        if self.num_batches < 2:
            raise UsageError(
                f"data.batch_size: {self.own.data.batch_size} makes an epoch of one batch, and an evaluation behind "
                "each step would be timed, too. Use a smaller one."
            )

    def train_twice(self) -> Parted | None:
        """What parted first; None if nothing did."""
        path, tensors = None, None
        if self.world.is_coordinator:
            path, tensors = self.folder / TRACE_NAME, TensorRecord(self.folder / TENSORS_NAME)
        with self.trace(path, tensors) as trace:
            parted = self.train_once(trace, None)
        if parted is not None:
            return parted
        del self.parts.replica, self.parts.injector  # their memory is for the next
        gc.collect()
        self.parts.replica = self.parts.build(self.parts.data.num_classes)
        self.parts.check_build(self.parts.replica)
        self.parts.injector = self.parts.arm()
        reference = None if path is None else Reference(path, self.hasher.algorithm)
        with self.trace(None) as trace:
            return self.train_once(trace, reference)

    def trace(self, path: Path | None, tensors: TensorRecord | None = None) -> TraceWriter:
        """A fresh one."""
        return TraceWriter(path, self.world.num_replicas, 0, tensors, self.hasher.algorithm)

    def train_once(self, trace: TraceWriter, reference: Reference | None) -> Parted | None:
        """Trains the replica as it was built, to the first difference, of which it finds out the cause."""
        agreement = history = None
        try:
            agreement = self.agreement(trace, reference)
            history = History(self.parts.replica, self.own.agreement.snapshot_every)
            with closing(self.training(agreement, history)) as events:
                for event in events:
                    if isinstance(event, Stopped):
                        raise StoppedOnRequest
                    if isinstance(event, StepDone) and event.step == self.steps:
                        break
            agreement.finish()
        except ReferenceDiffers as difference:
            unseeded = frozenset({"seed.model"} if self.own.seed.model is None else ())
            against = AgainstReference(difference.difference, [], [], unseeded)
            verdict = self.explainer().explain_apart(difference.verdict, against, agreement, history)
            summary = verdict.summary.replace(f"the reference {difference.difference.reference}", "the first training")
            return Parted(verdict.with_(summary=summary), "repetitions")
        except Divergence as divergence:
            return Parted(self.explainer().explain(divergence.verdict, agreement, history), "replicas")
        except RuntimeError as error:
            if agreement is not None and is_refusal(error):
                self.leave_word(describe_refusal(error, agreement.steps_done, self.num_batches, self.explainer()))
            raise
        self.steps_done = agreement.steps_done
        return None

    def agreement(self, trace: TraceWriter, reference: Reference | None) -> Agreement:
        """Compares the build, too. Raises Divergence."""
        return Agreement(
            self.parts.replica.model,
            self.parts.replica.optimizer,
            others=[self.parts.replica.scheduler, self.parts.replica.scaler],
            lag=AGREEMENT_LAG,
            trace=trace,
            reference=reference,
            channel=self.channel,
            stoppable=True,
            hasher=self.hasher,
        )

    def training(self, agreement: Agreement, history: History, whole_epochs: bool = False) -> Events:
        """The training loop, on the replica as it is."""
        own = self.own
        if whole_epochs:
            own = own.model_copy(update={"train": own.train.model_copy(update={"max_steps": None})})
        parts, stop = self.parts, self.stop_request
        return train(
            parts.replica, parts.data, self.coordinator, agreement, own, self.world, self.device, stop, history
        )

    def explainer(self) -> Explainer:
        """What it takes to run the replica's steps again."""
        parts = self.parts
        assert parts.seed is not None
        replica, data, injector = parts.replica, parts.data, parts.injector
        return Explainer(
            self.own, parts.seed, self.device, replica, data, self.coordinator, injector, self.channel, parts.facts
        )

    def leave_word(self, found: Mapping[str, Any]) -> None:
        """Of what did not run, on this replica alone: the others, rank 0 included, need not have come to it."""
        self.write_once(REFUSED_NAME, found)

    def write_once(self, name: str, data: Mapping[str, Any]) -> None:
        """Write a JSON file into the folder, unless another replica has written it."""
        path = self.folder / name
        if not path.exists():  # the first failure is the most informative
            partial = path.with_name(f".{name}.{self.world.replica_id}")
            partial.write_text(json.dumps(data), encoding="utf-8")
            partial.replace(path)  # atomic, since this process may be ended as soon as another has failed

    def time(self) -> list[list[float]]:
        """Seconds per step without checks, the slowest replica's: of each section in `timed`, one for each round.

        In alternating rounds, so that a machine whose speed drifts is as slow for all; one more does not count.
        """
        self.parts.replica.scheduler_per = "epoch"  # none is gone through: a schedule may be over by now
        steps = min(_TIMED_STEPS, self.num_batches - 1)
        rounds = max(_LEAST_ROUNDS, -(-self.steps // steps))
        seconds: list[list[float]] = [[] for _ in self.timed]
        for number in range(rounds + 1):
            order = range(len(self.timed))
            for index in order if number % 2 else reversed(order):
                if any(self.channel.gather(bool(self.stop_request))):
                    raise StoppedOnRequest
                apply_determinism(self.timed[index])
                slowest = max(self.channel.gather(self.time_steps(steps)))
                if number > 0:
                    seconds[index].append(slowest)
        return seconds

    def time_steps(self, steps: int) -> float:
        """Seconds per step over `steps` steps of an epoch, after a first one, which starts the loader."""
        replica = self.parts.replica
        agreement = Agreement(replica.model, replica.optimizer, every=0, channel=self.channel, hasher=self.hasher)
        with closing(self.training(agreement, History(replica, 0), whole_epochs=True)) as events:
            next(events)
            self.synchronize()
            started = time.perf_counter()
            for _ in itertools.islice(events, steps):
                pass
            self.synchronize()
            return (time.perf_counter() - started) / steps

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @property
    def num_batches(self) -> int:
        """In an epoch."""
        return -(-len(self.parts.data.train) // self.own.data.batch_size)  # type: ignore[arg-type]


def work(argv: Sequence[str]) -> ExitCode:
    """One worker."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--others", type=json.loads, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    known, settings = parser.parse_known_args(argv)
    others = [DeterminismConfig.model_validate(section) for section in known.others]
    return meet(
        settings,
        lambda prepared, world, stop: Trial(prepared, world, stop, known.steps, others, known.folder).conduct(),
    )
