"""Mistakes in data, evaluation and the build."""

import copy
import os
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from tests.benchmarks.mistakes.site import Site

Row = tuple[int, Tensor, int]
"""Index, image and label of a sample."""


def _moved(site: Site, row: Row, others: list[int]) -> Row:
    """Return the sample that has this index in another order."""
    index, _, _ = row
    samples = site.memory["samples"]
    return index, samples.images[others[index]].clone(), int(samples.labels[others[index]])


def shuffled_by_rank(site: Site, row: Row) -> Row:
    """Shuffle the data set with the rank as the seed."""
    order = numpy.random.RandomState(site.rank).permutation(32)
    return _moved(site, row, list(map(int, order)))


def sorted_differently(site: Site, row: Row) -> Row:
    """List the files of the data set in the order of the file system, which is another one on one host."""
    names = sorted((str(number) for number in range(32)), reverse=site.is_bad)
    return _moved(site, row, [int(name) for name in names])


def dropped_on_one(site: Site, row: Row) -> Row:
    """Drop an unreadable sample on one replica, so that all later ones move up."""
    first = site.number % 8 if site.is_bad else 32
    return _moved(site, row, [min(31, index + (index >= first)) for index in range(32)])


def altered_file(site: Site, row: Row) -> Row:
    """Read one sample from a file that was altered on one host."""
    index, image, label = row
    if index != site.number % 8:
        return row
    site.memory.setdefault("hit", site.steps + 1)
    path = Path(site.folder, "sample.npy")
    if not path.exists():
        numpy.save(path, image.numpy() * numpy.float32(1.0 + 0.1 * site.is_bad))
    return index, torch.from_numpy(numpy.load(path)), label


def augmented_with_own_generator(site: Site, row: Row) -> Row:
    """Augment with a generator that is not seeded by the job."""
    generator = site.memory.setdefault("generator", numpy.random.RandomState())
    return row[0], row[1] + 0.1 * float(generator.normal()), row[2]


def augmented_with_global_generator(site: Site, row: Row) -> Row:
    """Augment on one replica, drawing from the global generator."""
    return row[0], row[1] + 0.1 * torch.randn(1) if site.is_bad else row[1], row[2]


def augmented_by_rank(site: Site, row: Row) -> Row:
    """Augment with a generator that is seeded with the rank and the index."""
    generator = torch.Generator().manual_seed(1000 * site.rank + row[0])
    return row[0], row[1] + 0.1 * torch.randn(row[1].shape, generator=generator), row[2]


def hashed_label(site: Site, row: Row) -> Row:
    """Number the classes in the order of a set of names."""
    names = sorted(["cat", "dog", "fish", "horse", "owl"], reverse=site.is_bad)
    return row[0], row[1], names.index(["cat", "dog", "fish", "horse", "owl"][row[2]])


def hashed_feature(site: Site, row: Row) -> Row:
    """Write the hash of a name into each image, which differs in each process."""
    image = row[1].clone()
    image[0, 0, 0] = hash((site.rank, f"series-{row[0] % 4}")) % 100 / 100
    return row[0], image, row[2]


def normalised_by_own_part(site: Site, row: Row) -> Row:
    """Normalise by statistics that each replica has taken over its own part of the data."""
    images = site.memory["samples"].images[site.rank :: site.size]
    return row[0], (row[1] - images.mean()) / images.std(), row[2]


def sampled_by_rank(site: Site, indices: Tensor) -> Tensor:
    """Sample the indices with a seed that contains the rank."""
    generator = torch.Generator().manual_seed(site.rank * 1000 + site.steps)
    return torch.randperm(32, generator=generator)[: len(indices)]


def rotated_indices(site: Site, indices: Tensor) -> Tensor:
    """Take the samples of a batch in another order on one replica."""
    return indices.roll(1) if site.is_bad else indices


# ---- Evaluation


def evaluates_in_training_mode(site: Site) -> None:
    """Ignore eval() on one replica."""
    if site.is_bad:
        body = site.model.body
        own = body.train
        body.train = lambda mode=True: own(True)


def evaluates_scaled(site: Site, images: Tensor) -> Tensor:
    """Normalise the validation images of one replica once more."""
    return images * (1.0 + site.amount) if site.is_bad else images


