"""The life of a run: prepare, preflight, build, train, conclude."""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.stages import rng_stage
from dreplica.agreement.trace import Trace
from dreplica.agreement.verdict import Divergence, Verdict, split_into_classes, suspects_of
from dreplica.config import RunConfig, load_config
from dreplica.data.coordinator import Coordinator
from dreplica.data.datasets import DataSets, load_data
from dreplica.diagnosis import conclude as diagnosis
from dreplica.diagnosis.conclude import BuildFacts, RunFacts
from dreplica.diagnosis.learning import LearningWatch
from dreplica.errors import ExitCode, UsageError
from dreplica.replica.build import broadcast_state, build_replica
from dreplica.replica.replica import Replica
from dreplica.replica.rng import fresh_seed, model_seed, seed_generators, shares_model_seed
from dreplica.replica.wiring import WiringError, check_wiring
from dreplica.report.recorder import Recorder
from dreplica.report.terminal import ProgressDisplay
from dreplica.training.loop import EpochDone, StepDone, Stopped, train
from dreplica.training.spread import measure_spread
from dreplica.training.step import make_scaler
from dreplica.world.determinism import apply_determinism, set_environment
from dreplica.world.logs import set_up_logging
from dreplica.world.manifest import collect_manifest, compare_manifests, compare_values
from dreplica.world.process_group import Device, World, bind_device, env_num_replicas, env_rank, open_world
from dreplica.world.roll_call import ReplicaLost
from dreplica.world.signals import StopRequest, stop_signals

log = logging.getLogger(__name__)

_DEFAULT_TIMEOUT = 300.0
_AGREEMENT_LAG: Literal[1] = 1


@dataclass(frozen=True)
class Prepared:
    """What is decided before replicas meet."""

    config: RunConfig
    """As given: the same on all replicas."""
    own: RunConfig
    """With this replica's overrides."""
    device: Device


def run_worker(argv: Sequence[str]) -> ExitCode:
    """One replica of a run, from its command line to its exit code."""
    set_up_logging(env_rank())
    prepared: Prepared | UsageError
    try:
        prepared = prepare(argv)
    except UsageError as error:
        prepared = error  # raised once the replicas have met, so that all of them end
    timeout = _DEFAULT_TIMEOUT if isinstance(prepared, UsageError) else prepared.config.world.timeout
    try:
        with open_world(timeout) as world, stop_signals() as stop_request:
            return Run(world.together(lambda: _unwrap(prepared)), world, stop_request).conduct()
    except UsageError as error:
        if env_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return ExitCode.UNUSABLE


def prepare(argv: Sequence[str]) -> Prepared:
    """Reads the config, and puts determinism settings and device into effect. Raises UsageError."""
    config = load_config(argv, env_num_replicas())
    own = config.for_replica(env_rank())
    set_environment(own.determinism)
    device = bind_device(own.world)
    apply_determinism(own.determinism)
    return Prepared(config, own, device)


