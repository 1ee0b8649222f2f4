"""An injected fault flips exactly the configured bits, in the configured place and step, without side effects."""

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from dreplica.config.schema import FaultConfig, TrainConfig
from dreplica.data.loading.index_stream import WINDOW, IndexSampler
from dreplica.data.loading.loader import Batch
from dreplica.diagnosis.tracing.op_tracer import OpTracer
from dreplica.distributed.channel import Channel
from dreplica.errors import UsageError
from dreplica.state.replica import Replica
from dreplica.state.rng import get_rng_state, seed_generators, set_rng_state
from dreplica.state.snapshot import restore_snapshot, take_snapshot
from dreplica.training.corruption import flip_bits, scale_element
from dreplica.training.fault_injection import FaultyCoordinator, Injector
from dreplica.training.faulty_operator import FaultyOperators
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


@pytest.mark.parametrize("num_samples", [69, 80, 3], ids=["short last batch", "whole batches", "one short batch"])
def test_index_fault_at_every_step(num_samples: int) -> None:
    """Each step of two epochs, the last ones of both included."""
    sound = IndexSampler(Channel(), 5)
    per_epoch = -(-num_samples // 16)
    for step in range(1, 2 * per_epoch + 1):
        fault = FaultConfig(replica=0, step=step, target="indices")
        injector = Injector([fault], 0, make_replica())
        faulty = FaultyCoordinator(Channel(), 5, injector)
        differing = []
        for epoch in (1, 2):
            one, other = (each.training_batches(num_samples, 16, epoch) for each in (sound, faulty))
            differing += [
                (epoch - 1) * per_epoch + number + 1
                for number in range(per_epoch)
                if not torch.equal(one.batch(number), other.batch(number))
            ]
            assert torch.equal(
                faulty.redraw(num_samples, 16, epoch, per_epoch - 1),
                sound.redraw(num_samples, 16, epoch, per_epoch - 1),
            )
        assert differing == [step]
        assert injector.not_injected == []


@pytest.mark.parametrize("first", [0, 300])
@pytest.mark.parametrize("number", [300, WINDOW * 2 - 1, WINDOW * 2, WINDOW * 3 - 1, WINDOW * 3 + 3])
def test_index_fault_is_in_every_window(number: int, first: int) -> None:
    """Also of an epoch that is resumed."""
    num_samples = (WINDOW * 3 + 4) * 2 - 1
    injector = Injector([FaultConfig(replica=0, step=number + 1, target="indices")], 0, make_replica())
    streams = [
        sampler.training_batches(num_samples, 2, 1, first)
        for sampler in (IndexSampler(Channel(), 5), FaultyCoordinator(Channel(), 5, injector))
    ]
    differing = []
    for each in range(first, len(streams[0])):
        for stream in streams:
            stream.consumed(each)
        if not torch.equal(streams[0].batch(each), streams[1].batch(each)):
            differing.append(each)
    assert differing == [number]


def test_index_fault_in_chosen_element_and_bit() -> None:
    indices = torch.arange(16)
    fault = FaultConfig(replica=0, step=1, target="indices", element=5, bit=3)
    Injector([fault], 0, make_replica()).indices(1, indices, 16)
    assert indices.tolist() == [*range(5), 5 ^ 8, *range(6, 16)]
    for key, value in (("element", 16), ("bit", 4)):
        fault = FaultConfig(replica=0, step=1, target="indices", **{key: value})
        with pytest.raises(UsageError, match=f"expected {key} from 0 to {value - 1} in indices, got {value}") as raised:
            Injector([fault], 0, make_replica()).indices(1, torch.arange(16), 16)
        assert raised.value.code == "no-such-place"


# ---- a chosen element, a chosen bit, a factor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["contiguous", "transposed"])
def test_flip_chosen_bit_of_chosen_element(dtype: torch.dtype, view: str) -> None:
    width = 1 if dtype is torch.bool else 8 * dtype.itemsize
    for element in (0, 17, 23):
        for bit in {0, width // 2, width - 1}:
            tensor = make(dtype) if view == "contiguous" else make(dtype, (6, 4)).t()
            before = bits_of(tensor)
            flip_bits(tensor, 1, draw(), element, bit)
            assert bits_of(tensor) ^ before == 1 << (element * 8 * dtype.itemsize + bit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flip_bits_of_chosen_element(dtype: torch.dtype) -> None:
    width = 1 if dtype is torch.bool else 8 * dtype.itemsize
    for number in range(20):
        tensor = make(dtype)
        before = bits_of(tensor)
        flip_bits(tensor, 5, random.Random(number), element=3)
        changed = bits_of(tensor) ^ before
        assert changed.bit_count() == min(5, width)
        assert changed >> (3 * 8 * dtype.itemsize) < 1 << width
        assert changed % (1 << (3 * 8 * dtype.itemsize)) == 0


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point or d.is_complex], ids=str)
def test_scale_element_scales_one(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 25).reshape(6, 4).t().to(dtype)
    expected = tensor.clone()
    expected[2, 3] = expected[2, 3] * 1.5
    version = tensor._version
    scale_element(tensor, 1.5, draw(), 2 * 6 + 3)
    assert torch.equal(tensor, expected)
    assert tensor._version == version
    zeros = torch.zeros(50)
    zeros[31] = 1
    scale_element(zeros, 2.0, draw())
    assert zeros[31] == 2  # not one of the zeros, which a factor leaves
    scale_element(torch.zeros(2), 2.0, draw())


@pytest.mark.parametrize(
    ("target", "kind", "tensor"),
    [
        ("weights", "weights", "1.bias"),
        ("buffers", "buffers", "1.running_mean"),
        ("optimizer", "optimizer", "1.bias.momentum_buffer"),
        ("gradients", "gradients", "1.bias"),
        ("batch", "inputs", None),
        ("rng", "rng", None),
    ],
)
def test_fault_in_chosen_place(target: str, kind: str, tensor: str | None) -> None:
    fault = {"replica": 1, "step": 2, "target": target, "tensor": tensor}
    sound, injected = run(), run({**fault, "element": 2, "bit": 30})
    ((name, before),) = [(name, row) for name, row in sound[1][kind].items() if name in (tensor or name)]
    first = 2 * 64 + 24 * 8 if target == "rng" else 2 * 32
    assert injected[1][kind][name] ^ before == 1 << (first + 30)
    if target != "rng":
        scaled = run({**fault, "element": 2, "scale": -1.0})
        assert scaled[1][kind][name] ^ before == 1 << (first + 31)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"target": "weights", "tensor": "1.bias", "element": 4096}, "no-such-place"),
        ({"target": "buffers", "tensor": "1.running_mean", "bit": 32}, "no-such-place"),
        ({"target": "gradients", "tensor": "1.bias", "element": 4096}, "no-such-place"),
        ({"target": "batch", "element": 4096}, "no-such-place"),
        ({"target": "activation", "tensor": "5", "element": 40}, "no-such-place"),
        ({"target": "rng", "element": 624}, "no-such-place"),
        ({"target": "rng", "bit": 32}, "no-such-place"),
        ({"target": "buffers", "tensor": "1.num_batches_tracked", "scale": 2.0}, "unscalable-target"),
    ],
)
def test_missing_place_is_usage_error(fault: dict[str, Any], code: str) -> None:
    with pytest.raises(UsageError) as raised:
        run({"replica": 1, "step": 1, **fault})
    assert raised.value.code == code


