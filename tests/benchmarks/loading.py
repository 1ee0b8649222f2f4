"""Measure the cost of loading: decoding shared on a node, cached in memory, and against a plain DataLoader.

    python -m tests.benchmarks.loading

The data are JPEGs of 2400 x 1800, made from scikit-learn's sample images. A small model trains on them at 224 x 224, so
the job is bound by decoding. What is compared is timed in alternating rounds, and ratios are taken within a round.

Jobs: the trainer's epoch (every stage compared at every step, and the evaluation), from the first batch requested to
the last prediction, the start of workers included. It is run by 1 replica, by 2 with `decode: node`, and by 2 with
`decode: replica`. `--workers` is the number of workers on the machine, half of which belong to each of 2 replicas: with
more decoding processes than cores, they evict each other's data from the CPU caches.
Limits: `node` at most 1.15 x the time of 1 replica, and at most 0.65 x that of `replica`.

Loading alone: the first and the second epoch with `cache: memory` (limit: the second 10 x as fast) and, for comparison,
with `cache: device`. An epoch without a cache is compared with torchvision's ImageFolder with the same transforms in a
plain DataLoader, which normalizes in its workers, as is usual, or whole batches, as this loader does. Limit: at least
as fast as either.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dreplica.agreement.agreement import Agreement
from dreplica.config.load import load_config
from dreplica.data.datasets import prepare_data
from dreplica.data.images.images import Images
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.data.loading.loader import load_batches, normalize
from dreplica.data.samples import DataSets, at_epoch
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.environment.determinism import apply_determinism
from dreplica.replica.build import build_replica
from dreplica.run.session import AGREEMENT_LAG
from dreplica.state.rng import seed_generators
from dreplica.training.history import History
from dreplica.training.loop import train
from tests.data.pictures import CLASSES, photographs
from tests.harness import run_replicas

CPU = torch.device("cpu")
ALONE = World(0, 1, Channel(), None, "here")
BATCH_SIZE = 16


def make_photographs(root: Path, num_images: int) -> None:
    """Write large JPEGs, in a folder per class."""
    for name in CLASSES:
        (root / name).mkdir()
        for number in range(num_images // len(CLASSES)):
            width = 320 + 8 * (number % 32)
            picture = photographs()[name].crop((0, 0, width, width * 3 // 4)).resize((2400, 1800))
            picture.save(root / name / f"{number:03}.jpg", quality=90)


def small_model(num_classes: int) -> nn.Module:
    """Build a model of a convolution and a head."""
    layers = (nn.Conv2d(3, 8, 7, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8 * 16, num_classes))


def settings(root: str, num_workers: int, *more: str) -> list[str]:
    """Return the arguments that all jobs here share."""
    return [
        "--data.name=imagefolder",
        f"--data.root={root}",
        f"--data.num_workers={num_workers}",
        f"--data.batch_size={BATCH_SIZE}",
        "--data.val_fraction=0.1",
        "--data.augment=flip",
        "--model.factory=tests.benchmarks.loading:small_model",
        "--schedule={}",
        "--optim.lr=1e-4",  # a fitted model has denormal gradients, which are ten times as slow on a CPU
        "--train.epochs=1",
        *more,
    ]


def time_job(world: World, arguments: list[str]) -> float:
    """Return the seconds that this replica takes to train and evaluate an epoch."""
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it has workers
    config = load_config(arguments, world.num_replicas)
    apply_determinism(config.determinism)
    data = prepare_data(config.data, config.seed.augment, world, CPU)
    seed_generators(42)
    replica = build_replica(config, data.num_classes, CPU)
    history = History(replica, config.agreement.snapshot_every)
    agreement = Agreement(replica.model, replica.optimizer, lag=AGREEMENT_LAG, channel=world.channel)
    coordinator = IndexSampler(world.channel, 0)
    world.channel.gather(None)  # all replicas start together
    began = time.perf_counter()
    for _ in train(replica, data, coordinator, agreement, config, world, CPU, StopRequest(), history):
        pass
    return time.perf_counter() - began


def time_jobs(root: str, num_workers: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of the slowest replica in each round, by kind of job."""
    jobs = {"1 replica": (1, "replica"), "2 replicas, node": (2, "node"), "2 replicas, replica": (2, "replica")}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name in list(jobs) if number % 2 else reversed(jobs):
            num_replicas, decode = jobs[name]
            arguments = settings(root, num_workers // num_replicas, f"--data.decode={decode}")
            results = run_replicas(time_job, num_replicas, arguments, timeout=600)
            assert all(isinstance(result, float) for result in results), results
            seconds[name].append(max(results))
    return seconds


def prepared(root: str, num_workers: int, *more: str) -> DataSets:
    """Load the data in this process alone."""
    config = load_config(settings(root, num_workers, *more), 1)
    return prepare_data(config.data, 0, ALONE, CPU)


def load(data: DataSets, num_workers: int, epoch: int) -> float:
    """Return the seconds to load an epoch with this loader."""
    began = time.perf_counter()
    stream = IndexSampler(Channel(), 0).training_batches(len(data.train), BATCH_SIZE, epoch)  # type: ignore[arg-type]
    for _ in load_batches(at_epoch(data.train, epoch), stream, CPU, num_workers, 0, epoch):
        pass
    return time.perf_counter() - began


def load_plainly(root: str, images: Images, num_workers: int, whole_batches: bool) -> float:
    """Return the seconds to load the same files with torch's DataLoader."""
    mean, std = images.normalization
    steps = [v2.Resize(256), v2.CenterCrop(224), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    if not whole_batches:
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    began = time.perf_counter()
    dataset = Subset(ImageFolder(root, v2.Compose(steps)), list(images.positions))
    for inputs, _ in DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=num_workers):
        if whole_batches:
            inputs = normalize(inputs, mean, std)
        assert inputs.dtype is torch.float32
    return time.perf_counter() - began


def speeds_against_plain(root: str, num_workers: int, rounds: int) -> dict[str, list[float]]:
    """Return the speed of this loader relative to each plain one, in each round."""
    data = prepared(root, num_workers)
    assert isinstance(data.train, Images)
    loaders: dict[str, Callable[[], float]] = {
        "this": partial(load, data, num_workers, 1),
        "one that normalizes in its workers": partial(load_plainly, root, data.train, num_workers, False),
        "one that normalizes whole batches": partial(load_plainly, root, data.train, num_workers, True),
    }
    ratios: dict[str, list[float]] = {name: [] for name in loaders if name != "this"}
    for number in range(rounds):
        seconds = {name: loaders[name]() for name in (loaders if number % 2 else reversed(loaders))}
        for name, values in ratios.items():
            values.append(seconds[name] / seconds["this"])
    return ratios


def print_ratios(what: str, ratios: list[float], limit: str) -> None:
    """Print the median and the range."""
    print(f"{what}: {statistics.median(ratios):.3f} x ({min(ratios):.3f} to {max(ratios):.3f}){limit}", flush=True)


def main() -> None:
    """Print a line for each limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    num_workers, rounds = arguments.workers, arguments.rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        make_photographs(Path(root), arguments.images)
        seconds = time_jobs(root, num_workers, rounds)
        for name, values in seconds.items():
            print(f"{name}: {statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})")
        for other, limit in (("1 replica", "1.15"), ("2 replicas, replica", "0.65")):
            ratios = [a / b for a, b in zip(seconds["2 replicas, node"], seconds[other], strict=True)]
            print_ratios(f"time of 2 replicas with decode: node against {other}", ratios, f"; limit: at most {limit}")
        for cache, limit in (("memory", "; limit: at least 10"), ("device", "")):
            gains = []
            for _ in range(max(1, rounds // 2)):
                data = prepared(root, num_workers, f"--data.cache={cache}")
                gains.append(load(data, num_workers, 1) / load(data, num_workers, 2))
            print_ratios(f"speed of the second epoch against the first with cache: {cache}", gains, limit)
        for name, ratios in speeds_against_plain(root, num_workers, rounds).items():
            print_ratios(f"speed of this loader against {name}", ratios, "; limit: at least 1")


if __name__ == "__main__":
    main()