class Run:
    """One replica's part in a run. The methods stand in the order in which they are called."""

    def __init__(self, prepared: Prepared, world: World, stop_request: StopRequest) -> None:
        self.config, self.own, self.device = prepared.config, prepared.own, prepared.device
        self.world, self.channel = world, world.channel
        self.stop_request = stop_request
        self.stopped_at: int | None = None
        shared = shares_model_seed(self.config.seed, world.num_replicas)
        expect = self.config.agreement.expect
        self.expect: Literal["identical", "independent"]
        self.expect = ("identical" if shared else "independent") if expect == "auto" else expect
        self.facts = RunFacts(
            num_replicas=world.num_replicas,
            seeded=self.config.seed.model is not None,
            shared_seed=shared,
            overrides=self.config.overrides,
        )
        self.manifests: list[dict[str, Any]] = []
        self.agreement: Agreement | None = None
        self.console = Console()
        self.recorder = Recorder(world, self.console)

    def conduct(self) -> ExitCode:
        """The whole run. Every way it can end, on any replica, ends it on all of them."""
        try:
            try:
                self.compare_configs()
                data, data_seed = self.load()
                self.preflight(data)
                replica = self.build(data.num_classes)
                verdict = self.train(replica, data, Coordinator(self.channel, data_seed))
            except Divergence as divergence:
                verdict = divergence.verdict
            return self.conclude(verdict)
        except UsageError:
            raise
        except Exception as error:
            self.conclude_without(error)
            raise

    def compare_configs(self) -> None:
        """Raises Divergence (`config-differs`) unless all replicas were given the same config."""
        configs = self.channel.gather(self.config.model_dump(mode="json"))
        differences = compare_values(configs)
        if differences:
            classes = split_into_classes([repr(config).encode() for config in configs])
            raise Divergence(diagnosis.config_differs(differences, classes, suspects_of(classes)))

    def load(self) -> tuple[DataSets, int]:
        """The data sets, and the seed of the data order: rank 0's own draw if `seed.data` is null."""
        data = self.world.together(lambda: load_data(self.own.data))
        seed = self.config.seed.data
        if seed is None:
            seed = int(self.channel.gather(fresh_seed())[0])
            log.info("seed.data is null: this run's order of samples is drawn from %d", seed)
        return data, seed

    def preflight(self, data: DataSets) -> None:
        """Exchanges manifests. Raises Divergence (`environment-differs`) where replicas must match and do not."""
        seed = model_seed(self.config.seed, self.world.replica_id)
        self.manifests = self.channel.gather(collect_manifest(self.world, self.device, seed, data.digest))
        self.facts.differences = compare_manifests(self.manifests, self.config.overrides)
        wrong = [difference for difference in self.facts.differences if not difference.allowed]
        if wrong:
            classes = split_into_classes([repr(value).encode() for value in wrong[0].values])
            raise Divergence(diagnosis.environment_differs(wrong, classes, suspects_of(classes)))

    def build(self, num_classes: int) -> Replica:
        """This process's replica, from its own seed. Raises Divergence if any replica is not wired right."""
        seed = seed_generators(model_seed(self.config.seed, self.world.replica_id))
        before = rng_stage().digest
        replica = self.world.together(lambda: build_replica(self.own, num_classes, self.device.device))
        replica.scaler = make_scaler(self.own.train, self.device.device)
        self.facts.builds = self.channel.gather(BuildFacts(seed, torch.initial_seed(), before, rng_stage().digest))
        for manifest, build in zip(self.manifests, self.facts.builds, strict=True):
            manifest["seed"] = build.seed
        faults = self.channel.gather(_wiring_fault(replica))
        faulty = [replica_id for replica_id, fault in enumerate(faults) if fault is not None]
        if faulty:
            raise Divergence(diagnosis.wiring_fault(faults[faulty[0]], faulty, self.world.num_replicas))
        if self.config.model.init == "broadcast":
            broadcast_state(replica.model, self.channel, with_rng=self.expect == "identical")
        return replica

    def train(self, replica: Replica, data: DataSets, coordinator: Coordinator) -> Verdict:
        """Trains to the end and returns the verdict of a run in which nothing was found; otherwise raises."""
        self.open_record()
        display = ProgressDisplay(self.console, self.world.is_coordinator, self.expect)
        trace_path = self.recorder.folder / "trace.jsonl" if self.world.is_coordinator else None
        try:
            with Trace(trace_path, self.world.num_replicas) as trace:
                watch = LearningWatch(replica.model)
                agreement = self.agreement = self.make_agreement(replica, trace)
                device, stop = self.device.device, self.stop_request
                for event in train(replica, data, coordinator, agreement, self.own, self.world, device, stop):
                    match event:
                        case StepDone():
                            display.step(event)
                        case EpochDone():
                            display.epoch(event)
                            self.recorder.epoch(event)
                            self.check_learning(watch, replica, event)
                        case Stopped():
                            self.stopped_at = event.step
                return self.finish(agreement)
        finally:
            display.close()

    def make_agreement(self, replica: Replica, trace: Trace) -> Agreement:
        """Compares the build, too. Raises Divergence."""
        return Agreement(
            replica.model,
            replica.optimizer,
            others=[replica.scheduler, replica.scaler],
            expect=self.expect,
            every=self.config.agreement.every,
            on_divergence=self.config.agreement.on_divergence,
            lag=_AGREEMENT_LAG,
            trace=trace,
            channel=self.channel,
        )

    def check_learning(self, watch: LearningWatch, replica: Replica, done: EpochDone) -> None:
        """Raises Divergence (`not-learning`) if the first epoch has left some replica's weights as they were."""
        if done.epoch > 1:
            return
        still = self.channel.gather(watch.evidence(replica) if watch.stands_still(replica.model) else None)
        replica_ids = [replica_id for replica_id, evidence in enumerate(still) if evidence is not None]
        if replica_ids:
            raise Divergence(diagnosis.not_learning(done.step, done.epoch, replica_ids, still[replica_ids[0]]))

    def finish(self, agreement: Agreement) -> Verdict:
        """The end of training: final fingerprints, and the spread if replicas are independent."""
        report = self.recorder.report
        assert report is not None
        report.fingerprints = agreement.fingerprints()
        if self.expect == "independent" and report.epochs:
            evaluation = report.epochs[-1].evaluation
            assert evaluation is not None
            report.spread = measure_spread(evaluation, self.channel)
        if agreement.divergence is not None:
            raise Divergence(agreement.divergence)
        verdict = diagnosis.agreed(self.facts, agreement.steps_checked, self.expect == "independent")
        if self.stopped_at is not None:
            verdict = verdict.with_(summary=f"{verdict.summary}; stopped on request after step {self.stopped_at}")
        return verdict

    def open_record(self) -> None:
        """Makes the run folder: once there is something to keep, so that an unusable run leaves nothing behind."""
        run = self.config.run
        self.recorder.open(run.root, str(run.name), self.expect, self.config.to_yaml(), self.manifests)

    def conclude(self, verdict: Verdict) -> ExitCode:
        """Names the cause, writes the report, and says with what code to exit."""
        if self.recorder.report is None:
            self.open_record()
        if not verdict.agreed:
            verdict = diagnosis.conclude(verdict, self.facts)
        self.recorder.conclude(verdict, self.agreement.steps_checked if self.agreement else 0)
        if verdict.cause == "none":
            return ExitCode.AGREED if self.stopped_at is None else ExitCode.FAILED
        return ExitCode.DIVERGED

    def conclude_without(self, error: Exception) -> None:
        """Ends this replica when it fails or (`ReplicaLost`) another is gone. In the second case, does not return."""
        steps_done, steps_checked = None, 0
        if self.agreement is not None:
            steps_done, steps_checked = self.agreement.steps_done, self.agreement.steps_checked
        self.recorder.conclude_without(error, steps_done, steps_checked)
        if isinstance(error, ReplicaLost):
            sys.stdout.flush()
            sys.stderr.flush()
            # gloo's threads still wait for the lost replica, and a normal exit would wait for them.
            os._exit(ExitCode.FAILED)


def _wiring_fault(replica: Replica) -> WiringError | None:
    try:
        check_wiring(replica.model, replica.optimizer, replica.scheduler)
    except WiringError as error:
        return error
    return None


def _unwrap(prepared: Prepared | UsageError) -> Prepared:
    if isinstance(prepared, UsageError):
        raise prepared
    return prepared
