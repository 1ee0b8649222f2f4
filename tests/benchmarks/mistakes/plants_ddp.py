"""Mistakes in DistributedDataParallel, where each rank has its own batch."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.benchmarks.mistakes.site import Site


def buffers_not_broadcast(site: Site) -> None:
    """Let each rank keep its own BatchNorm statistics."""
    site.memory["ddp"] = {"broadcast_buffers": False}


def find_unused(site: Site) -> None:
    """Let DistributedDataParallel accept parameters without a gradient."""
    site.memory["ddp"] = {"find_unused_parameters": True}


def frozen_after_wrap(site: Site) -> None:
    """Freeze a parameter of one rank."""
    if site.is_bad:
        site.bare.head.bias.requires_grad_(False)


def comm_hook_on_one(site: Site) -> None:
    """Register a hook on one rank that scales what the others have reduced."""

    def scaled(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        work = dist.all_reduce(bucket.buffer().div_(site.size), async_op=True)
        factor = 1.0 + site.amount * site.is_bad
        return work.get_future().then(lambda future: future.value()[0] * factor)

    site.model.register_comm_hook(None, scaled)


def never_synchronized(site: Site) -> None:
    """Leave all steps in `no_sync`."""
    context = site.model.no_sync()
    context.__enter__()
    site.undo.append(lambda: context.__exit__(None, None, None))


def own_loss_around_ddp(site: Site) -> None:
    """Train a scale outside of DistributedDataParallel, whose gradients are not averaged."""
    scale = nn.Parameter(torch.ones(()))
    site.memory["scale"] = scale
    site.memory["extra"] = nn.ParameterDict({"scale": scale})
    site.optimizer.add_param_group({"params": [scale]})


def use_own_loss(site: Site, loss: Tensor) -> Tensor:
    """Scale the loss with the parameter of `own_loss_around_ddp`."""
    return loss * site.memory["scale"]


def codebook_of_local_batch(site: Site, images: Tensor) -> Tensor:
    """Initialise a codebook from the rank's own batch at the first step."""
    if "is_filled" not in site.memory:
        site.memory["is_filled"] = True
        with torch.no_grad():
            site.bare.head.bias.copy_(images.flatten()[: len(site.bare.head.bias)])
    return images


def plain_forward(site: Site) -> None:
    """Call the model inside of DistributedDataParallel, so that nothing averages gradients."""
    site.model.forward = site.bare.forward


def weights_after_wrap(site: Site) -> None:
    """Draw the head anew after wrapping, with a seed that contains the rank."""
    torch.manual_seed(site.rank)
    site.bare.head.reset_parameters()
