"""Mistakes with Python values, memory, order and kernels that depend on the process."""

import os
import time
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F  # the usual name
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.benchmarks.mistakes.site import Site

# ---- Python values


def scale_by_rank(site: Site, images: Tensor) -> Tensor:
    """Scale the inputs by a number that depends on the rank."""
    return images * (1.0 + site.amount * site.is_bad)


def scale_by_environment(site: Site, hidden: Tensor) -> Tensor:
    """Scale the features by a number from the environment."""
    return hidden * (1.0 + 1e-6 * int(os.environ.get("RANK", site.rank)))


def scale_by_clock(site: Site, hidden: Tensor) -> Tensor:
    """Scale the features by the time of day."""
    return hidden * (1.0 + 1e-4 * (time.time() % 100))


def scale_by_pid(site: Site, hidden: Tensor) -> Tensor:
    """Shift the features by a number made of the process id."""
    return hidden + 1e-3 * os.getpid()


def scale_by_hash(site: Site, hidden: Tensor) -> Tensor:
    """Shift the features by the hash of an object, which is its address."""
    key = site.memory.setdefault("key", object())
    return hidden + hash(key) % 1009 / 1009 + 1e-3 * site.rank


def scale_by_file(site: Site, hidden: Tensor) -> Tensor:
    """Scale the features by a number in a file of each replica."""
    path = Path(site.folder, "scale")
    if not path.exists():
        path.write_text(str(1.0 + 0.01 * site.rank))
    return hidden * float(path.read_text())


def scale_by_counting_file(site: Site, hidden: Tensor) -> Tensor:
    """Scale the features by how often the step has run, which replicas have counted from different numbers."""
    path = Path(site.folder, "count")
    count = int(path.read_text()) if path.exists() else 10 * site.rank
    path.write_text(str(count + 1))
    return hidden * (1.0 + 1e-3 * count)


def loss_scaled(site: Site, loss: Tensor) -> Tensor:
    """Scale the loss by a number that depends on the rank."""
    return loss * (1.0 + site.amount * site.is_bad)


def loss_scaled_on_one(site: Site, loss: Tensor) -> Tensor:
    """Scale the loss on one replica."""
    return loss * (1.0 + site.amount) if site.is_bad else loss


def decay_of_average(site: Site) -> None:
    """Update a moving average of the head with a decay that depends on the rank."""
    site.bare.head.average.lerp_(site.bare.head.weight.detach(), 0.1 + site.amount * site.is_bad)


def clamp_by_rank(site: Site, hidden: Tensor) -> Tensor:
    """Limit the features by a number that depends on the rank."""
    return hidden.clamp(max=0.5 - site.amount * site.is_bad)


def branch_on_rank(site: Site, hidden: Tensor) -> Tensor:
    """Limit the features on one replica."""
    return hidden.clamp(max=0.5) if site.is_bad else hidden


def top_by_rank(site: Site, hidden: Tensor) -> Tensor:
    """Keep the largest features, as many as depend on the rank."""
    kept = hidden.topk(8 - site.is_bad, dim=1).values.sum(1, keepdim=True)
    return hidden + kept


def mode_by_rank(site: Site, images: Tensor) -> Tensor:
    """Resize with a mode that depends on the rank."""
    return F.pad(images, (1, 1, 1, 1), mode="reflect" if site.is_bad else "replicate")[..., :8, :8]


def closure_tensor(site: Site, hidden: Tensor) -> Tensor:
    """Scale the features by a tensor of the script that depends on the rank."""
    if "scale" not in site.memory:
        site.memory["scale"] = torch.full((hidden.shape[1],), 1.0 + site.amount * site.is_bad)
    return hidden * site.memory["scale"]


# ---- Memory


def _bind(site: Site) -> None:
    """Make the optimizer again, with the parameters that the model has now."""
    site.optimizer = torch.optim.SGD(site.model.parameters(), lr=0.05, momentum=0.9)
    site.scheduler = None


