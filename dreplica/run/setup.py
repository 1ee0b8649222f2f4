"""What a run is made of: configs compared, data loaded, the environment looked over, the replica built and checked."""

import logging
import math
from typing import Literal

import torch

from dreplica.agreement.verdict.verdict import Verdict, split_into_groups, suspects_of
from dreplica.config.components import check_schedule
from dreplica.data.datasets import prepare_data
from dreplica.data.samples import DataSets
from dreplica.diagnosis.decision import conclude as diagnosis
from dreplica.diagnosis.decision.conclude import BuildFacts, RunFacts
from dreplica.distributed.process_group import World
from dreplica.environment.manifest import collect_manifest, compare_manifests, compare_values
from dreplica.replica.build import broadcast_state, build_replica, weights_digest
from dreplica.replica.wiring import WiringError, check_wiring
from dreplica.run.bootstrap import Prepared
from dreplica.state.replica import Replica
from dreplica.state.rng import fresh_seed, model_seed, seed_generators, shares_model_seed
from dreplica.state.stages import rng_stage
from dreplica.training.fault_injection import Injector
from dreplica.training.preflight import check_image_size, check_smallest_part
from dreplica.training.step import check_criterion_weighs, make_scaler

log = logging.getLogger(__name__)


class Concluded(Exception):
    """The run ends here, with a verdict that needs no further diagnosis."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.summary)
        self.verdict = verdict


class Preparation:
    """All that comes before the first step. The methods stand in the order in which they are called.

    Attributes:
        data: what to train and validate on.
        data_seed: of the order of samples.
        replica: this process's, built from `seed` and checked.
        seed: of its build.
        injector: the faults that the config asks for, in place.
        facts: what is known of the run.
        skipped: samples that were left out.
    """

    data: DataSets
    data_seed: int
    replica: Replica
    injector: Injector

    def __init__(self, prepared: Prepared, world: World) -> None:
        self.config, self.own, self.device = prepared.config, prepared.own, prepared.device
        self.world, self.channel = world, world.channel
        shared = shares_model_seed(self.config.seed, world.num_replicas)
        expect = self.config.agreement.expect
        self.expect: Literal["identical", "independent"]
        self.expect = ("identical" if shared else "independent") if expect == "auto" else expect
        self.seed = model_seed(self.config.seed, world.replica_id)
        self.skipped: list[str] = []
        self.facts = RunFacts(
            num_replicas=world.num_replicas,
            seeded=self.config.seed.model is not None,
            shared_seed=shared,
            overrides=self.config.declared_differences(),
        )

    def prepare(self) -> None:
        """A collective. Raises Concluded where replicas were not given the same, or one is not sound."""
        self.compare_configs()
        self.data, self.data_seed = self.load()
        self.preflight(self.data)
        self.replica = self.build(self.data.num_classes)
        # Again: a factory may have changed flags, and which weights were read is known now.
        self.preflight(self.data, weights_digest(self.own))
        self.check_build(self.replica)
        self.injector = self.arm()

    def compare_configs(self) -> None:
        """Raises Concluded (`config-differs`) unless all replicas were given the same config."""
        configs = self.channel.gather(self.config.model_dump(mode="json"))
        differences = compare_values(configs)
        if differences:
            groups = split_into_groups([repr(config).encode() for config in configs])
            raise Concluded(diagnosis.config_differs(differences, groups, suspects_of(groups)))

    def load(self) -> tuple[DataSets, int]:
        """The data sets, and the seed of the data order: rank 0's own draw if `seed.data` is null."""
        data = prepare_data(self.own.data, self.own.seed.augment, self.world, self.device.device)
        self.skipped = list(data.skipped)
        seed = self.config.seed.data
        if seed is None:
            seed = int(self.channel.gather(fresh_seed())[0])
            log.info("seed.data is null: this run's order of samples is drawn from %d", seed)
        return data, seed

    def preflight(self, data: DataSets, weights: str | None = None) -> None:
        """Exchanges manifests. Raises Concluded (`environment-differs`) where replicas must match and do not."""
        own = collect_manifest(self.world, self.device, self.seed, data.digest, weights)
        self.facts.manifests = self.channel.gather(own)
        self.facts.differences = compare_manifests(self.facts.manifests, self.facts.overrides)
        wrong = [difference for difference in self.facts.differences if not difference.allowed]
        if wrong:
            groups = split_into_groups([repr(value).encode() for value in wrong[0].values])
            raise Concluded(diagnosis.environment_differs(wrong, groups, suspects_of(groups)))

    def build(self, num_classes: int) -> Replica:
        """This process's replica, from its own seed."""
        self.seed = seed_generators(self.seed)
        before = rng_stage().digest
        replica = self.world.together(lambda: build_replica(self.own, num_classes, self.device.device))
        replica.scaler = make_scaler(self.own.train, self.device.device)
        built = BuildFacts(self.seed, torch.initial_seed(), before, rng_stage().digest)
        self.facts.builds = self.channel.gather(built)
        return replica

    def check_build(self, replica: Replica) -> None:
        """Raises Concluded if any replica is not wired right; then sends rank 0's state if `model.init` wants it."""
        faults = self.channel.gather(_wiring_fault(replica))
        faulty = [replica_id for replica_id, fault in enumerate(faults) if fault is not None]
        if faulty:
            raise Concluded(diagnosis.wiring_fault(faults[faulty[0]], faulty, self.world.num_replicas))
        replica.model.train()
        device = self.device.device
        self.world.together(lambda: check_criterion_weighs(replica.criterion, self.data.weights))
        self.world.together(self.check_schedule)
        self.world.together(lambda: check_image_size(replica.model, self.data.train, self.own))
        self.world.together(lambda: check_smallest_part(replica.model, self.data.train, self.own, device))
        if self.config.model.init == "broadcast":
            broadcast_state(replica.model, self.channel, with_rng=self.expect == "identical")

    def check_schedule(self) -> None:
        """Raises UsageError if the config's schedule, where it is used, ends before the run."""
        if self.own.replica.factory is not None:
            return
        train = self.own.train
        steps = train.epochs * math.ceil(len(self.data.train) / self.own.data.batch_size)  # type: ignore[arg-type]
        check_schedule(self.own.schedule, train.epochs, min(steps, train.max_steps or steps))

    def arm(self) -> Injector:
        """Puts the faults that the config asks for in place, and says so loudly."""
        injector = self.world.together(lambda: Injector(self.config.inject, self.world.replica_id, self.replica))
        if self.world.is_coordinator:
            for fault in self.config.inject:
                log.warning("FAULT INJECTION: %s", fault)
        return injector


def _wiring_fault(replica: Replica) -> WiringError | None:
    try:
        check_wiring(replica.model, replica.optimizer, replica.scheduler, replica.criterion)
    except WiringError as error:
        return error
    return None
