"""A session: what training, `bench`, `flags` and `burn-in` share to prepare, build and run the steps of one replica."""

import logging
import math
from collections.abc import Generator
from typing import Literal

import torch

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.hasher import Hasher, common_hasher, describe_fallback
from dreplica.agreement.reference import Reference
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.verdict import Verdict, split_into_groups, suspects_of
from dreplica.agreement.wiring.fault import WiringError
from dreplica.config.components import check_schedule
from dreplica.data.datasets import prepare_data
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.data.samples import DataSets
from dreplica.diagnosis.decision import conclude as diagnosis
from dreplica.diagnosis.decision.facts import BuildFacts, RunFacts
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.environment.manifest import collect_manifest, compare_manifests, compare_values, gather_manifests
from dreplica.replica.build import broadcast_state, build_replica, weights_digest
from dreplica.replica.wiring import check_wiring
from dreplica.run.bootstrap import Prepared
from dreplica.run.explain import Explainer
from dreplica.state.progress import Position
from dreplica.state.replica import Replica
from dreplica.state.rng import fresh_seed, model_seed, seed_generators, shares_model_seed
from dreplica.state.stages import rng_stage
from dreplica.training.events import EpochDone, StepDone, Stopped
from dreplica.training.fault_injection import FaultyCoordinator, Injector
from dreplica.training.history import History
from dreplica.training.loop import train
from dreplica.training.preflight import check_image_size, check_smallest_part
from dreplica.training.step import check_criterion_weighs, make_scaler

log = logging.getLogger(__name__)

AGREEMENT_LAG: Literal[1] = 1
"""Each step's comparison is completed during the next step, so that replicas do not wait for each other."""

Events = Generator[StepDone | EpochDone | Stopped, None, None]


