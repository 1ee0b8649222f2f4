"""Three loops, and the time that each of them takes for a step.

The loops take the same steps in alternating rounds: (a) a bare PyTorch loop, (b) this trainer without checks, (c) this
trainer with every stage compared at every step. Ratios are taken within a round, so that drift in the machine's speed
affects both sides alike. Quote the median over the rounds with its confidence interval: on a shared machine, hundreds
of steps may not distinguish a ratio of 1.01 from one of 1.02. The time that (c) spends in its checks, waiting for other
replicas included, is also measured alone, which is more precise.

The snapshot of (c) is taken once and kept, so that the three loops run with the same heap. Memory freed by one round
would save the next one its page faults (measured: 2 % of a step). The cost of a snapshot is timed separately.
"""

import itertools
import statistics
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from dreplica.commands.bench.results import LOOPS, Measured, Memory
from dreplica.data.loading.loader import normalize
from dreplica.data.samples import at_epoch, normalization, uncached
from dreplica.distributed.signals import StoppedOnRequest
from dreplica.errors import UsageError
from dreplica.run.session import Session
from dreplica.state.snapshot import take_snapshot
from dreplica.training.evaluate import Tally
from dreplica.training.events import StepDone
from dreplica.training.history import History
from dreplica.training.step import forward


class Bench:
    """The three loops, on one replica. All replicas run them together.

    Args:
        session: The session of this replica. Bench loads its data and builds its model.
        steps: Number of timed steps of each loop in a round, or None for 4, or as many as fit into an epoch.

    Attributes:
        steps: Number of timed steps of each loop in a round.
        bytes_per_step: Bytes of tensors that this replica hashes for each step.
    """

    def __init__(self, session: Session, steps: int | None) -> None:
        self.session, self.config, self.world, self.device = session, session.own, session.world, session.device
        session.choose_hasher()
        session.load()
        session.build()
        session.open_index_stream(seed=0)
        self.history = History(session.replica, self.config.agreement.snapshot_every)
        self.bytes_per_step = 0
        self.steps = min(4, max(1, session.num_batches - 1)) if steps is None else steps
        self.world.together(lambda: _check_steps(self.steps, session.num_batches))

    def measure(self, rounds: int) -> Measured:
        """Time every loop in every round, after a warm-up round.

        Raises:
            StoppedOnRequest: Some replica was asked to stop.

        Note:
            Collective: call on every rank.
        """
        seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
        shares = []
        peaks = dict.fromkeys(LOOPS, 0)
        orders = itertools.cycle(itertools.permutations(LOOPS))
        for number, order in zip(range(rounds + 1), orders, strict=False):
            for name in order:
                # The gather also makes all replicas begin together.
                if any(self.world.channel.gather(bool(self.session.stop_request))):
                    raise StoppedOnRequest
                if self.on_gpu:
                    torch.cuda.reset_peak_memory_stats(self.device)
                own, in_checks = self.time_steps(self.loop(name, self.steps + 1), self.steps)
                if self.on_gpu:
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(self.device))
                rows = self.world.channel.gather((own, in_checks / (own - in_checks)))
                slowest, share = map(max, zip(*rows, strict=True))
                if number > 0:
                    seconds[name].append(slowest)
                if number > 0 and name == "c":
                    shares.append(share)
        rows = self.world.channel.gather((self.time_snapshot(), peaks["c"] - peaks["b"], self.snapshot_memory()))
        snapshot_seconds, checks, snapshot = map(max, zip(*rows, strict=True))
        memory = Memory(int(checks), int(snapshot)) if self.on_gpu else None
        return Measured(seconds, self.bytes_per_step, float(snapshot_seconds), shares, memory)

    def snapshot_memory(self) -> int:
        """Return the GPU memory of a snapshot in bytes, 0 on the CPU."""
        if not self.on_gpu:
            return 0
        before = torch.cuda.memory_allocated(self.device)
        kept = take_snapshot(self.session.replica)
        taken = torch.cuda.memory_allocated(self.device) - before
        del kept
        return taken

    def time_snapshot(self) -> float:
        """Return the median seconds of five snapshots."""
        seconds = []
        for _ in range(5):
            self.session.synchronize()
            started = time.perf_counter()
            take_snapshot(self.session.replica)
            self.session.synchronize()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    def time_steps(self, loop: Iterator[float], steps: int) -> tuple[float, float]:
        """Return seconds per step and seconds in checks per step, after a first step that starts the loader."""
        checks_before = next(loop)
        self.session.synchronize()
        started = time.perf_counter()
        checks = max(itertools.islice(loop, steps))
        self.session.synchronize()
        seconds = (time.perf_counter() - started) / steps
        for _ in loop:
            pass
        return seconds, (checks - checks_before) / steps

    def loop(self, name: str, steps: int) -> Iterator[float]:
        """Run loop a, b or c, and yield the seconds in checks so far after each of `steps` steps."""
        return self.bare(steps) if name == "a" else self.trainer(steps, every=int(name == "c"))

    def bare(self, steps: int) -> Iterator[float]:
        """Run a plain PyTorch loop."""
        replica, dataset, data = self.session.replica, self.session.data.train, self.config.data
        loader = DataLoader(
            at_epoch(uncached(dataset), 1),
            data.batch_size,
            shuffle=True,
            num_workers=data.num_workers,
            pin_memory=self.on_gpu,
        )
        memory_format = torch.channels_last if self.config.model.channels_last else torch.preserve_format
        replica.model.train()
        tally = Tally.zero(self.device)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        for inputs, labels in itertools.islice(batches, steps):
            inputs = inputs.to(self.device, non_blocking=True, memory_format=memory_format)
            labels = labels.to(self.device, non_blocking=True)
            if inputs.dtype is torch.uint8:
                inputs = normalize(inputs, *normalization(dataset))
            replica.optimizer.zero_grad()
            loss, logits = forward(replica, inputs, labels, self.config.train)
            if replica.scaler is None:
                loss.backward()
                replica.optimizer.step()
            else:
                replica.scaler.scale(loss).backward()
                replica.scaler.step(replica.optimizer)
                replica.scaler.update()
            tally.add(loss, logits, labels)
            yield 0.0

    def trainer(self, steps: int, every: int) -> Iterator[float]:
        """Run the training loop, compared every `every` steps."""
        agreement = self.session.compare_for_timing(every)
        history = self.history if every else History(self.session.replica, every=0)
        events = self.session.steps_to_time(agreement, history)
        done = (event for event in events if isinstance(event, StepDone))
        for event in itertools.islice(done, steps):
            yield event.seconds["checks"]
        events.close()
        agreement.finish()
        self.bytes_per_step = max(self.bytes_per_step, agreement.bytes_per_step)

    @property
    def on_gpu(self) -> bool:
        """True if the device is a GPU, whose kernels run asynchronously."""
        return self.device.type == "cuda"


def _check_steps(steps: int, num_batches: int) -> None:
    if steps >= num_batches:
        raise UsageError(
            f"--steps: {steps} timed steps and one before them do not fit into an epoch of {num_batches} batches, and "
            f"an evaluation in between would be timed too. Use --steps {max(1, num_batches - 1)} or a smaller "
            "--data.batch_size."
        )
