"""Mistakes in the course of a step: code that runs once, or on one replica only."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.mistakes.site import Site


def clamp_bias(site: Site) -> None:
    """Limit a bias on one replica."""
    if site.is_bad:
        with torch.no_grad():
            site.bare.head.bias.clamp_(-1e-4, 1e-4)


def scale_head(site: Site) -> None:
    """Scale the weights of the head on one replica."""
    if site.is_bad:
        with torch.no_grad():
            site.bare.head.weight.mul_(1.0 + site.amount)


def zero_unit(site: Site) -> None:
    """Prune a unit of the head on one replica."""
    if site.is_bad:
        with torch.no_grad():
            site.bare.head.weight[site.number % 5].zero_()


def forward_of_body(site: Site, images: Tensor) -> Tensor:
    """Run a layer with BatchNorm once more in training mode on one replica, for monitoring."""
    if site.is_bad:
        first, last = (0, 2) if site.network == "cnn" else (0, 4)
        with torch.no_grad():
            site.bare.body[first:last](images * 0.5)
    return images


def forward_with_dropout(site: Site, images: Tensor) -> Tensor:
    """Run the body once more in training mode on one replica, with its dropout."""
    if site.is_bad:
        with torch.no_grad():
            site.bare.body(images)
    return images


def load_earlier_weights(site: Site) -> None:
    """Load the weights of the build on one replica, as a resumed worker does."""
    if site.is_bad:
        site.bare.load_state_dict(site.memory["built"])


def keep_built(site: Site) -> None:
    """Keep a copy of the state, for `load_earlier_weights`."""
    site.memory["built"] = copy.deepcopy(site.model.state_dict())


def load_optimizer(site: Site) -> None:
    """Load an empty optimizer state on one replica."""
    if site.is_bad:
        site.optimizer.state.clear()


def average_weights(site: Site) -> None:
    """Move the weights toward an average on one replica."""
    if site.is_bad:
        with torch.no_grad():
            for parameter in site.model.parameters():
                parameter.lerp_(torch.zeros_like(parameter), site.amount)


def extra_backward(site: Site, loss: Tensor) -> Tensor:
    """Run the backward pass once more on one replica."""
    if site.is_bad:
        loss.backward(retain_graph=True)
    return loss


def double_gradients(site: Site) -> None:
    """Accumulate the gradients once too often on one replica."""
    if site.is_bad:
        for parameter in site.model.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.grad.clone())


def drop_gradient(site: Site) -> None:
    """Set the gradient of one tensor to None on one replica."""
    if site.is_bad:
        site.bare.head.weight.grad = None


def nan_to_zero(site: Site) -> None:
    """Set small gradients to zero on one replica."""
    if site.is_bad:
        for parameter in site.model.parameters():
            parameter.grad.masked_fill_(parameter.grad.abs() < 1e-2, 0.0)


def skip_step(site: Site) -> None:
    """Skip the optimizer's step on one replica, because an exception was swallowed."""
    own = site.optimizer.step

    def step(*arguments: Any, **named: Any) -> Any:
        begun = site.steps
        if site.is_bad and begun == site.at:
            return None
        return own(*arguments, **named)

    site.optimizer.step = step


def step_twice(site: Site) -> None:
    """Take the optimizer's step twice on one replica, once."""
    own = site.optimizer.step

    def step(*arguments: Any, **named: Any) -> Any:
        if site.is_bad and site.steps == site.at:
            own(*arguments, **named)
        return own(*arguments, **named)

    site.optimizer.step = step


def skip_zero_grad(site: Site) -> None:
    """Skip `zero_grad` on one replica, once."""
    own = site.optimizer.zero_grad

    def zero_grad(set_to_none: bool = True) -> None:
        if not (site.is_bad and site.steps + 1 == site.at):
            own(set_to_none)

    site.optimizer.zero_grad = zero_grad


def never_zero_grad(site: Site) -> None:
    """Never call `zero_grad` on one replica."""
    if site.is_bad:
        site.optimizer.zero_grad = lambda set_to_none=True: None


def evaluation_mode_for_a_step(site: Site, images: Tensor) -> Tensor:
    """Run one step in evaluation mode on one replica."""
    if site.is_bad:
        site.bare.body.eval()
    return images


def back_to_training(site: Site, loss: Tensor) -> Tensor:
    """Return to training mode, after `evaluation_mode_for_a_step`."""
    site.bare.body.train()
    return loss


def count_in_attribute(site: Site, hidden: Tensor) -> Tensor:
    """Scale the features of one step on one replica, counted in an attribute of the module."""
    head = site.bare.head
    head.calls = getattr(head, "calls", 0) + 1
    if site.is_bad and head.calls == site.at:
        return hidden * (1.0 + site.amount)
    return hidden


def count_in_file(site: Site, hidden: Tensor) -> Tensor:
    """Scale the features of one step on one replica, counted in a file."""
    path = Path(site.folder, "calls")
    calls = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(calls))
    if site.is_bad and calls == site.at:
        return hidden * (1.0 + site.amount)
    return hidden


def count_in_variable(site: Site, hidden: Tensor) -> Tensor:
    """Scale the features of one step on one replica, counted in a variable of the script."""
    if site.is_bad:
        return hidden * (1.0 + site.amount)
    return hidden


def rescale_buffers(site: Site) -> None:
    """Reset the running statistics of BatchNorm on one replica."""
    if site.is_bad:
        for module in site.bare.modules():
            if hasattr(module, "reset_running_stats"):
                module.reset_running_stats()


# ---- At most 8 bits of one tensor: nothing tells these from a fault of memory, except where they are written by
# an operator.


def negate_element(site: Site) -> None:
    """Negate one weight on one replica, through NumPy."""
    if site.is_bad:
        weight = site.bare.head.weight.detach().numpy()
        weight[0, site.number % 32] = -weight[0, site.number % 32]


def halve_element(site: Site) -> None:
    """Halve one gradient on one replica."""
    if site.is_bad:
        site.bare.head.weight.grad.view(-1)[site.number % 100].mul_(2.0)


def set_bit_of_buffer(site: Site) -> None:
    """Count one batch more in BatchNorm's counter on one replica."""
    if site.is_bad:
        for module in site.bare.modules():
            if getattr(module, "num_batches_tracked", None) is not None:
                module.num_batches_tracked += 1
