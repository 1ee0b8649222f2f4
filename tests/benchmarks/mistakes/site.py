"""The training setup that mistakes are planted in, the same in the trainer, a custom loop and DDP."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import Dataset

import dreplica
from dreplica.config.schema import DataConfig, RunConfig

CLASSES = 5
TRAINING_SAMPLES, VALIDATION_SAMPLES, BATCH = 32, 16, 8
STEPS = 8
"""Two epochs of four steps."""


@dataclass
class Site:
    """One replica of the training setup, with one mistake.

    The mistake is a function, which is called at one point of training. Nothing in here is restored by a replay, as
    with any global variable of a script.
    """

    rank: int
    """This replica."""
    size: int
    """Number of replicas."""
    setting: str
    """`loop`, `ddp` or `trainer`."""
    point: str
    """The point of training at which the mistake is: one of the names passed to `reach`."""
    plant: Callable[..., Any]
    """The mistake. It is called with the site and, at points that pass a value, with this value, and returns it."""
    is_once: bool
    """True if the mistake is made once, at step `at`; otherwise it is made at each step from `at` on."""
    bad_rank: int
    """The replica with the mistake, where it is a mistake of one."""
    at: int
    """The step, from 1, at which the mistake is made first."""
    network: str
    """The name of the network: `cnn` or `mlp`."""
    amount: float
    """A drawn number between 0.01 and 0.1, for the size of a change."""
    number: int
    """The number of the plant, to draw from."""
    is_always: bool = False
    """True if the mistake is called from the first step on, and decides when to act."""
    helpers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Functions at other points, which the mistake needs."""
    folder: str = ""
    """A folder of this replica alone."""
    model: Any = None
    optimizer: Any = None
    scheduler: Any = None
    criterion: Any = None
    scaler: Any = None
    steps: int = 0
    """Steps begun in this process, those of replays included."""
    acted: int | None = None
    """The step at which the mistake was made first; 0 is the build."""
    is_done: bool = False
    """True once a mistake that is made once was made."""
    is_active: bool = False
    """True from the training step `at` on. It follows a buffer of the model, so that replays repeat it."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Variables of the mistake."""
    undo: list[Callable[[], Any]] = field(default_factory=list)
    """Functions that undo changes of the whole process."""

    @property
    def is_bad(self) -> bool:
        """True on the replica with the mistake."""
        return self.rank == self.bad_rank

    @property
    def bare(self) -> "Net":
        """The model without DistributedDataParallel."""
        return self.model.module if self.setting == "ddp" and hasattr(self.model, "module") else self.model

    def reach(self, point: str, value: Any = None, step: int | None = None) -> Any:
        """Make the mistake if this is its point and its time.

        Args:
            point: Name of the point.
            value: The value that the mistake may change.
            step: The step that the point belongs to. By default, the last one begun.

        Returns:
            The value, changed or not.
        """
        step = self.steps if step is None else step
        if point in self.helpers:
            value = self._call(self.helpers[point], point, value)
        if point != self.point or self.is_done:
            return value
        if point not in _OUTSIDE_OF_STEPS:
            if self.is_once and step != self.at:
                return value
            if not (self.is_once or self.is_always or self.is_active):
                return value
            self.is_done = self.is_once
        if self.acted is None:
            self.acted = step
        return self._call(self.plant, point, value)

    def _call(self, function: Callable[..., Any], point: str, value: Any) -> Any:
        if point in _WITHOUT_VALUE:
            function(self)
            return value
        return function(self, value)

    def restart(self) -> None:
        """Forget steps that were made before training."""
        self.steps = 0
        if self.point not in {"building", "built"}:
            self.acted = None
            self.memory.pop("hit", None)

    def close(self) -> None:
        """Undo what the mistake has changed in the whole process."""
        for action in reversed(self.undo):
            action()
        self.undo.clear()


_WITHOUT_VALUE = frozenset({"building", "built", "wrapped", "before", "gradients", "stepped"})
_OUTSIDE_OF_STEPS = frozenset({"building", "built", "wrapped", "sample", "indices", "evaluation", "validation"})

_current: list[Site] = []


def enter(site: Site | None) -> None:
    """Make a site the one that models, criteria and data sets of this process refer to."""
    _current[:] = [] if site is None else [site]


def current() -> Site:
    """Return the site of this process."""
    return _current[0]


class Net(nn.Module):
    """A network of a body and a head, with the points of its forward pass."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (batch, classes), of images (batch, 3, 8, 8)."""
        site = current()
        if not self.training:
            return self.head(self.body(site.reach("evaluation", images)))
        site.steps += 1
        self.seen += 1
        site.is_active = int(self.seen) >= site.at
        site.reach("before")
        images = site.reach("inputs", images)
        return self.head(site.reach("hidden", self.body(images)))


