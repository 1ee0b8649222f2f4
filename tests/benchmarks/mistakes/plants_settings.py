"""Mistakes in the settings of optimizers, schedulers, scalers, modules and PyTorch."""

import os

import torch
import torch.nn.functional as F  # the usual name
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tests.benchmarks.mistakes.site import Site


def lr_by_rank(site: Site) -> None:
    """Scale the learning rate with the rank, as if for the batch size."""
    site.optimizer.param_groups[0]["lr"] *= 1.0 + site.amount * site.is_bad


def lr_once(site: Site) -> None:
    """Lower the learning rate of one replica, because its loss looked high."""
    if site.is_bad:
        site.optimizer.param_groups[0]["lr"] *= 1.0 - site.amount


def decay_from_environment(site: Site) -> None:
    """Read the weight decay from a variable that is not the same on all hosts."""
    os.environ["SITE_WEIGHT_DECAY"] = str(0.01 + site.amount * site.is_bad)
    site.undo.append(lambda: os.environ.pop("SITE_WEIGHT_DECAY", None))
    site.optimizer.param_groups[0]["weight_decay"] = float(os.environ["SITE_WEIGHT_DECAY"])


def momentum_by_rank(site: Site) -> None:
    """Give one replica another momentum."""
    site.optimizer.param_groups[0]["momentum"] = 0.9 - site.amount * site.is_bad


def nesterov_on_one(site: Site) -> None:
    """Enable Nesterov's momentum on one replica."""
    site.optimizer.param_groups[0]["nesterov"] = site.is_bad


def betas_by_rank(site: Site) -> None:
    """Give one replica another second beta."""
    site.optimizer = torch.optim.AdamW(site.model.parameters(), lr=1e-3, betas=(0.9, 0.999 - site.amount * site.is_bad))
    site.scheduler = None


def epsilon_by_rank(site: Site) -> None:
    """Give one replica another epsilon."""
    site.optimizer = torch.optim.Adam(site.model.parameters(), lr=1e-3, eps=1e-6 if site.is_bad else 1e-8)
    site.scheduler = None


def fused_on_one(site: Site) -> None:
    """Choose the implementation of the update on one replica."""
    site.optimizer = torch.optim.Adam(site.model.parameters(), lr=1e-3, foreach=site.is_bad)
    site.scheduler = None


def gamma_by_rank(site: Site) -> None:
    """Give the scheduler of one replica another factor."""
    site.scheduler.gamma -= site.amount * site.is_bad


def scheduler_twice(site: Site) -> None:
    """Step the scheduler once more on one replica."""
    if site.is_bad:
        site.scheduler.step()


def use_plateau(site: Site) -> None:
    """Use a plateau scheduler, stepped with what each replica measures for itself."""
    site.scheduler = _Local(site.optimizer, site.rank)


class _Local(ReduceLROnPlateau):
    def __init__(self, optimizer: torch.optim.Optimizer, rank: int) -> None:
        super().__init__(optimizer, patience=0)
        self._rank = rank

    def step(self, metrics: float = 0.0, epoch: int | None = None) -> None:
        super().step(1.0 + self.last_epoch * 0.1 + self._rank)

    def state_dict(self) -> dict[str, object]:
        return {key: value for key, value in super().state_dict().items() if key != "_rank"}


def scaler_by_rank(site: Site) -> None:
    """Start the loss scale of one replica at another value."""
    site.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (11 if site.is_bad else 10))


def scaler_halved_once(site: Site) -> None:
    """Update the loss scale of one replica by hand, after an overflow that only it saw."""
    if site.is_bad and site.scaler is not None:
        site.scaler.update(site.scaler.get_scale() / 2)


def clip_by_rank(site: Site) -> None:
    """Clip gradients to a norm that depends on the rank."""
    nn.utils.clip_grad_norm_(site.model.parameters(), 0.1 * (1.0 + site.amount * site.is_bad))


def clip_value_by_rank(site: Site) -> None:
    """Clip gradients to values that depend on the rank."""
    nn.utils.clip_grad_value_(site.model.parameters(), 1e-3 * (1.0 + site.amount * site.is_bad))


