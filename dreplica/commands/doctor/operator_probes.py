"""Probes of strict mode: run each operator that PyTorch documents as nondeterministic once, on small inputs."""

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from dreplica.diagnosis.decision.documented_ops import DOCUMENTED

_REFUSES = "deterministic"
"""Text in the error that torch raises if an operator has no deterministic algorithm."""


def run_probes(device: torch.device) -> dict[str, str]:
    """Return operator to `raises` (in strict mode), `runs`, or another error. Strict mode must be on."""
    torch.manual_seed(0)
    return {operator: _outcome(probe, device) for operator, probe in PROBES.items()}


def unstopped(outcomes: Mapping[str, str], device_type: str) -> list[str]:
    """Return the operators that are documented to raise in strict mode on this device type, but ran."""
    return [
        operator
        for operator, outcome in outcomes.items()
        if outcome == "runs"
        and DOCUMENTED[operator].governs == "raises"
        and device_type in DOCUMENTED[operator].devices
    ]


def _outcome(probe: Callable[[torch.device], Tensor], device: torch.device) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = probe(device)
            if output.requires_grad:
                output.sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except RuntimeError as error:
        return "raises" if _REFUSES in str(error) else str(error).splitlines()[0]
    return "runs"


def _image(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(2, 2, *shape, device=device, requires_grad=True)


def _indices(device: torch.device) -> Tensor:
    return torch.tensor([0, 1, 1, 0], device=device)


def _ones(device: torch.device) -> Tensor:
    return torch.ones(4, device=device)


def _unpool(device: torch.device) -> Tensor:
    pooled, indices = F.max_pool2d(torch.randn(1, 1, 4, 4, device=device), 2, return_indices=True)
    return F.max_unpool2d(pooled, indices, [2, 2])


def _ctc(device: torch.device) -> Tensor:
    scores = torch.randn(6, 2, 4, device=device, requires_grad=True).log_softmax(2)
    targets, lengths = torch.ones(2, 2, dtype=torch.long, device=device), torch.full((2,), 6, device=device)
    return F.ctc_loss(scores, targets, lengths, torch.full((2,), 2, device=device))


def _bag(device: torch.device) -> Tensor:
    weight = torch.randn(4, 3, device=device, requires_grad=True)
    return F.embedding_bag(_indices(device).view(2, 2), weight, mode="max")


def _grid(device: torch.device) -> Tensor:
    return F.grid_sample(_image(device, 4, 4), torch.rand(2, 4, 4, 2, device=device), align_corners=False)


def _resized(mode: str, *shape: int) -> Callable[[torch.device], Tensor]:
    return lambda device: F.interpolate(_image(device, *shape), scale_factor=2, mode=mode)


PROBES: Mapping[str, Callable[[torch.device], Tensor]] = {
    "aten.index_add": lambda d: _ones(d).index_add(0, _indices(d), _ones(d)),
    "aten.scatter_add": lambda d: _ones(d).scatter_add(0, _indices(d), _ones(d)),
    "aten.scatter.src": lambda d: _ones(d).scatter(0, _indices(d), _ones(d)),
    "aten.scatter_reduce": lambda d: _ones(d).scatter_reduce(0, _indices(d), _ones(d), "amax"),
    "aten.index_copy": lambda d: _ones(d).index_copy(0, _indices(d), _ones(d)),
    "aten.index_put": lambda d: _ones(d).index_put((_indices(d),), _ones(d), accumulate=True),
    "aten.put_": lambda d: _ones(d).put_(_indices(d), _ones(d)),
    "aten.embedding_dense_backward": lambda d: F.embedding(
        _indices(d), torch.randn(4, 3, device=d, requires_grad=True)
    ),
    "aten.cumsum": lambda d: _ones(d).cumsum(0),
    "aten.median.dim": lambda d: _ones(d).median(0).values,
    "aten.histc": lambda d: _ones(d).histc(4),
    "aten.bincount": lambda d: torch.bincount(_indices(d), weights=_ones(d)),
    "aten.convolution_backward": lambda d: F.conv2d(_image(d, 6, 6), torch.randn(2, 2, 3, 3, device=d)),
    "aten.mm": lambda d: torch.randn(4, 4, device=d) @ torch.randn(4, 4, device=d),
    "aten.bmm": lambda d: torch.randn(2, 4, 4, device=d) @ torch.randn(2, 4, 4, device=d),
    "aten.max_pool3d_with_indices_backward": lambda d: F.max_pool3d(_image(d, 4, 4, 4), 2),
    "aten.avg_pool3d_backward": lambda d: F.avg_pool3d(_image(d, 4, 4, 4), 2),
    "aten._adaptive_avg_pool2d_backward": lambda d: F.adaptive_avg_pool2d(_image(d, 6, 6), 2),
    "aten.adaptive_max_pool2d_backward": lambda d: F.adaptive_max_pool2d(_image(d, 6, 6), 2),
    "aten.fractional_max_pool2d_backward": lambda d: F.fractional_max_pool2d(_image(d, 6, 6), 2, 3),
    "aten.max_unpool2d": _unpool,
    "aten.reflection_pad1d_backward": lambda d: F.pad(_image(d, 4), (1, 1), "reflect"),
    "aten.reflection_pad2d_backward": lambda d: F.pad(_image(d, 4, 4), (1, 1, 1, 1), "reflect"),
    "aten.replication_pad2d_backward": lambda d: F.pad(_image(d, 4, 4), (1, 1, 1, 1), "replicate"),
    "aten.upsample_linear1d_backward": _resized("linear", 4),
    "aten.upsample_bilinear2d_backward": _resized("bilinear", 4, 4),
    "aten.upsample_bicubic2d_backward": _resized("bicubic", 4, 4),
    "aten.upsample_trilinear3d_backward": _resized("trilinear", 4, 4, 4),
    "aten.nll_loss2d_forward": lambda d: F.cross_entropy(
        _image(d, 3, 3), torch.zeros(2, 3, 3, dtype=torch.long, device=d)
    ),
    "aten._ctc_loss_backward": _ctc,
    "aten._embedding_bag_backward": _bag,
    "aten.grid_sampler_2d_backward": _grid,
}
"""Operator, as named in `DOCUMENTED`, to a function that calls it on a device. Backward passes are run, too."""
