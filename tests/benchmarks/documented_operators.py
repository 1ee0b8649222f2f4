"""Operators that the installed torch documents as nondeterministic, with an example of each."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Work = Callable[[], object]
"""Runs the operator once from the same inputs, with its backward pass if that is what is documented."""


@dataclass(frozen=True)
class Entry:
    """A line of the documentation of `torch.use_deterministic_algorithms`."""

    names: tuple[str, ...]
    """Names of the operators, such as `torch.nn.Conv2d`."""
    text: str
    """The whole line."""
    raises: bool
    """True if it is in the list of operators that raise, False if in that of those that become deterministic."""

    @property
    def elsewhere(self) -> bool:
        """True if it is only about devices that replicas do not run on, or about quantized tensors."""
        return ("MPS" in self.text and "CUDA" not in self.text) or "quantized" in self.text


def read_documentation(text: str) -> list[Entry]:
    """Return the entries of both lists. Raises ValueError if the text does not have them."""
    _, _, rest = text.partition("will act")
    switching, found, raising = rest.partition("operations will throw")
    if not found:
        raise ValueError("the documentation of torch.use_deterministic_algorithms no longer has its two lists")
    switching, raising = switching.partition("The following")[0], raising.partition("In addition")[0]
    return [*_entries(switching, raises=False), *_entries(raising, raises=True)]


def _entries(text: str, raises: bool) -> Iterator[Entry]:
    for item in re.split(r"^\s*\* ", text, flags=re.MULTILINE)[1:]:
        words = " ".join(item.split())
        yield Entry(tuple(re.findall(r":(?:class|func):`([\w.]+)`", words)), words, raises)


@dataclass(frozen=True)
class Case:
    """An example of an operator."""

    name: str
    documented: str | None
    """Name in the documentation, None if it is documented elsewhere."""
    operator: str
    """Name that a trace should show, as in `dreplica.diagnosis.decision.nondeterministic_ops`."""
    make: Callable[[torch.device, int], Work]
    """Makes the work, given a device and about how many numbers to write."""
    by_process: bool = False
    """True if it varies from process to process, but not within one."""
    benchmark: bool = False
    """True if cuDNN times its algorithms."""
    devices: tuple[str, ...] = ("cuda", "cpu")


def _images(device: torch.device, size: int, *shape: int) -> Tensor:
    """Return about `size` random numbers, float32 (n, *shape), that require a gradient."""
    count = max(2, size // torch.Size(shape).numel())
    return torch.randn(count, *shape, device=device, requires_grad=True)


def _through(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Work:
    """Return work that runs forward and backward, with noise as the gradient of the output."""
    noise = torch.randn_like(function(inputs.detach()))

    def work() -> object:
        return torch.autograd.grad(function(inputs), inputs, noise)

    return work


def _backward(function: Callable[[Tensor], Tensor], *shape: int) -> Callable[[torch.device, int], Work]:
    return lambda device, size: _through(function, _images(device, size, *shape))


def _places(device: torch.device, size: int, few: int = 8) -> Tensor:
    """Return indices to write to, int64 (size,), each of a few places many times."""
    return torch.randint(few, (size,), device=device)


def _writes(write: Callable[[Tensor, Tensor, Tensor], object]) -> Callable[[torch.device, int], Work]:
    """Return a case's `make` for writes of many numbers into 8 places: `write(target, places, values)`."""

    def make(device: torch.device, size: int) -> Work:
        places, values = _places(device, size), torch.randn(size, device=device)
        return lambda: write(torch.zeros(8, device=device), places, values)

    return make


def _of(compute: Callable[[Tensor], object], *shape: int) -> Callable[[torch.device, int], Work]:
    def make(device: torch.device, size: int) -> Work:
        values = torch.randn(*shape, device=device) if shape else torch.randn(size, device=device)
        return lambda: compute(values)

    return make