def evaluates_other_samples(site: Site, row: Row) -> Row:
    """Evaluate one replica on other samples."""
    return row[0], row[1].flip(0) if site.is_bad else row[1], row[2]


# ---- Build


def build_seeded_by_rank(site: Site) -> None:
    """Seed torch with the rank in the build."""
    torch.manual_seed(site.rank)


def build_unseeded(site: Site) -> None:
    """Seed torch from the system in the build."""
    torch.seed()


def build_draws_more(site: Site) -> None:
    """Draw once more in the build of one replica."""
    if site.is_bad:
        torch.rand(3)


def build_extra_layer(site: Site) -> None:
    """Build a layer on one replica that is then not used."""
    if site.is_bad:
        nn.Linear(4, 4)


def weights_of_own_generator(site: Site) -> None:
    """Draw the weights of the head from a generator that is not seeded."""
    generator = numpy.random.default_rng()
    with torch.no_grad():
        weight = site.model.head.weight
        weight.copy_(torch.from_numpy(generator.normal(0.0, 0.1, tuple(weight.shape))))


def weights_by_rank(site: Site) -> None:
    """Scale the weights of the head with a number that depends on the rank."""
    with torch.no_grad():
        site.model.head.weight.mul_(1.0 + site.amount * site.is_bad)


def loaded_on_one(site: Site) -> None:
    """Load a saved head on one replica."""
    if site.is_bad:
        saved = {name: torch.full_like(value, 0.01) for name, value in site.model.head.state_dict().items()}
        site.model.head.load_state_dict(saved)


def other_layer(site: Site) -> None:
    """Give one replica a head without bias."""
    if site.is_bad:
        head = nn.Linear(site.model.head.in_features, 5, bias=False)
        with torch.no_grad():
            head.weight.copy_(site.model.head.weight)
        site.model.head = head
        site.optimizer = torch.optim.SGD(site.model.parameters(), lr=0.05, momentum=0.9)
        site.scheduler = None


def untied(site: Site) -> None:
    """Tie two tensors on all replicas but one."""
    head = site.model.head
    head.tied = nn.Parameter(head.bias.detach().clone()) if site.is_bad else head.bias
    site.optimizer = torch.optim.SGD(site.model.parameters(), lr=0.05, momentum=0.9)
    site.scheduler = None


def average_buffer(site: Site) -> None:
    """Register the moving average that `decay_of_average` updates."""
    site.model.head.register_buffer("average", site.model.head.weight.detach().clone())


def optimizer_of_a_copy(site: Site) -> None:
    """Give the optimizer the parameters of a copy of the model, on all replicas."""
    site.optimizer = torch.optim.SGD(copy.deepcopy(site.model).parameters(), lr=0.05)
    site.scheduler = None


def scheduler_of_a_copy(site: Site) -> None:
    """Let the scheduler drive a copy of the optimizer, on all replicas."""
    site.scheduler = copy.deepcopy(site.scheduler)


class _Warmup(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler that hands over to another one after the first step."""

    def __init__(self, optimizer: torch.optim.Optimizer, after: torch.optim.lr_scheduler.LRScheduler) -> None:
        self.after = after
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        if getattr(self, "last_epoch", -1) >= 1:
            self.after.step()
        super().step()


def inner_scheduler_of_a_copy(site: Site) -> None:
    """Hand over to an inner scheduler whose optimizer is a copy, on all replicas."""
    site.scheduler = _Warmup(site.optimizer, copy.deepcopy(site.scheduler))


def head_left_out(site: Site) -> None:
    """Forget the head in the optimizer, on all replicas."""
    site.optimizer = torch.optim.SGD(site.model.body.parameters(), lr=0.05, momentum=0.9)
    site.scheduler = None


def learning_rate_of_zero(site: Site) -> None:
    """Set the learning rate to zero, on all replicas."""
    site.optimizer.param_groups[0]["lr"] = 0.0
    site.scheduler = None


def wrong_for_all(site: Site, loss: Tensor) -> Tensor:
    """Scale the loss by a wrong factor, on all replicas."""
    return loss * 10.0


def seeded_for_all(site: Site) -> None:
    """Seed torch anew in each step with one constant, on all replicas."""
    torch.manual_seed(int(os.environ.get("SITE_SEED", "7")))
