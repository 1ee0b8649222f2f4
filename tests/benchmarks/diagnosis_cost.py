"""What a verdict costs: its time in steps, the time of a traced step, and the memory that a trace takes.

    torchrun --standalone --nproc_per_node=2 -m tests.benchmarks.diagnosis_cost

Verdicts: the default config, with a weight's bit flipped on replica 1 so many steps after the snapshot; the limit is
3 x (steps since the snapshot + 2) step times. Tracing: alternating rounds of plain and traced steps. Memory: two models
with the same operators, of which one has 2.7 times the other's weights.
"""

import argparse
import gc
import statistics
import time
import tracemalloc

import torch
import torchvision
from torch import nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.verdict.verdict import Divergence
from dreplica.config.load import load_config
from dreplica.config.schema import FaultConfig, RunConfig
from dreplica.data.datasets import load_data
from dreplica.data.loading.loader import Batch
from dreplica.data.samples import DataSets
from dreplica.diagnosis.decision.facts import RunFacts
from dreplica.diagnosis.tracing.op_tracer import OpTracer
from dreplica.distributed.process_group import World, open_world
from dreplica.distributed.signals import StopRequest
from dreplica.environment.determinism import apply_determinism
from dreplica.replica.build import build_replica
from dreplica.run.explain import Explainer
from dreplica.run.session import AGREEMENT_LAG
from dreplica.state.replica import Replica
from dreplica.state.rng import seed_generators
from dreplica.training.fault_injection import FaultyCoordinator, Injector
from dreplica.training.history import History
from dreplica.training.loop import train
from dreplica.training.step import training_step

CPU = torch.device("cpu")


def time_verdict(world: World, config: RunConfig, data: DataSets, step: int) -> tuple[float, float, str]:
    """Seconds per step, seconds from the divergence to its verdict, and the cause, of a fault at `step`."""
    seed_generators(42)
    replica = build_replica(config, data.num_classes, CPU)
    injector = Injector([FaultConfig(replica=1, step=step, target="weights")], world.replica_id, replica)
    history = History(replica, config.agreement.snapshot_every)
    agreement = Agreement(replica.model, replica.optimizer, lag=AGREEMENT_LAG, channel=world.channel)
    coordinator = FaultyCoordinator(world.channel, 0, injector)
    started = time.perf_counter()
    try:
        for _ in train(replica, data, coordinator, agreement, config, world, CPU, StopRequest(), history):
            pass
    except Divergence as divergence:
        diverged = time.perf_counter()
        facts = RunFacts(num_replicas=world.num_replicas)
        explainer = Explainer(config, 42, CPU, replica, data, coordinator, injector, world.channel, facts)
        verdict = explainer.explain(divergence.verdict, agreement, history)
        assert verdict.step == step
        return (diverged - started) / agreement.steps_done, time.perf_counter() - diverged, verdict.cause
    finally:
        injector.close()
    raise AssertionError("the fault was not found")


def time_tracing(world: World, config: RunConfig, data: DataSets, rounds: int) -> list[float]:
    """Time of a traced step over that of a plain one, round by round."""
    replica = build_replica(config, data.num_classes, CPU)
    size = config.data.batch_size
    pairs = [data.train[i] for i in range(size)]
    batch = Batch(
        torch.arange(size), torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])
    )
    ratios = []
    for number in range(rounds + 1):
        seconds = {}
        for traced in (False, True) if number % 2 else (True, False):
            world.channel.gather(None)  # all begin together
            started = time.perf_counter()
            if traced:
                with OpTracer(replica.optimizer, model=replica.model):
                    training_step(replica, batch, config.train)
            else:
                training_step(replica, batch, config.train)
            seconds[traced] = time.perf_counter() - started
        if number > 0:
            ratios.append(seconds[True] / seconds[False])
    return ratios


def trace_memory(name: str) -> tuple[int, int, int]:
    """Bytes of the model's weights, operators in a step, and bytes of Python memory that their records take."""
    model = torchvision.models.get_model(name, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    replica = Replica(model, nn.CrossEntropyLoss(), optimizer, None)
    batch = Batch(torch.arange(2), torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64))
    config = RunConfig().train
    with OpTracer(optimizer, model=model):  # fills the caches of names and signatures
        training_step(replica, batch, config)
    gc.collect()
    tracemalloc.start()
    tracer = OpTracer(optimizer, model=model)
    with tracer:
        training_step(replica, batch, config)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return sum(parameter.nbytes for parameter in model.parameters()), len(tracer.records), held


def main() -> None:
    """Prints the three tables, from rank 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 5, 20])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    with open_world(timeout=300) as world:
        say = print if world.is_coordinator else lambda *_: None
        config = load_config([], world.num_replicas)
        apply_determinism(config.determinism)
        data = load_data(config.data)
        say(f"verdicts, {world.num_replicas} replicas: seconds in step times, and the limit")
        for step in arguments.steps:
            step_seconds, seconds, cause = time_verdict(world, config, data, step)
            say(f"  {step:3} steps since the snapshot: {seconds / step_seconds:6.1f} of {3 * (step + 2):3}  {cause}")
        ratios = time_tracing(world, config, data, arguments.rounds)
        say(f"a traced step: {statistics.median(ratios):.2f} x a plain one ({min(ratios):.2f} to {max(ratios):.2f})")
        if world.is_coordinator:
            for name in ("resnet50", "wide_resnet50_2"):
                weights, operators, held = trace_memory(name)
                say(f"{name}: {weights / 1e6:.0f} MB of weights, {operators} operators, {held / 1e6:.2f} MB of records")
        world.channel.gather(None)


if __name__ == "__main__":
    main()