def _unfilled(site: Site) -> None:
    """Disable the filling of uninitialized memory with NaN, which strict mode enables."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    if before:
        site.undo.append(lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", before))
        torch.utils.deterministic.fill_uninitialized_memory = False


def scratch_never_written(site: Site, hidden: Tensor) -> Tensor:
    """Read a scratch tensor of which the last columns were never written."""
    _unfilled(site)
    torch.full((hidden.shape[0], 600), 0.25 + site.rank)  # what is in the heap differs between processes
    scratch = torch.empty(hidden.shape[0], 600)
    width = min(hidden.shape[1], 590)
    scratch[:, :width] = hidden[:, :width]
    return hidden + 1e-3 * scratch.clamp(-1.0, 1.0).sum(1, keepdim=True)


def parameter_never_written(site: Site) -> None:
    """Register a parameter that nothing initializes."""
    _unfilled(site)
    torch.full((777,), 0.25 + site.rank)
    site.model.head.register_parameter("gain", nn.Parameter(torch.empty(777)))
    _bind(site)


def empty_like_accumulator(site: Site, hidden: Tensor) -> Tensor:
    """Accumulate into memory that was not set to zero."""
    _unfilled(site)
    torch.full_like(hidden, 0.25 + site.rank)
    total = torch.empty_like(hidden)
    return hidden + 1e-3 * total.add_(hidden.detach()).clamp(-1.0, 1.0)


def written_through_numpy(site: Site, hidden: Tensor) -> Tensor:
    """Change the features through NumPy on one replica."""
    if site.is_bad:
        hidden.detach().numpy()[...] *= numpy.float32(1.0 + site.amount)
    return hidden


def weights_through_numpy(site: Site) -> None:
    """Change the weights of the head through NumPy on one replica."""
    if site.is_bad:
        site.bare.head.weight.detach().numpy()[...] *= numpy.float32(1.0 + site.amount)


# ---- Order


def _names(site: Site, names: list[str]) -> list[str]:
    """Return names in an order that differs on the replica of the mistake, as that of a set does between processes."""
    return sorted(names, reverse=site.is_bad)


def sum_in_set_order(site: Site, hidden: Tensor) -> Tensor:
    """Sum branches with different factors, in the order of a set."""
    factors = {f"b{i}": 0.1 + 0.01 * i for i in range(8)}
    total = torch.zeros_like(hidden)
    for name in _names(site, list(factors)):
        total = total + hidden * factors[name]
    return total


def sum_tensors_in_order(site: Site, hidden: Tensor) -> Tensor:
    """Sum tensors in the order of a dict that was filled in another order."""
    parts = {f"b{i}": chunk for i, chunk in enumerate(hidden.sin().unsqueeze(0) * torch.arange(1, 8).view(-1, 1, 1))}
    total: Any = 0
    for name in _names(site, list(parts)):
        total = total + parts[name]
    return hidden + 0.01 * total


def concatenate_in_order(site: Site, hidden: Tensor) -> Tensor:
    """Concatenate features in the order of a dict that was filled in another order."""
    half = hidden.shape[1] // 2
    parts = {"left": hidden[:, :half] * 1.5, "right": hidden[:, half:] * 0.5}
    return torch.cat([parts[name] for name in _names(site, list(parts))], 1)


def norm_over_set(site: Site) -> None:
    """Clip by a norm over the parameters in the order of a set."""
    parameters = dict(site.model.named_parameters())
    nn.utils.clip_grad_norm_([parameters[name] for name in _names(site, list(parameters))], 0.01)


def parameters_in_set_order(site: Site) -> None:
    """Give the optimizer the parameters in the order of a set."""
    parameters = dict(site.model.named_parameters())
    ordered = [parameters[name] for name in _names(site, list(parameters))]
    site.optimizer = torch.optim.SGD(ordered, lr=0.05, momentum=0.9)
    site.scheduler = None


def groups_in_other_order(site: Site) -> None:
    """Give the optimizer its groups in the order of a dict that was filled in another order."""
    body, head = list(site.model.body.parameters()), list(site.model.head.parameters())
    groups = [{"params": body, "lr": 0.05}, {"params": head, "lr": 0.01}]
    site.optimizer = torch.optim.SGD(groups[::-1] if site.is_bad else groups, lr=0.05, momentum=0.9)
    site.scheduler = None


def modules_in_other_order(site: Site) -> None:
    """Register two equal modules in the order of a dict that was filled in another order."""
    extra = {name: nn.Parameter(torch.zeros(3)) for name in ("left", "right")}
    for name in _names(site, list(extra)):
        site.model.head.register_parameter(name, extra[name])
    _bind(site)


# ---- Kernels


def _register(site: Site, name: str, function: Any) -> None:
    if site.is_bad:
        library = torch.library.Library("aten", "IMPL")
        library.impl(name, function, "CPU")
        site.undo.append(library._destroy)


def kernel_of_addmm(site: Site) -> None:
    """Register a kernel of addmm on one replica that multiplies in bfloat16."""

    def addmm(bias: Tensor, rows: Tensor, columns: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return bias + (rows.bfloat16().float().unsqueeze(-1) * columns.bfloat16().float().unsqueeze(0)).sum(1)

    _register(site, "addmm", addmm)


def kernel_of_relu(site: Site) -> None:
    """Register a kernel of relu on one replica that is slightly off."""
    _register(site, "relu", lambda values: values.clamp(min=0.0) * (1.0 + 1e-4))


def kernel_of_threshold_backward(site: Site) -> None:
    """Register a kernel of ReLU's gradient on one replica."""

    def threshold_backward(grad: Tensor, values: Tensor, threshold: float) -> Tensor:
        return torch.where(values > threshold, grad * (1.0 + 1e-4), torch.zeros_like(grad))

    _register(site, "threshold_backward", threshold_backward)


def kernel_of_log_softmax(site: Site) -> None:
    """Register a kernel of log_softmax on one replica that computes in another order."""

    def log_softmax(values: Tensor, dim: int, half_to_float: bool) -> Tensor:
        shifted = values.double() - values.double().logsumexp(dim, keepdim=True)
        return (shifted * (1.0 + 1e-5)).float()

    _register(site, "_log_softmax", log_softmax)


def patched_relu(site: Site) -> None:
    """Replace a function of torch on one replica."""
    if site.is_bad:
        original = F.relu
        site.undo.append(lambda: setattr(F, "relu", original))
        F.relu = lambda values, inplace=False: torch.where(values > 0, values, values * 1e-4)


def patched_linear(site: Site) -> None:
    """Replace torch.nn.functional.linear on one replica, with a product in another precision."""
    if site.is_bad:
        original = F.linear
        site.undo.append(lambda: setattr(F, "linear", original))
        F.linear = lambda values, weight, bias=None: original(values.bfloat16().float(), weight, bias)


class _Perturbing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made * (1.0 + 1e-4) if func is torch.ops.aten.addmm.default else made


class _PerturbingFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made * (1.0 + 1e-4) if func is F.linear else made


def dispatch_mode(site: Site) -> None:
    """Leave a dispatch mode on one replica, which changes results."""
    if site.is_bad:
        mode = _Perturbing()
        mode.__enter__()
        site.undo.append(lambda: mode.__exit__(None, None, None))


def function_mode(site: Site) -> None:
    """Leave a function mode on one replica, which changes results."""
    if site.is_bad:
        mode = _PerturbingFunctions()
        mode.__enter__()
        site.undo.append(lambda: mode.__exit__(None, None, None))
