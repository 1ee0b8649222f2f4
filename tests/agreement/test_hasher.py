"""Hashing of all stages of a step together, each tensor on its device."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from dreplica.agreement import hasher as hashing
from dreplica.agreement.hasher import Hasher, KernelError, common_hasher, hasher_for
from dreplica.distributed.channel import Channel
from dreplica.state.fingerprint import gpu as device_module
from dreplica.state.fingerprint import multilinear
from dreplica.state.fingerprint.fingerprint import ALGORITHM, digest_tensor, header
from dreplica.state.fingerprint.gpu import DeviceHash, computes_as_defined
from dreplica.state.fingerprint.pending_digests import Digests
from dreplica.state.stages import make_stage

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_dimensions(tensor: Tensor) -> bool:
    """Select tensors as `is_cuda` would: the step counts of a model on a GPU are on the CPU, too."""
    return tensor.dim() > 0


def defined(name: str, tensor: Tensor) -> bytes:
    data = tensor.cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
    return multilinear.digest(header(name, tensor.dtype, tensor.shape), data.numpy())


def entries() -> dict[str, list[tuple[str, Any]]]:
    images = torch.randn(2, 3, 4, 5, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return {
        "batch": [("inputs", images), ("labels", torch.arange(2, device=DEVICE)), ("note", b"x")],
        "gradients": [("weight", None), ("weight", torch.ones(3, device=DEVICE)), ("step", torch.tensor(3.0))],
    }


def test_hasher_keeps_order_and_makes_names_distinct() -> None:
    given = entries()
    observation = Hasher(has_dimensions).start(given)
    assert list(observation.stages) == ["batch", "gradients"]
    batch, gradients = observation.stages["batch"], observation.stages["gradients"]
    (_, images), (_, labels), _ = given["batch"]
    on_cpu = {stage: make_stage(rows).entries() for stage, rows in given.items()}
    assert list(batch.entries().items()) == [
        ("inputs", defined("inputs", images)),
        ("labels", defined("labels", labels)),
        ("note", on_cpu["batch"]["note"]),
    ]
    assert list(gradients.entries().items()) == [
        ("weight", on_cpu["gradients"]["weight"]),
        ("weight#2", defined("weight#2", given["gradients"][1][1])),
        ("step", on_cpu["gradients"]["step"]),
    ]
    sizes = [images.nbytes + labels.nbytes, 12 + 4]
    assert [batch.num_bytes, gradients.num_bytes, observation.num_bytes] == [*sizes, sum(sizes)]


def test_hasher_default_is_cpu() -> None:
    given = entries()
    hasher = Hasher()
    assert hasher.start(given).stages == {stage: make_stage(rows) for stage, rows in given.items()}
    assert (hasher.algorithm, hasher.is_asynchronous) == (ALGORITHM, False)
    assert Hasher(has_dimensions).algorithm == f"{ALGORITHM}+{multilinear.ALGORITHM}"


def test_hasher_launches_once_and_reuses_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    launched, uploaded = [], []
    original = device_module._on_host
    launch = device_module.launch
    monkeypatch.setattr(device_module, "launch", lambda *args: (launched.append(args), launch(*args)))
    monkeypatch.setattr(device_module, "_on_host", lambda *args: (uploaded.append(args), original(*args))[1])
    hasher, given = Hasher(has_dimensions), entries()
    first = hasher.start(given).stages
    assert hasher.start(given).stages == first
    moved = {stage: [(name, _clone(value)) for name, value in rows] for stage, rows in given.items()}
    assert hasher.start(moved).stages == first
    assert len(launched) == 3
    assert len({args[1].data_ptr() for args in launched}) == 1
    assert len(uploaded) == 2  # in place of one for each
    given["batch"][0][1].view(-1)[7:8].neg_() if given["batch"][0][1].is_contiguous() else given["batch"][0][1].neg_()
    changed = hasher.start(given).stages
    assert changed["batch"] != first["batch"]
    assert changed["gradients"] == first["gradients"]


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def test_plan_depends_on_layout_name_and_dtype() -> None:
    square = torch.randn(4, 4, device=DEVICE)
    hashing = DeviceHash(DEVICE)
    for name, tensor in (("a", square), ("a", square.t()), ("b", square), ("a", square.view(torch.int32))):
        assert hashing.start([(name, tensor)]).all == defined(name, tensor)


def test_number_of_plans_is_limited() -> None:
    hashing = DeviceHash(DEVICE)
    for size in [*range(1, 30), 3]:
        tensor = torch.full((size,), 7, dtype=torch.uint8, device=DEVICE)
        assert hashing.start([("t", tensor)]).all == defined("t", tensor)
    assert len(hashing._plans) == device_module._MOST_PLANS


def test_digest_is_of_the_state_at_start() -> None:
    tensor = torch.ones(100, device=DEVICE)
    before = defined("t", tensor)
    digests = DeviceHash(DEVICE).start([("t", tensor)])
    tensor.zero_()
    assert digests.all == before


class Subclass(Tensor):
    """A subclass whose bytes may be anywhere."""


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3).as_subclass(Subclass),
        lambda: torch.eye(3).to_sparse(),
    ],
    ids=["subclass", "sparse"],
)
def test_subclass_and_sparse_are_hashed_on_cpu(make: Callable[[], Tensor]) -> None:
    tensor = make()
    assert Hasher(has_dimensions).start({"s": [("t", tensor)]}).stages["s"].digests == digest_tensor("t", tensor)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_unhashable_tensor_is_named() -> None:
    for tensor in (torch.eye(3).to_sparse_csr(), nn.LazyLinear(3).weight, torch.empty(2, 2, device="meta")):
        with pytest.raises(TypeError, match="'head'"):
            Hasher(lambda tensor: not tensor.is_meta).start({"s": [("head", tensor)]})


def test_conjugates_negations_parameters_and_strides() -> None:
    numbers = torch.randn(6, dtype=torch.complex64, device=DEVICE)
    sliced = torch.randn(4, 6, 8, 10, device=DEVICE).contiguous(memory_format=torch.channels_last)[:, :, ::2, ::2]
    tensors = [numbers.conj(), numbers.conj().imag, nn.Parameter(torch.ones(2, 2, device=DEVICE)), sliced]
    named = [(f"t{number}", tensor) for number, tensor in enumerate(tensors)]
    expected = [defined(name, tensor.detach().resolve_conj().resolve_neg()) for name, tensor in named]
    assert DeviceHash(DEVICE).start(named).all == b"".join(expected)


# Which of them to use


class _Event:
    """A fake event that writes the digests when a caller waits."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.waits = rows, 0

    def query(self) -> bool:
        return self.waits > 0

    def synchronize(self) -> None:
        self.waits += 1
        self.rows.fill_(1)