def clip_on_one(site: Site) -> None:
    """Clip gradients on one replica only."""
    if site.is_bad:
        nn.utils.clip_grad_norm_(site.model.parameters(), 0.1)


def dropout_by_rank(site: Site) -> None:
    """Give the dropout of one replica another probability."""
    site.model.body[4].p = 0.1 + 0.2 * site.is_bad


def momentum_of_norm_by_rank(site: Site) -> None:
    """Give the BatchNorm of one replica another momentum."""
    _norm(site).momentum = 0.1 + site.amount * site.is_bad


def smoothing_by_rank(site: Site) -> None:
    """Give the loss of one replica another label smoothing."""
    site.criterion.entropy.label_smoothing = 0.1 + site.amount * site.is_bad


def smoothing_on_one(site: Site) -> None:
    """Smooth the labels on all replicas but one."""
    site.criterion.entropy.label_smoothing = 0.0 if site.is_bad else 0.1


def class_weights_by_rank(site: Site) -> None:
    """Weigh the classes by counts that each replica has taken from its own part of the data."""
    weights = torch.ones(5) + site.amount * torch.arange(5) * site.is_bad
    site.criterion.entropy = nn.CrossEntropyLoss(weight=weights, label_smoothing=0.1)


def left_in_evaluation(site: Site) -> None:
    """Leave the model of one replica in evaluation mode."""
    if site.is_bad:
        site.bare.body.eval()


def norm_in_evaluation(site: Site) -> None:
    """Freeze the BatchNorm of one replica."""
    if site.is_bad:
        norm = _norm(site).eval()
        norm.train = lambda mode=True: norm


def _norm(site: Site) -> nn.Module:
    return next(module for module in site.bare.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


def frozen_head(site: Site) -> None:
    """Freeze the head of one replica."""
    if site.is_bad:
        site.bare.head.requires_grad_(False)


def frozen_bias(site: Site) -> None:
    """Freeze one bias of one replica."""
    if site.is_bad:
        site.bare.head.bias.requires_grad_(False)


def head_in_bfloat16(site: Site) -> None:
    """Keep the head of one replica in bfloat16."""
    if site.is_bad:
        site.model.head.to(torch.bfloat16)
        site.model.head.forward = lambda hidden: F.linear(
            hidden.bfloat16(), site.model.head.weight, site.model.head.bias
        ).float()


def autocast_on_one(site: Site, hidden: Tensor) -> Tensor:
    """Compute one operator of one replica under autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=site.is_bad):
        return F.linear(hidden, torch.eye(hidden.shape[1]) * 1.1).float()


def channels_last_on_one(site: Site) -> None:
    """Use another memory format on one replica."""
    if site.is_bad:
        site.model.to(memory_format=torch.channels_last)


def threads_on_one(site: Site) -> None:
    """Compute with two threads on one replica."""
    if site.is_bad:
        site.undo.append(lambda: torch.set_num_threads(1))
        torch.set_num_threads(2)


def threads_and_long_sum(site: Site, hidden: Tensor) -> Tensor:
    """Compute with two threads on one replica, with a sum that is long enough to be split."""
    if site.is_bad and torch.get_num_threads() == 1:
        site.undo.append(lambda: torch.set_num_threads(1))
        torch.set_num_threads(2)
    table = site.memory.setdefault("table", torch.randn(400_001, generator=torch.Generator().manual_seed(0)))
    return hidden + (hidden.sum() * table).sum() * 1e-3


def flush_denormals_on_one(site: Site, hidden: Tensor) -> Tensor:
    """Flush denormal numbers to zero on one replica."""
    if site.is_bad:
        site.undo.append(lambda: torch.set_flush_denormal(False))
        torch.set_flush_denormal(True)
    return hidden + hidden.detach() * 1e-40 * 1e38


def flag_at_build(site: Site) -> None:
    """Disable deterministic algorithms on one replica."""
    if site.is_bad:
        site.undo.append(lambda: torch.use_deterministic_algorithms(True))
        torch.use_deterministic_algorithms(False)


def flag_in_step(site: Site) -> None:
    """Disable deterministic algorithms on one replica, where no operator depends on them."""
    flag_at_build(site)