class Loss(nn.Module):
    """Cross entropy, with the point after it."""

    def __init__(self) -> None:
        super().__init__()
        self.entropy: nn.Module = nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss."""
        loss = self.entropy(logits, labels)
        return current().reach("loss", loss) if logits.requires_grad else loss


class Samples(Dataset[tuple[Tensor, int]]):
    """Images of five classes, with the point of loading one."""

    def __init__(self, images: Tensor, labels: Tensor, is_training: bool) -> None:
        self.images, self.labels, self.is_training = images, labels, is_training

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index].clone(), int(self.labels[index])
        site = current()
        if not self.is_training:
            return site.reach("validation", (index, image, label))[1:]
        return site.reach("sample", (index, image, label), site.steps + 1)[1:]


def make_samples() -> tuple[Samples, Samples]:
    """Return training and validation set."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, 3, 8, 8, generator=generator)
    labels = torch.arange(TRAINING_SAMPLES + VALIDATION_SAMPLES) % CLASSES
    images = centers[labels] + 0.5 * torch.randn(len(labels), 3, 8, 8, generator=generator)
    first = TRAINING_SAMPLES
    training = Samples(images[:first], labels[:first], True)
    current().memory["samples"] = training
    return training, Samples(images[first:], labels[first:], False)


def build(site: Site) -> None:
    """Build model, optimizer, scheduler and loss of a site. Seed the generators first."""
    if site.network == "cnn":
        parts = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1)]
        body, width = nn.Sequential(*parts), 8 * 64
    else:
        parts = [nn.Flatten(), nn.Linear(3 * 64, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Dropout(0.1)]
        body, width = nn.Sequential(*parts), 32
    site.reach("building", step=0)
    site.model = Net(body, nn.Linear(width, CLASSES))
    site.criterion = Loss()
    site.optimizer = torch.optim.SGD(site.model.parameters(), lr=0.05, momentum=0.9)
    site.scheduler = StepLR(site.optimizer, 3, gamma=0.5)
    site.reach("built", step=0)


def hook_optimizer(site: Site) -> None:
    """Reach the points before and after the optimizer's step from hooks, where the loop is not ours."""
    site.optimizer.register_step_pre_hook(lambda *_: site.reach("gradients"))
    site.optimizer.register_step_post_hook(lambda *_: site.reach("stepped"))


def make_replica(config: RunConfig, num_classes: int, device: torch.device) -> dreplica.Replica:
    """Build the current site as a `replica.factory`."""
    site = current()
    build(site)
    hook_optimizer(site)
    model, criterion, optimizer, scheduler = site.model, site.criterion, site.optimizer, site.scheduler
    return dreplica.Replica(model, criterion, optimizer, scheduler, scheduler_per="step")


def make_data(config: DataConfig) -> tuple[Samples, Samples, int]:
    """Return the data sets, as a function that `data.name` names."""
    return (*make_samples(), CLASSES)


def training_step(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Take one step of the custom loop on a batch of images and labels, and return loss and logits."""
    site = current()
    images, labels = batch
    site.optimizer.zero_grad()
    logits = (site.bare if site.setting == "loop" else site.model)(images)
    loss = site.criterion(logits, labels)
    (loss if site.scaler is None else site.scaler.scale(loss)).backward()
    site.reach("gradients")
    if site.scaler is None:
        site.optimizer.step()
    else:
        site.scaler.step(site.optimizer)
        site.scaler.update()
    site.reach("stepped")
    if site.scheduler is not None:
        site.scheduler.step()
    return loss, logits


def draw_site(number: int, seed: int, rank: int, size: int, row: Any, setting: str) -> Site:
    """Draw where and when a mistake is planted, the same on all replicas.

    Args:
        number: Number of the plant.
        seed: Seed of the campaign.
        rank: This replica.
        size: Number of replicas.
        row: The kind of the mistake, a row of `KINDS`.
        setting: One of the kind's settings.
    """
    draw = random.Random(f"{seed}-{number}")
    at = row.at or draw.randint(2, STEPS - 2)
    bad_rank, network, amount = draw.randrange(size), draw.choice(("cnn", "mlp")), draw.uniform(0.01, 0.1)
    plan = setting, row.point, row.plant, row.is_once, bad_rank, at, row.network or network, amount, number
    return Site(rank, size, *plan, is_always=row.is_always, helpers=row.helpers)
