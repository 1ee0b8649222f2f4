"""Fingerprints on a real GPU: correct while it is busy, and without synchronization."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.hasher import hasher_for
from dreplica.state.fingerprint import multilinear
from dreplica.state.fingerprint.fingerprint import header
from dreplica.state.fingerprint.gpu import DeviceHash

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda:0")


@pytest.fixture
def no_synchronization() -> Iterator[None]:
    """Raise for operators that synchronize (torch.cuda.set_sync_debug_mode); waiting for an event is allowed."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    model = model.to(DEVICE, memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_gpu_hasher_is_chosen() -> None:
    hasher = hasher_for([DEVICE])
    assert hasher.is_asynchronous
    assert hasher.algorithm.endswith(multilinear.ALGORITHM)


def test_hash_is_ordered_in_its_stream() -> None:
    """The digest is that of the state between two writes in the same stream."""
    values = torch.zeros(2**26, device=DEVICE)
    hashing = DeviceHash(DEVICE)
    hashing.start([("t", values)])  # the tables are made, and the kernel is compiled
    digests = []
    for number in range(20):
        values.fill_(number)
        digests.append(hashing.start([("t", values)]))
        values.fill_(-1.0)
    for number in (0, 1, 19):
        data = torch.full((2**26,), float(number)).view(torch.uint8).numpy()
        assert digests[number].all == multilinear.digest(header("t", values.dtype, values.shape), data)
    assert len({each.all for each in digests}) == 20


def test_checked_step_does_not_synchronize(no_synchronization: None) -> None:
    model, optimizer = model_and_optimizer()
    agreement = Agreement(model, optimizer, lag=1)
    inputs = torch.randn(32, 3, 8, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (32,), device=DEVICE)
    for step in range(20):
        if step == 3:  # by now all tables are there
            torch.cuda.set_sync_debug_mode("error")
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = nn.functional.cross_entropy(outputs, labels)
        loss.backward()
        optimizer.step()
        agreement.step(batch=(inputs, labels), outputs=outputs, loss=loss)
    torch.cuda.set_sync_debug_mode("default")
    agreement.finish()
    assert agreement.agreed_until == 20


def test_host_is_one_step_ahead_of_device() -> None:
    """`step` returns while the device is still computing that step."""
    model, optimizer = model_and_optimizer()
    agreement = Agreement(model, optimizer, lag=1)
    inputs = torch.randn(8, 3, 8, 8, device=DEVICE)
    for _ in range(3):
        model(inputs).sum().backward()
        optimizer.step()
        agreement.step(batch=inputs)
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    behind = torch.cuda.Event()
    behind.record()
    agreement.step(batch=inputs)
    assert not behind.query()
    agreement.finish()
    assert behind.query()


@pytest.mark.parametrize("bit", [0, 7, 15, 31])
def test_flipped_bit_on_device_is_found(bit: int) -> None:
    model, optimizer = model_and_optimizer()
    agreement = Agreement(model, optimizer)
    before = agreement.observe()
    weight = model[4].weight.data.view(torch.int32)
    weight[3, 5] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32, device=DEVICE)
    after = agreement.observe()
    differing = [name for name in before if before[name] != after[name]]
    assert differing == ["weights"]
    entries = before["weights"].entries(), after["weights"].entries()
    assert [name for name in entries[0] if entries[0][name] != entries[1][name]] == ["4.weight"]


def test_memory_used_by_checks() -> None:
    """Less than 16 MB for 1 GiB of weights, also in other layouts."""
    weights = [torch.zeros(2**16, 2**10, device=DEVICE), torch.zeros(2**10, 2**16, device=DEVICE).t()]
    weights += [torch.zeros(2**12, 2**10, 4, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)]
    hashing = DeviceHash(DEVICE)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert len(hashing.start([(str(number), weight) for number, weight in enumerate(weights)]).all) == 16 * 3
    assert torch.cuda.max_memory_allocated() - before < 16 * 10**6


def test_two_streams() -> None:
    values = torch.arange(2**20, device=DEVICE)
    hashing, other = DeviceHash(DEVICE), torch.cuda.Stream()
    here = hashing.start([("t", values)])
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        there = hashing.start([("t", values)])
    assert here.all == there.all


def test_cuda_graph_is_not_disturbed() -> None:
    """The step is captured in a graph by the user, and checks run outside it."""
    model, optimizer = model_and_optimizer()
    inputs = torch.randn(8, 3, 8, 8, device=DEVICE)
    stream = torch.cuda.Stream()
    with warnings.catch_warnings(), torch.cuda.stream(stream):
        warnings.simplefilter("ignore")
        for _ in range(3):
            optimizer.zero_grad()
            model(inputs).sum().backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        model(inputs).sum().backward()
        optimizer.step()
    agreement = Agreement(model, optimizer, lag=1)
    for _ in range(3):
        graph.replay()
        agreement.step(batch=inputs)
    agreement.finish()
    assert agreement.agreed_until == 3


def test_model_compiled_to_cuda_graphs_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients are in memory that the next step overwrites."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # two trainings are compared
    inputs = torch.randn(8, 3, 8, 8, device=DEVICE)
    labels = torch.randint(10, (8,), device=DEVICE)
    weights = []
    for checked in (False, True):
        model, optimizer = model_and_optimizer()
        compiled = torch.compile(model, mode="reduce-overhead")
        agreement = Agreement(compiled, optimizer, lag=1)
        for _ in range(8):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            outputs = compiled(inputs)
            loss = nn.functional.cross_entropy(outputs, labels)
            loss.backward()
            optimizer.step()
            if checked:
                agreement.step(batch=(inputs, labels), outputs=outputs, loss=loss)
        agreement.finish()
        assert agreement.agreed_until == 8 * checked
        weights.append(torch.cat([each.detach().flatten() for each in model.parameters()]).cpu().numpy().tobytes())
        torch._dynamo.reset()
    assert weights[0] == weights[1]