class Concluded(Exception):
    """A run that ends with a verdict which needs no further diagnosis."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.summary)
        self.verdict = verdict


class Session:
    """One replica's data, model and comparison, from the config to its training steps.

    Call the methods in the order in which they are defined, on every replica. A caller may skip those that it does not
    need: `bench` only loads and builds, training and `flags` call `prepare`.

    Args:
        prepared: The config and the device of this replica.
        world: All replicas.
        stop_request: Set when this replica is asked to stop.

    Attributes:
        config: The config, the same on all replicas.
        own: The config with this replica's overrides.
        device: The device of this replica.
        expect: Whether replicas must be `identical` or are `independent`.
        facts: The observations about the run that verdicts are concluded from.
        seed: The seed of this replica's build.
        skipped: Samples left out because they cannot be loaded.
        warnings: Warnings for the report.
        hasher: Computes fingerprints, the same way on all replicas.
        data: The training and validation sets.
        data_seed: The seed of the order of samples.
        replica: The model, optimizer, scheduler, scaler and criterion of this replica.
        injector: The faults to inject. None until `arm` is called.
        coordinator: Draws the index batches on rank 0 and sends them to all replicas.
    """

    hasher: Hasher
    data: DataSets
    data_seed: int
    replica: Replica
    coordinator: IndexSampler

    def __init__(self, prepared: Prepared, world: World, stop_request: StopRequest) -> None:
        self.config, self.own, self._bound = prepared.config, prepared.own, prepared.device
        self.device = prepared.device.device
        self.world, self.channel, self.stop_request = world, world.channel, stop_request
        shared = shares_model_seed(self.config.seed, world.num_replicas)
        expect = self.config.agreement.expect
        self.expect: Literal["identical", "independent"]
        self.expect = ("identical" if shared else "independent") if expect == "auto" else expect
        self.seed = model_seed(self.config.seed, world.replica_id)
        self.skipped: list[str] = []
        self.warnings = list(prepared.warnings)
        self.injector: Injector | None = None
        self.facts = RunFacts(
            num_replicas=world.num_replicas,
            seeded=self.config.seed.model is not None,
            shared_seed=shared,
            overrides=self.config.declared_differences(),
        )

    # ---- Prepare and build

    def choose_hasher(self) -> None:
        """Hash on the device where every replica can, and on the CPU otherwise.

        All replicas then compute the same kind of digest.
        """
        self.hasher, algorithms = common_hasher([self.device], self.channel)
        if len(set(algorithms)) > 1:
            self.warnings.append(describe_fallback(algorithms))

    def prepare(self) -> None:
        """Compare configs and environments, load the data, and build and check the replica.

        Raises:
            Concluded: Replicas got different configs or environments, or a replica is not wired correctly.
            SharedUsageError: The config or the data is unusable on some replica.
        """
        self.compare_configs()
        self.load()
        self.preflight()
        self.build()
        # Compare again: a user factory may have changed numerics flags, and the pretrained weights are known now.
        self.preflight(weights_digest(self.own))
        self.check_build()
        self.arm()

    def rebuild(self) -> None:
        """Build and check the replica again, from the same seed."""
        self.build()
        self.check_build()
        self.arm()

    def compare_configs(self) -> None:
        """Raise Concluded (`config-differs`) unless all replicas got the same config."""
        configs = self.channel.gather(self.config.model_dump(mode="json"))
        differences = compare_values(configs)
        if differences:
            groups = split_into_groups([repr(config).encode() for config in configs])
            raise Concluded(diagnosis.config_differs(differences, groups, suspects_of(groups)))

    def load(self) -> None:
        """Load the data sets and choose the seed of the sample order: rank 0 draws it if `seed.data` is null."""
        self.data = prepare_data(self.own.data, self.own.seed.augment, self.world, self.device)
        self.skipped = list(self.data.skipped)
        seed = self.config.seed.data
        if seed is None:
            seed = int(self.channel.gather(fresh_seed())[0])
            log.info("seed.data is null: the order of samples is drawn from the fresh seed %d", seed)
        self.data_seed = seed

    def preflight(self, weights: str | None = None) -> None:
        """Exchange manifests and raise Concluded (`environment-differs`) if values that must match differ."""
        own = collect_manifest(self.world, self._bound, self.seed, self.data.digest, weights)
        self.facts.manifests = gather_manifests(own, self.channel)
        self.facts.differences = compare_manifests(self.facts.manifests, self.facts.overrides)
        wrong = [difference for difference in self.facts.differences if not difference.allowed]
        if wrong:
            groups = split_into_groups([repr(value).encode() for value in wrong[0].values])
            raise Concluded(diagnosis.environment_differs(wrong, groups, suspects_of(groups)))

    def build(self) -> None:
        """Build this replica from its own seed."""
        self.seed = seed_generators(self.seed)
        before = rng_stage().digest
        self.replica = self.world.together(lambda: build_replica(self.own, self.data.num_classes, self.device))
        self.replica.scaler = make_scaler(self.own.train, self.device)
        built = BuildFacts(self.seed, torch.initial_seed(), before, rng_stage().digest)
        self.facts.builds = self.channel.gather(built)

    def check_build(self) -> None:
        """Raise Concluded if a replica is not wired correctly, then broadcast rank 0's state if `model.init` says so.

        Raises:
            Concluded: The optimizer, scheduler or criterion of a replica does not belong to its model.
            SharedUsageError: The model cannot be trained on this data with this config.
        """
        replica = self.replica
        fault = _wiring_fault(replica)
        faulty = [
            replica_id for replica_id, is_faulty in enumerate(self.channel.gather(fault is not None)) if is_faulty
        ]
        if faulty:
            own = None if fault is None else diagnosis.wiring_fault(fault, faulty, self.world.num_replicas)
            raise Concluded(self.channel.gather(own)[faulty[0]])
        replica.model.train()
        self.world.together(lambda: check_criterion_weighs(replica.criterion, self.data.weights))
        self.world.together(self._check_schedule)
        self.world.together(lambda: check_image_size(replica.model, self.data.train, self.own))
        self.world.together(lambda: check_smallest_part(replica.model, self.data.train, self.own, self.device))
        if self.config.model.init == "broadcast":
            broadcast_state(replica.model, self.channel, with_rng=self.expect == "identical")

    def arm(self) -> None:
        """Set up the faults to inject, with a warning for each."""
        if self.injector is not None:
            self.injector.close()
        self.injector = self.world.together(lambda: Injector(self.config.inject, self.world.replica_id, self.replica))
        if self.world.is_coordinator:
            for fault in self.config.inject:
                log.warning("fault injection: %s", fault)

    # ---- Run steps

    def open_index_stream(self, seed: int) -> None:
        """Create the coordinator, which draws the order of samples from `seed`."""
        self.coordinator = IndexSampler(self.channel, seed)
        if self.injector is not None and self.config.inject:
            self.coordinator = FaultyCoordinator(self.channel, seed, self.injector)

    def compare(self, trace: TraceWriter, reference: Reference | None, steps_done: int = 0) -> Agreement:
        """Start to compare the replicas as the config says, beginning with the build.

        Args:
            trace: The trace that each compared step is recorded in.
            reference: The recorded run to compare with, on rank 0.
            steps_done: Number of steps that a resumed run has taken before.

        Raises:
            Divergence: The builds diverge.
        """
        return Agreement(
            self.replica.model,
            self.replica.optimizer,
            others=[self.replica.scheduler, self.replica.scaler],
            expect=self.expect,
            every=self.config.agreement.every,
            on_divergence=self.config.agreement.on_divergence,
            lag=AGREEMENT_LAG,
            trace=trace,
            recorded=reference,
            channel=self.channel,
            steps_done=steps_done,
            stoppable=True,
            hasher=self.hasher,
            quiet=True,
            all_generators=True,
        )

    def compare_for_timing(self, every: int) -> Agreement:
        """Start to compare all state every `every` steps, recording nothing and never stopping."""
        return Agreement(
            self.replica.model,
            self.replica.optimizer,
            others=[self.replica.scheduler, self.replica.scaler],
            every=every,
            on_divergence="continue",  # replicas built from distinct seeds are compared in full too
            lag=AGREEMENT_LAG,
            channel=self.channel,
            hasher=self.hasher,
            quiet=True,
            all_generators=True,
        )

    def keep_history(self) -> History:
        """Start to keep the snapshots that a divergence is replayed from, if anything is compared."""
        compares = self.expect == "identical" and self.config.agreement.every > 0
        return History(self.replica, self.config.agreement.snapshot_every if compares else 0)

    def steps(self, agreement: Agreement, history: History, start: Position = Position()) -> Events:  # noqa: B008
        """Return the training loop, from `start` to the end that the config sets.

        Args:
            agreement: The comparison, from `compare`.
            history: The snapshots, from `keep_history`.
            start: The position to begin at. The replica's state must be the state at this position.
        """
        own, stop = self.own, self.stop_request
        state = self.replica, self.data, self.coordinator
        return train(*state, agreement, own, self.world, self.device, stop, history, start)

    def steps_to_time(self, agreement: Agreement, history: History) -> Events:
        """Return the training loop without `train.max_steps`. It ignores stop requests and steps no schedule.

        A schedule may have ended before the timing does.
        """
        self.replica.scheduler_per = "epoch"  # no epoch is completed
        own = self.own.model_copy(update={"train": self.own.train.model_copy(update={"max_steps": None})})
        state = self.replica, self.data, self.coordinator
        return train(*state, agreement, own, self.world, self.device, StopRequest(), history)

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def explainer(self) -> Explainer:
        """Return what diagnoses a divergence by replaying this replica's steps, or by building it again."""
        assert self.seed is not None
        assert self.injector is not None
        state = self.replica, self.data, self.coordinator, self.injector
        return Explainer(self.own, self.seed, self.device, *state, self.channel, self.facts)

    @property
    def num_batches(self) -> int:
        """Number of batches in an epoch."""
        return math.ceil(len(self.data.train) / self.own.data.batch_size)  # type: ignore[arg-type]

    def _check_schedule(self) -> None:
        """Raise UsageError if the config's schedule is used and ends before the run."""
        if self.own.replica.factory is not None:
            return
        train = self.own.train
        steps = train.epochs * self.num_batches
        check_schedule(self.own.schedule, train.epochs, min(steps, train.max_steps or steps))


def _wiring_fault(replica: Replica) -> WiringError | None:
    try:
        check_wiring(replica.model, replica.optimizer, replica.scheduler, replica.criterion)
    except WiringError as error:
        return error
    return None