# ---- results of operators


def calls(replica: Replica, step: int) -> tuple[list[tuple[str, bytes, bytes]], Tensor]:
    """The operators of a step as a tracer sees them, and the logits."""
    with OpTracer(replica.optimizer, model=replica.model) as tracer:
        output = training_step(replica, batch_of(step), TrainConfig())
    return [(record.name, record.inputs, record.outputs) for record in tracer.records], output.logits


def step_twice(repeat: bool, operator: str, **place: Any) -> list[tuple[Any, Any]]:
    """Steps 1, 2 and 2 again, with and without a fault at step 2 in the result of an operator."""
    rows = []
    fault = FaultConfig(replica=1, step=2, target="operator", tensor=operator, repeat=repeat, **place)
    for replica_id in (0, 1):
        replica = make_replica()
        injector = Injector([fault], replica_id, replica)
        first = calls(replica, 1)
        before = take_snapshot(replica)
        second = calls(replica, 2)
        restore_snapshot(replica, before)
        rows.append([first, second, calls(replica, 2)])
        injector.close()
    return list(zip(*rows, strict=True))


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize(
    "operator", ["aten.relu.default", "aten.addmm.default", "aten.threshold_backward.default", "aten.mul_.Tensor"]
)
def test_tracer_sees_operator_return_wrong_result(operator: str, repeat: bool) -> None:
    """Also of an operator in backward, of one that writes to its argument, and in replays."""
    first, second, replayed = step_twice(repeat, operator, element=1, bit=20)
    assert first[0][0] == first[1][0]
    for (sound, _), (wrong, _), corrupted in ((*second, True), (*replayed, repeat)):
        differing = [i for i, (one, other) in enumerate(zip(sound, wrong, strict=True)) if one != other]
        assert bool(differing) == corrupted
        if differing:
            one, other = sound[differing[0]], wrong[differing[0]]
            assert one[0] == other[0] == operator
            assert one[1] == other[1]
            assert one[2] != other[2]


