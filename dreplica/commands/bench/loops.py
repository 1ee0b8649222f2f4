"""Three loops, and the time that each of them takes for a step.

They take the same steps in alternating rounds: (a) a bare PyTorch loop, (b) this trainer without checks, (c)
this trainer with every stage compared at every step. Ratios are taken within a round, so that a machine whose speed
drifts moves both sides alike; the median over the rounds is what to quote, with its confidence interval: on a machine
that is shared with others, hundreds of steps may not tell a ratio of 1.01 from one of 1.02. What the checks of (c) keep
the process busy for, waiting for other replicas included, is timed by itself, too, which tells.

The snapshot that (c) keeps is taken once and held throughout, so that the three loops find the process's heap in the
same state: memory that a former round had freed would spare the next one its page faults (measured: 2 % of a step).
What a snapshot costs is timed by itself.
"""

import itertools
import statistics
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from dreplica.agreement.agreement import Agreement
from dreplica.commands.bench.results import LOOPS, Measured, Memory
from dreplica.config.schema import RunConfig
from dreplica.data.datasets import prepare_data
from dreplica.data.loading.index_stream import Coordinator
from dreplica.data.loading.loader import normalize
from dreplica.data.samples import DataSets, at_epoch, by_itself, normalization
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StoppedOnRequest, StopRequest
from dreplica.errors import UsageError
from dreplica.replica.build import build_replica
from dreplica.run.run import AGREEMENT_LAG
from dreplica.state.replica import Replica
from dreplica.state.rng import model_seed, seed_generators
from dreplica.state.snapshot import take_snapshot
from dreplica.training.evaluate import Tally
from dreplica.training.events import StepDone
from dreplica.training.history import History
from dreplica.training.loop import train
from dreplica.training.step import forward, make_scaler


class Bench:
    """The three loops on one replica of one process; all replicas go through them together."""

    def __init__(self, config: RunConfig, world: World, device: torch.device, steps: int | None) -> None:
        train = config.train.model_copy(update={"max_steps": None})
        self.config, self.world, self.device = config.model_copy(update={"train": train}), world, device
        self.data: DataSets = prepare_data(config.data, config.seed.augment, world, device)
        self.coordinator = Coordinator(world.channel, seed=0)
        seed_generators(model_seed(config.seed, world.replica_id))
        self.replica: Replica = world.together(lambda: build_replica(config, self.data.num_classes, device))
        self.replica.scaler = make_scaler(config.train, device)
        self.replica.scheduler_per = "epoch"  # none is gone through: a schedule may be over before the rounds are
        self.history = History(self.replica, config.agreement.snapshot_every)
        self.bytes_per_step = 0
        num_batches = -(-len(self.data.train) // config.data.batch_size)  # type: ignore[arg-type]
        self.steps = min(4, max(1, num_batches - 1)) if steps is None else steps
        world.together(lambda: _check_steps(self.steps, num_batches))

    def measure(self, rounds: int, told: StopRequest | None = None) -> Measured:
        """Times every loop in every round, after one round that does not count. A collective.

        Raises StoppedOnRequest once `told` is set on any replica.
        """
        seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
        shares = []
        peaks = dict.fromkeys(LOOPS, 0)
        orders = itertools.cycle(itertools.permutations(LOOPS))
        for number, order in zip(range(rounds + 1), orders, strict=False):
            for name in order:
                if any(self.world.channel.gather(bool(told))):  # and all begin together
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
        """Bytes of the GPU's memory that a snapshot takes; 0 on the CPU."""
        if not self.on_gpu:
            return 0
        before = torch.cuda.memory_allocated(self.device)
        kept = take_snapshot(self.replica)
        taken = torch.cuda.memory_allocated(self.device) - before
        del kept
        return taken

    def time_snapshot(self) -> float:
        """Seconds for one snapshot, as every `agreement.snapshot_every` steps; median of five."""
        seconds = []
        for _ in range(5):
            self.synchronize()
            started = time.perf_counter()
            take_snapshot(self.replica)
            self.synchronize()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    def time_steps(self, loop: Iterator[float], steps: int) -> tuple[float, float]:
        """Seconds per step over `steps` steps, after a first one that starts the loader; and those in checks."""
        checks_before = next(loop)
        self.synchronize()
        started = time.perf_counter()
        checks = max(itertools.islice(loop, steps))
        self.synchronize()
        seconds = (time.perf_counter() - started) / steps
        for _ in loop:
            pass
        return seconds, (checks - checks_before) / steps

    def loop(self, name: str, steps: int) -> Iterator[float]:
        """Loop a, b or c; yields the seconds in checks so far after each of `steps` steps, then ends tidily."""
        return self.bare(steps) if name == "a" else self.trainer(steps, every=int(name == "c"))

    def bare(self, steps: int) -> Iterator[float]:
        """What one would write by hand."""
        replica, data = self.replica, self.config.data
        loader = DataLoader(
            at_epoch(by_itself(self.data.train), 1),
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
                inputs = normalize(inputs, *normalization(self.data.train))
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
        """The training loop itself."""
        agreement = Agreement(
            self.replica.model,
            self.replica.optimizer,
            others=[self.replica.scheduler, self.replica.scaler],
            every=every,
            on_divergence="continue",  # replicas from distinct seeds are compared in full here, too
            lag=AGREEMENT_LAG,
            channel=self.world.channel,
        )
        history = self.history if every else History(self.replica, every=0)
        epochs = train(
            self.replica,
            self.data,
            self.coordinator,
            agreement,
            self.config,
            self.world,
            self.device,
            StopRequest(),  # a round is taken to its end
            history,
        )
        done = (event for event in epochs if isinstance(event, StepDone))
        for event in itertools.islice(done, steps):
            yield event.seconds["checks"]
        epochs.close()
        agreement.finish()
        self.bytes_per_step = max(self.bytes_per_step, agreement.bytes_per_step)

    @property
    def on_gpu(self) -> bool:
        """Whether kernels run behind the program's back."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()


def _check_steps(steps: int, num_batches: int) -> None:
    if steps >= num_batches:
        raise UsageError(
            f"--steps: {steps} timed steps and one before them do not fit into an epoch of {num_batches} batches, and "
            f"an evaluation in between would be timed too. Use --steps {max(1, num_batches - 1)} or a smaller "
            "--data.batch_size."
        )
