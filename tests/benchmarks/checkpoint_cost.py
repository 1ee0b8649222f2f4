"""What a checkpoint of ResNet-18 with SGD momentum costs: the pause of training, and the writing behind its back.

    python -m tests.benchmarks.checkpoint_cost --rounds 15

In alternating rounds: copying the state out of the way against a plain clone of the same tensors, and writing the
checkpoint against writing as many bytes to as many files plainly, each flushed to the disk. Prints medians and ratios.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from dreplica.state.progress import Position
from dreplica.state.replica import Replica
from dreplica.training.checkpoint.file_format import write_checkpoint
from dreplica.training.checkpoint.replica_state import attributes_as_built, copy_state


def make_replica() -> Replica:
    """After one step, so that there is momentum."""
    model = torchvision.models.resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    return Replica(model, nn.CrossEntropyLoss(), optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 5))


def state_tensors(replica: Replica) -> list[Tensor]:
    """Weights, buffers and momentum."""
    momentum = [state["momentum_buffer"] for state in replica.optimizer.state.values()]
    return [*replica.model.parameters(), *replica.model.buffers(), *momentum]


def write_plainly(folder: Path, contents: dict[str, bytes]) -> None:
    """Files of the same sizes, flushed."""
    folder.mkdir()
    for name, content in contents.items():
        with (folder / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def seconds(action: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Parses arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    replica = make_replica()
    as_built = attributes_as_built(replica)
    times: dict[str, list[float]] = {"pause": [], "clone": [], "checkpoint": [], "plain": []}
    with tempfile.TemporaryDirectory(prefix="dreplica-checkpoints-", dir=".") as name:
        folder = Path(name)
        copied = copy_state(replica, Position(), {}, as_built)
        write_checkpoint(folder / "first", copied.contents())
        files = {path.name: path.read_bytes() for path in (folder / "first").iterdir()}
        for number in range(arguments.rounds):
            one, other = folder / f"step_{number:06}", folder / f"plain_{number}"
            times["pause"].append(seconds(lambda: copy_state(replica, Position(), {}, as_built)))
            times["clone"].append(seconds(lambda: [tensor.detach().clone() for tensor in state_tensors(replica)]))
            times["checkpoint"].append(seconds(lambda place=one: write_checkpoint(place, copied.contents())))  # type: ignore[misc]
            times["plain"].append(seconds(lambda place=other: write_plainly(place, files)))  # type: ignore[misc]
            shutil.rmtree(one)
            shutil.rmtree(other)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{sum(map(len, files.values())) / 1e6:.1f} MB in {len(files)} files, {arguments.rounds} alternating rounds")
    for name, values in times.items():
        print(f"{name:<12}{1000 * medians[name]:8.1f} ms  ({1000 * min(values):.1f} to {1000 * max(values):.1f})")
    print(f"pause / clone = {medians['pause'] / medians['clone']:.2f}")
    print(f"checkpoint / plain = {medians['checkpoint'] / medians['plain']:.2f}")


if __name__ == "__main__":
    main()