def test_faulty_operator_without_result() -> None:
    """An operator on lists returns nothing: the first tensor that it writes to is corrupted."""
    corrupted = []
    tensors = [torch.ones(2), torch.ones(3)]
    with FaultyOperators(["aten._foreach_add_.Scalar"], lambda name, result: corrupted.append(result)) as operators:
        torch._foreach_add_(tensors, 1)
        operators.begin(1)
        torch._foreach_add_(tensors, 1)
        torch._foreach_add_(tensors, 1)
    assert [result is tensors[0] for result in corrupted] == [True]


def test_operator_fault_changes_one_call_and_bit() -> None:
    _, ((_, sound), (_, wrong)), _ = step_twice(False, "aten.addmm.default", element=13, bit=22)
    assert bits_of(sound) ^ bits_of(wrong) == 1 << (13 * 32 + 22)


def test_operator_fault_spares_evaluation_and_closes() -> None:
    replica = make_replica()
    fault = FaultConfig(replica=0, step=1, target="operator", tensor="aten.addmm.default", bit=30, repeat=True)
    injector = Injector([fault], 0, replica)
    x = torch.ones(2, 3)
    expected = bits_of(torch.addmm(torch.zeros(2, 2), x, x.t()))
    training_step(replica, batch_of(1), TrainConfig())
    assert injector.not_injected == []
    assert bits_of(torch.addmm(torch.zeros(2, 2), x, x.t())) == expected
    replica.model.eval()
    replica.model(batch_of(1).inputs)
    assert bits_of(torch.addmm(torch.zeros(2, 2), x, x.t())) == expected
    injector.close()
    assert _get_current_dispatch_mode_stack() == []


def test_unknown_operator_is_usage_error() -> None:
    for name, hint in (("aten.relu.defualt", "aten.relu.default"), ("relu", ""), ("aten.relu", "aten.relu.default")):
        fault = FaultConfig(replica=0, step=1, target="operator", tensor=name)
        with pytest.raises(UsageError, match=re.escape(f"no operator {name!r} in target 'operator'")) as raised:
            Injector([fault], 0, make_replica())
        assert raised.value.code == "unknown-operator"
        assert hint in str(raised.value)
    assert _get_current_dispatch_mode_stack() == []


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