def test_digests_wait_once_until_written() -> None:
    rows = torch.zeros(2, 2, dtype=torch.int64)
    event = _Event(rows)
    digests = Digests(rows, event)  # type: ignore[arg-type]
    assert not digests.ready
    assert digests.all == numpy.ones(4, numpy.int64).tobytes() == digests.all
    assert digests.ready
    assert event.waits == 1


def test_computes_as_defined_detects_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert computes_as_defined(DEVICE)
    with torch.device("meta"):  # where new tensors go by default
        assert computes_as_defined(DEVICE)
    launch = device_module.launch
    monkeypatch.setattr(device_module, "launch", lambda *args: (launch(*args), args[-1][3, 1].bitwise_xor_(1)))
    assert not computes_as_defined(DEVICE)


def _fail(device: torch.device) -> bool:
    raise RuntimeError("no C compiler")


@pytest.mark.parametrize(
    ("check", "devices", "warnings"),
    [
        (lambda device: True, ["cpu"], []),
        (lambda device: True, ["cpu", "mps", "xpu"], []),
        (
            _fail,
            ["cuda:0"],
            ["fingerprints are computed on the CPU, not on cuda:0: RuntimeError: no C compiler"],
        ),
    ],
    ids=["cpu", "others", "without a compiler"],
)
def test_hasher_for_falls_back_to_cpu(
    check: Callable[[torch.device], bool],
    devices: Sequence[str],
    warnings: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(device_module, "computes_as_defined", check)
    with caplog.at_level(logging.WARNING, logger="dreplica"):
        assert hasher_for(map(torch.device, devices)).algorithm == ALGORITHM
    assert caplog.messages == warnings


@pytest.mark.skipif(torch.version.cuda is None, reason="a build of torch without CUDA")
def test_hasher_for_tries_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(device_module, "computes_as_defined", lambda device: not tried.append(device))
    hasher = hasher_for(map(torch.device, ["cpu", "cuda:1", "cuda:0", "cuda:1"]))
    assert tried == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert hasher.is_asynchronous
    monkeypatch.setattr(device_module, "computes_as_defined", lambda device: device.index == 0)
    with pytest.raises(KernelError, match=r"kernel on cuda:1 computes wrong digests"):
        hasher_for(map(torch.device, ["cuda:0", "cuda:1"]))


def test_copy_to_cpu_in_every_step_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """The meta device represents a device without a kernel."""
    elsewhere = torch.empty(2, device="meta")
    hashing._warn_of_copy.cache_clear()
    with pytest.raises(TypeError, match="with memory"):
        digest_tensor("t", elsewhere)
    assert caplog.messages == []
    for _ in range(2):
        with pytest.raises(TypeError, match="with memory"):
            Hasher().start({"s": [("t", elsewhere)]})
    assert caplog.messages == ["fingerprints of meta tensors are computed on a copy in CPU memory, which is slow"]


class _FailingOnSecond(Channel):
    """A channel between two replicas, of which the other one has a faulty kernel."""

    def gather(self, value: Any) -> list[Any]:
        return [value, ("xxh3-128", "wrong digests on cuda:1")]


def test_faulty_kernel_of_another_replica_is_raised_here() -> None:
    with pytest.raises(KernelError, match="replica 1: wrong digests on cuda:1"):
        common_hasher([], _FailingOnSecond())
