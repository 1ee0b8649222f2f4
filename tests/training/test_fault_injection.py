"""An injected fault flips exactly the configured bits, in the configured place and step, without side effects."""

import random
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from dreplica.config.schema import FaultConfig, TrainConfig
from dreplica.data.loading.index_stream import IndexSampler
from dreplica.data.loading.loader import Batch
from dreplica.diagnosis.tracing.op_tracer import OpTracer
from dreplica.distributed.channel import Channel
from dreplica.errors import UsageError
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, seed_generators, set_rng_state
from dreplica.training.fault_injection import FaultyCoordinator, Injector, flip_bits
from dreplica.training.step import training_step
from tests.fixtures import tiny_model

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


@pytest.fixture(autouse=True)
def _restore_generators():
    state = get_rng_state()
    yield
    set_rng_state(state)


def make(dtype: torch.dtype, shape: Sequence[int] = (4, 6)) -> Tensor:
    values = torch.randint(0, 2, tuple(shape), generator=torch.Generator().manual_seed(0))
    return values.to(dtype) if dtype is torch.bool else (values * 3).to(dtype)


def bits_of(tensor: Tensor) -> int:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return int.from_bytes(data, "little")


def draw() -> random.Random:
    return random.Random("a draw")


@pytest.mark.parametrize("bits", [1, 2, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flip_bits_flips_exact_count(dtype: torch.dtype, bits: int) -> None:
    for number in range(20):
        tensor = make(dtype)
        before = bits_of(tensor)
        flip_bits(tensor, bits, random.Random(number))
        assert (bits_of(tensor) ^ before).bit_count() == bits
        assert tensor.dtype is dtype


def test_flip_bits_reaches_every_bit() -> None:
    hit = 0
    for number in range(600):
        tensor = torch.zeros(1, dtype=torch.float32)
        flip_bits(tensor, 1, random.Random(number))
        hit |= bits_of(tensor)
    assert hit == 2**32 - 1


def test_flip_bits_all_is_complement() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8):
        tensor = make(dtype, (2,))
        before, width = bits_of(tensor), 16 * tensor.element_size()
        flip_bits(tensor, 4096, draw())
        assert bits_of(tensor) ^ before == 2**width - 1


def test_flip_bits_keeps_bools_valid() -> None:
    tensor = make(torch.bool, (50,))
    expected = ~tensor
    flip_bits(tensor, 50, draw())
    assert torch.equal(tensor, expected)
    assert set(tensor.view(torch.uint8).tolist()) <= {0, 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["transposed", "strided", "expanded from a row", "0-dim"])
def test_flip_bits_in_any_memory_layout(dtype: torch.dtype, view: str) -> None:
    whole = make(dtype, (6, 8))
    tensor = {
        "transposed": whole.t(),
        "strided": whole[::2, 1::3],
        "expanded from a row": whole[2],
        "0-dim": whole[3, 3],
    }[view]
    before, around = bits_of(tensor), bits_of(whole)
    flip_bits(tensor, 1, draw())
    assert (bits_of(tensor) ^ before).bit_count() == 1
    assert (bits_of(whole) ^ around).bit_count() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flip_bits_twice_restores(dtype: torch.dtype) -> None:
    tensor = make(dtype)
    before = bits_of(tensor)
    flip_bits(tensor, 5, draw())
    assert bits_of(tensor) != before
    flip_bits(tensor, 5, draw())
    assert bits_of(tensor) == before


def test_flip_bits_is_unseen_by_autograd_and_tracers() -> None:
    weight = nn.Parameter(torch.ones(3))
    loss = (weight * weight).sum()
    version, state = weight._version, torch.get_rng_state()
    with OpTracer() as tracer:
        flip_bits(weight, 1, draw())
    assert tracer.records == []
    assert weight._version == version
    assert torch.equal(torch.get_rng_state(), state)
    loss.backward()  # raises if a saved tensor's version has moved
    assert weight.requires_grad
    assert weight.is_leaf


# ---- the injector


def make_replica() -> Replica:
    seed_generators(3)
    model = tiny_model(5).train()
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return Batch(torch.arange(8), torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 5)


STATE = ("weights", "buffers", "gradients", "optimizer", "rng", "inputs")


def step_and_look(replica: Replica, step: int) -> dict[str, dict[str, int]]:
    """The state after a step, bit by bit, by kind and name."""
    batch = batch_of(step)
    output = training_step(replica, batch, TrainConfig())
    names = {parameter: name for name, parameter in replica.model.named_parameters()}
    optimizer = {names[p]: state["momentum_buffer"] for p, state in replica.optimizer.state.items()}
    named = {
        "weights": dict(replica.model.named_parameters()),
        "buffers": dict(replica.model.named_buffers()),
        "gradients": {name: p.grad for p, name in names.items()},
        "optimizer": optimizer,
        "rng": {"torch": torch.get_rng_state()},
        "inputs": {"inputs": batch.inputs},
        "output": {"logits": output.logits},
    }
    return {kind: {name: bits_of(tensor) for name, tensor in tensors.items()} for kind, tensors in named.items()}


def run(*faults: dict[str, Any], num_steps: int = 4, replica_id: int = 1) -> list[dict[str, dict[str, int]]]:
    replica = make_replica()
    injector = Injector([FaultConfig(**fault) for fault in faults], replica_id, replica)
    seen = [step_and_look(replica, step) for step in range(1, num_steps + 1)]
    injector.close()
    return seen


def flipped(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Names of what differs, and in how many bits."""
    return {name: (one[name] ^ other[name]).bit_count() for name in one if one[name] != other[name]}


@pytest.mark.parametrize("bits", [1, 6])
@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("weights", "weights"),
        ("buffers", "buffers"),
        ("optimizer", "optimizer"),
        ("gradients", "gradients"),
        ("rng", "rng"),
        ("batch", "inputs"),
    ],
)
def test_fault_changes_one_tensor_at_its_step(target: str, kind: str, bits: int) -> None:
    sound = run()
    injected = run({"replica": 1, "step": 3, "target": target, "bits": bits})
    assert injected[:2] == sound[:2]
    differing = flipped(sound[2][kind], injected[2][kind])
    assert list(differing.values()) == [bits]
    if kind in {"weights", "buffers", "optimizer", "rng"}:  # injected at the end of the step: all the rest is untouched
        assert [other for other in STATE if sound[2][other] != injected[2][other]] == [kind]


def test_fault_changes_named_tensor() -> None:
    sound = run()
    injected = run({"replica": 1, "step": 2, "target": "weights", "tensor": "1.bias", "bits": 3})
    assert flipped(sound[1]["weights"], injected[1]["weights"]) == {"1.bias": 3}


def test_fault_in_named_activation() -> None:
    sound = run()
    injected = run({"replica": 1, "step": 2, "target": "activation", "tensor": "5", "bits": 4})
    assert flipped(sound[1]["output"], injected[1]["output"]) == {"logits": 4}
    assert sound[1]["buffers"] == injected[1]["buffers"]
    assert sound[1]["gradients"] != injected[1]["gradients"]


def test_fault_leaves_other_replicas() -> None:
    fault = {"replica": 1, "step": 2, "target": "weights"}
    assert run(fault, replica_id=0) == run()


def test_only_repeated_fault_recurs() -> None:
    """Also in replays, which count steps anew."""
    for repeat in (False, True):
        replica = make_replica()
        fault = FaultConfig(replica=1, step=2, target="gradients", tensor="5.bias", repeat=repeat)
        injector = Injector([fault], 1, replica)
        counts = []
        for step in (1, 2, 2, 3):
            replica.steps_done = step - 1
            replica.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(replica.model(batch_of(1).inputs), batch_of(1).labels)
            loss.backward()
            before = bits_of(replica.model[5].bias.grad)
            replica.optimizer.step()
            counts.append((bits_of(replica.model[5].bias.grad) ^ before).bit_count())
        injector.close()
        assert counts == ([0, 1, 1, 1] if repeat else [0, 1, 0, 0])


def test_two_faults_at_one_step() -> None:
    sound = run()
    faults = [{"replica": 1, "step": 2, "target": target} for target in ("weights", "rng")]
    injected = run(*faults)
    assert len(flipped(sound[1]["weights"], injected[1]["weights"])) == 1
    assert len(flipped(sound[1]["rng"], injected[1]["rng"])) == 1


def test_fault_spares_evaluation() -> None:
    replica = make_replica()
    fault = FaultConfig(replica=1, step=1, target="activation", tensor="5", repeat=True)
    injector = Injector([fault], 1, replica)
    inputs = batch_of(1).inputs
    replica.model.eval()
    with torch.no_grad():
        assert bits_of(replica.model(inputs)) == bits_of(replica.model(inputs))
        logits = replica.model(inputs)
    injector.close()
    with torch.no_grad():
        assert bits_of(replica.model(inputs)) == bits_of(logits)


def test_close_removes_hooks() -> None:
    targets = ("weights", "gradients", "buffers", "optimizer", "batch", "activation", "rng")
    faults = [{"replica": 1, "step": 1, "target": target, "repeat": True} for target in targets]
    replica = make_replica()
    Injector([FaultConfig(**fault) for fault in faults], 1, replica).close()
    seen = [step_and_look(replica, step) for step in (1, 2, 3, 4)]
    assert seen == run()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"target": "weights", "tensor": "5.weihgt"}, ["weights", "5.weihgt", "5.weight"]),
        ({"target": "activation", "tensor": "7"}, ["activation", "7"]),
    ],
)
def test_unknown_tensor_is_usage_error(fault: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as raised:
        run({"replica": 1, "step": 1, **fault})
    assert all(word in str(raised.value) for word in words)


def test_empty_target_is_usage_error() -> None:
    seed_generators(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    replica = Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UsageError, match="no tensor in target 'buffers'"):
        Injector([FaultConfig(replica=0, step=9, target="buffers")], 0, replica)
    with pytest.raises(UsageError, match=r"no tensor '1\.wight' in target 'weights'\. Did you mean '1\.weight'"):
        Injector([FaultConfig(replica=0, step=9, target="weights", tensor="1.wight")], 0, replica)
    injector = Injector([FaultConfig(replica=0, step=1, target="optimizer")], 0, replica)
    with pytest.raises(UsageError, match="no tensor in target 'optimizer'"):
        training_step(replica, batch_of(1), TrainConfig())
    injector.close()


def test_not_injected_lists_pending_faults() -> None:
    replica = make_replica()
    injected, late = (FaultConfig(replica=1, step=step, target="weights", repeat=True) for step in (2, 99))
    injector = Injector([injected, late], 1, replica)
    assert injector.not_injected == [injected, late]
    for step in (1, 2, 3):
        step_and_look(replica, step)
    assert injector.not_injected == [late]
    injector.close()


def test_fault_in_nested_activation() -> None:
    """As of an LSTM, which returns (output, (hidden, cell))."""
    model = nn.LSTM(4, 3)
    body = nn.Sequential(model)
    replica = Replica(body, nn.CrossEntropyLoss(), torch.optim.SGD(body.parameters(), lr=0.1))
    x = torch.ones(2, 1, 4)
    sound = body(x)[0]
    injector = Injector([FaultConfig(replica=0, step=1, target="activation", tensor="0", bits=2)], 0, replica)
    injected = body(x)[0]
    injector.close()
    assert (bits_of(sound) ^ bits_of(injected)).bit_count() == 2


# ---- indices


@pytest.mark.parametrize("num_samples", [2, 3, 5, 64, 80, 81])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_fault_in_index_stays_in_data_set(num_samples: int, bits: int) -> None:
    replica = make_replica()
    for seed in range(40):
        indices = torch.from_numpy(numpy.random.default_rng(seed).permutation(num_samples))
        received = indices.clone()
        fault = FaultConfig(replica=0, step=2, target="indices", bits=bits, seed=seed)
        injector = Injector([fault], 0, replica)
        injector.indices(1, received, num_samples)
        assert torch.equal(received, indices)
        injector.indices(2, received, num_samples)
        assert (received != indices).sum() == 1
        assert 0 <= int(received.min()) <= int(received.max()) < num_samples
        injector.indices(2, received, num_samples)
        assert (received != indices).sum() == 1  # spent


def test_faulty_coordinator_changes_one_batch() -> None:
    replica, channel = make_replica(), Channel()
    fault = FaultConfig(replica=0, step=8, target="indices")
    faulty = FaultyCoordinator(channel, 5, Injector([fault], 0, replica))
    sound = IndexSampler(channel, 5)
    differing = []
    for epoch in (1, 2):  # 5 batches each: step 8 is the third batch of epoch 2
        one, other = (each.training_batches(80, 16, epoch) for each in (sound, faulty))
        for number in range(5):
            if not torch.equal(one.batch(number), other.batch(number)):
                differing.append((epoch, number))
    assert differing == [(2, 2)]
    assert torch.equal(faulty.redraw(80, 16, 2, 2), sound.redraw(80, 16, 2, 2))