def _few_numbers(compute: Callable[[Tensor], object]) -> Callable[[torch.device, int], Work]:
    """Return a case's `make` for an operator on numbers of which many are equal."""

    def make(device: torch.device, size: int) -> Work:
        values = torch.randint(4, (16, max(64, size // 16)), device=device).float()
        return lambda: compute(values)

    return make


def _embedding(device: torch.device, size: int) -> Work:
    places, weight = _places(device, size // 16), torch.randn(8, 16, device=device, requires_grad=True)
    return _through(lambda table: F.embedding(places, table), weight)


def _bag(device: torch.device, size: int) -> Work:
    places, weight = _places(device, size // 16).view(-1, 4), torch.randn(8, 16, device=device, requires_grad=True)
    return _through(lambda table: F.embedding_bag(places, table, mode="max"), weight)


def _indexed(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[torch.device, int], Work]:
    """Return a case's `make` for the backward pass of reading a few places many times."""

    def make(device: torch.device, size: int) -> Work:
        places = _places(device, size)
        return _through(lambda values: function(values, places), torch.randn(8, device=device, requires_grad=True))

    return make


def _unpool(dims: int) -> Callable[[torch.device, int], Work]:
    def make(device: torch.device, size: int) -> Work:
        edge = {1: 64, 2: 16, 3: 8}[dims]
        values = torch.randn(max(2, size // edge**dims), 1, *[edge] * dims, device=device)
        pool, unpool = getattr(F, f"max_pool{dims}d"), getattr(F, f"max_unpool{dims}d")
        pooled, indices = pool(values, 3, stride=1, return_indices=True)  # windows overlap: places are written twice
        others = torch.randn_like(pooled)
        return lambda: unpool(others, indices, 3, stride=1)

    return make


def _ctc(device: torch.device, size: int) -> Work:
    steps, batch, classes = 50, max(2, size // 2000), 20
    scores = torch.randn(steps, batch, classes, device=device, requires_grad=True)
    targets = torch.randint(1, 3, (batch, 20), device=device)
    lengths = torch.full((batch,), steps), torch.full((batch,), 20)
    return _through(lambda x: F.ctc_loss(x.log_softmax(2), targets, *lengths, reduction="none"), scores)


def _nll(device: torch.device, size: int) -> Work:
    scores = torch.randn(2, 4, max(8, size // 512), 64, device=device, requires_grad=True)
    labels = torch.randint(4, (2, *scores.shape[2:]), device=device)
    weights = torch.rand(4, device=device) + 0.5
    return _through(lambda x: F.cross_entropy(x, labels, weights), scores)


def _grid(dims: int) -> Callable[[torch.device, int], Work]:
    def make(device: torch.device, size: int) -> Work:
        images = torch.randn(2, 2, *[8] * dims, device=device, requires_grad=True)
        edge = max(8, round((size / 4) ** (1 / dims)))
        grid = torch.rand(2, *[edge] * dims, dims, device=device) * 2 - 1
        return _through(lambda x: F.grid_sample(x, grid, align_corners=False), images)

    return make


def _resized(mode: str, dims: int) -> Callable[[torch.device, int], Work]:
    def make(device: torch.device, size: int) -> Work:
        edge = max(8, round((size / 4) ** (1 / dims)))
        images = torch.randn(2, 2, *[4] * dims, device=device, requires_grad=True)
        return _through(lambda x: F.interpolate(x, size=[edge] * dims, mode=mode), images)

    return make


def _convolved(module: Callable[..., nn.Module], dims: int) -> Callable[[torch.device, int], Work]:
    def make(device: torch.device, size: int) -> Work:
        layer = module(8, 16, 3, padding=1).to(device)
        edge = max(4, round((size / 64) ** (1 / dims)))
        images = torch.randn(8, 8, *[edge] * dims, device=device)
        noise = torch.randn_like(layer(images))
        return lambda: torch.autograd.grad(layer(images), layer.weight, noise)

    return make


def _sparse_product(device: torch.device, size: int) -> Work:
    dense = torch.randn(2, 64, max(64, size // 128), device=device)
    sparse = (dense * (dense > 1)).transpose(1, 2).contiguous().to_sparse()
    return lambda: torch.bmm(sparse, dense)


def _attention(backend: SDPBackend) -> Callable[[torch.device, int], Work]:
    def make(device: torch.device, size: int) -> Work:
        length = max(32, size // 4096)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        query, key, value = (
            torch.randn(2, 4, length, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
        )
        noise = torch.randn_like(query)

        def work() -> object:
            with sdpa_kernel(backend):
                return torch.autograd.grad(
                    F.scaled_dot_product_attention(query, key, value), (query, key, value), noise
                )

        return work

    return make


def _recurrent(device: torch.device, size: int) -> Work:
    layer = nn.LSTM(32, 32, num_layers=2).to(device)
    steps = torch.randn(max(4, size // 2**14), 16, 32, device=device)
    return lambda: torch.autograd.grad(layer(steps)[0].square().sum(), list(layer.parameters()))


def _pads(mode: str, dims: int) -> Callable[[torch.device, int], Work]:
    return _backward(lambda x: F.pad(x, (7,) * (2 * dims), mode), 2, *[8] * dims)


_NN, _F, _T = "torch.nn.", "torch.nn.functional.", "torch.Tensor."

CASES: tuple[Case, ...] = (
    *(
        Case(f"{name}{dims}d, backward", f"{_NN}{name}{dims}d", "convolution_backward", _convolved(module, dims))
        for name, modules in (
            ("Conv", (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
            ("ConvTranspose", (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)),
        )
        for dims, module in enumerate(modules, start=1)
    ),
    Case(
        "Conv2d, algorithm timed by each process",
        None,
        "convolution",
        _convolved(nn.Conv2d, 2),
        by_process=True,
        benchmark=True,
    ),
    *(
        Case(
            f"{name}Pad{dims}d, backward",
            f"{_NN}{name}Pad{dims}d",
            f"{name.lower()}_pad{dims}d_backward",
            _pads(mode, dims),
        )
        for name, mode in (("Replication", "replicate"), ("Reflection", "reflect"))
        for dims in (1, 2, 3)
    ),
    Case("bmm, sparse by dense", "torch.bmm", "bmm", _sparse_product),
    Case("cumsum", "torch.cumsum", "cumsum", _of(lambda x: x.cumsum(0))),
    Case("x[indices], backward", f"{_T}__getitem__", "_index_put_impl_", _indexed(lambda x, i: x[i])),
    Case("index_put", f"{_T}index_put", "index_put", _writes(lambda t, i, v: t.index_put((i,), v))),
    Case(
        "index_put, accumulate",
        f"{_T}index_put",
        "index_put",
        _writes(lambda t, i, v: t.index_put((i,), v, accumulate=True)),
    ),
    Case("put_", f"{_T}put_", "put_", _writes(lambda t, i, v: t.put_(i, v))),
    Case("put_, accumulate", f"{_T}put_", "put_", _writes(lambda t, i, v: t.put_(i, v, accumulate=True))),
    Case("put", None, "put", _writes(lambda t, i, v: t.put(i, v))),
    Case("scatter_add_", f"{_T}scatter_add_", "scatter_add_", _writes(lambda t, i, v: t.scatter_add_(0, i, v))),
    Case("gather, backward", "torch.gather", "scatter_add", _indexed(lambda x, i: x.gather(0, i))),
    Case("index_add", "torch.index_add", "index_add", _writes(lambda t, i, v: t.index_add(0, i, v))),
    Case("index_reduce", None, "index_reduce", _writes(lambda t, i, v: t.index_reduce(0, i, v, "mean"))),
    Case("index_select, backward", "torch.index_select", "index_add", _indexed(lambda x, i: x.index_select(0, i))),
    Case(
        "repeat_interleave, backward",
        "torch.repeat_interleave",
        "index_add",
        _indexed(lambda x, i: x.repeat_interleave(torch.bincount(i, minlength=8))),
    ),
    Case("index_copy", f"{_T}index_copy", "index_copy", _writes(lambda t, i, v: t.index_copy(0, i, v))),
    Case("scatter", f"{_T}scatter", "scatter.src", _writes(lambda t, i, v: t.scatter(0, i, v))),
    *(
        Case(
            f"scatter_reduce, {how}",
            f"{_T}scatter_reduce",
            "scatter_reduce",
            # Close to 1, so that their product is neither 0 nor infinite.
            _writes(lambda t, i, v, how=how: (t + 1).scatter_reduce(0, i, 1 + v / 1000, how)),  # type: ignore[misc]
        )
        for how in ("sum", "mean", "prod", "amax")
    ),
    Case(
        "MaxPool3d, backward",
        f"{_NN}MaxPool3d",
        "max_pool3d_with_indices_backward",
        _backward(lambda x: F.max_pool3d(x, 3, stride=1), 1, 8, 8, 8),
    ),
    Case("Embedding, backward", f"{_NN}Embedding", "embedding_dense_backward", _embedding),
    Case(
        "AvgPool3d, backward",
        f"{_NN}AvgPool3d",
        "avg_pool3d_backward",
        _backward(lambda x: F.avg_pool3d(x, 3, stride=1), 1, 8, 8, 8),
    ),
    Case(
        "AdaptiveAvgPool2d, backward",
        f"{_NN}AdaptiveAvgPool2d",
        "_adaptive_avg_pool2d_backward",
        _backward(lambda x: F.adaptive_avg_pool2d(x, 7), 2, 10, 10),
    ),
    Case(
        "AdaptiveAvgPool3d, backward",
        f"{_NN}AdaptiveAvgPool3d",
        "_adaptive_avg_pool3d_backward",
        _backward(lambda x: F.adaptive_avg_pool3d(x, 5), 2, 7, 7, 7),
    ),
    Case(
        "AdaptiveMaxPool2d, backward",
        f"{_NN}AdaptiveMaxPool2d",
        "adaptive_max_pool2d_backward",
        _backward(lambda x: F.adaptive_max_pool2d(x, 7), 2, 10, 10),
    ),
    Case(
        "FractionalMaxPool2d, backward",
        f"{_NN}FractionalMaxPool2d",
        "fractional_max_pool2d_backward",
        _backward(
            lambda x: F.fractional_max_pool2d(x, 3, 7, _random_samples=torch.full((len(x), 2, 2), 0.5).to(x)), 2, 10, 10
        ),
    ),
    Case(
        "FractionalMaxPool3d, backward",
        f"{_NN}FractionalMaxPool3d",
        "fractional_max_pool3d_backward",
        _backward(
            lambda x: F.fractional_max_pool3d(x, 3, 5, _random_samples=torch.full((len(x), 2, 3), 0.5).to(x)),
            2,
            8,
            8,
            8,
        ),
    ),
    Case("MaxUnpool1d", f"{_NN}MaxUnpool1d", "max_unpool2d", _unpool(1)),
    Case("MaxUnpool2d", f"{_NN}MaxUnpool2d", "max_unpool2d", _unpool(2)),
    Case("MaxUnpool3d", f"{_NN}MaxUnpool3d", "max_unpool3d", _unpool(3)),
    *(
        Case(
            f"interpolate, {mode}, backward",
            f"{_F}interpolate",
            f"upsample_{mode}{dims}d_backward",
            _resized(mode, dims),
        )
        for mode, dims in (("linear", 1), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3))
    ),
    Case("NLLLoss of images", f"{_NN}NLLLoss", "nll_loss2d_forward", _nll),
    Case("CTCLoss, backward", f"{_NN}CTCLoss", "_ctc_loss_backward", _ctc),
    Case("EmbeddingBag, max, backward", f"{_NN}EmbeddingBag", "_embedding_bag_dense_backward", _bag),
    Case("histc", "torch.histc", "histc", _of(lambda x: x.histc(8))),
    Case(
        "bincount, weights",
        "torch.bincount",
        "bincount",
        _writes(lambda t, i, v: torch.bincount(i, weights=v)),
    ),
    Case("median, indices", "torch.median", "median.dim", _few_numbers(lambda x: x.median(1))),
    Case("kthvalue, indices", None, "kthvalue", _few_numbers(lambda x: x.kthvalue(30, dim=1))),
    Case("grid_sample, backward", f"{_F}grid_sample", "grid_sampler_2d_backward", _grid(2)),
    Case("grid_sample of volumes, backward", f"{_F}grid_sample", "grid_sampler_3d_backward", _grid(3)),
    Case("matrix product", None, "mm", _of(lambda x: x @ x.t(), 256, 256)),
    Case("LSTM", None, "_cudnn_rnn_backward", _recurrent),
    *(
        Case(f"attention, {name}, backward", None, operator, _attention(backend), devices=devices)
        for name, backend, operator, devices in (
            (
                "flash",
                SDPBackend.FLASH_ATTENTION,
                "_scaled_dot_product_flash_attention_backward",
                ("cuda",),
            ),
            (
                "memory-efficient",
                SDPBackend.EFFICIENT_ATTENTION,
                "_scaled_dot_product_efficient_attention_backward",
                ("cuda",),
            ),
            ("cuDNN", SDPBackend.CUDNN_ATTENTION, "_scaled_dot_product_cudnn_attention_backward", ("cuda",)),
            ("math", SDPBackend.MATH, "bmm", ("cuda", "cpu")),
        )
    ),
)


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Enable or disable cuDNN's benchmark mode inside the context."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
