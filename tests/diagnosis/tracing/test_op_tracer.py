"""OpTracer: which operator belongs to which module and phase, and that looking changes nothing."""

import _thread
import copy
import gc
import inspect
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dreplica.diagnosis.tracing import op_signature
from dreplica.diagnosis.tracing.generators import drawn_from
from dreplica.diagnosis.tracing.op_tracer import OpRecord, OpTracer
from dreplica.state.fingerprint.fingerprint import digest_tensor

REPOSITORY = Path(__file__).parents[2]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu_(self.norm(self.conv(x)))


class Net(nn.Module):
    """Names of every length: the module that is innermost is not always the one with the longest name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem_with_a_long_name = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(Block(4), Block(4))
        self.drop = nn.Dropout(0.5)
        self.h = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem_with_a_long_name(x))
        return self.h(self.drop(x.mean((2, 3))))


def images() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def trace(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    run: Callable[[], None] | None = None,
    inputs: Tensor | None = None,
) -> OpTracer:
    def step() -> None:
        F.cross_entropy(model(images() if inputs is None else inputs), LABELS).backward()
        if optimizer is not None:
            optimizer.step()

    with OpTracer(optimizer, model=model) as tracer:
        (run or step)()
    return tracer


def places(tracer: OpTracer, name: str) -> list[tuple[str, str]]:
    """Module and phase of each operator whose name begins so."""
    return [(record.module, record.phase) for record in tracer.records if record.name.startswith(name)]


def first(records: Iterable[OpRecord], name: str) -> OpRecord:
    return next(record for record in records if record.name.startswith(name))


def test_modules_and_phases_of_nested_modules() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tracer = trace(model, optimizer)
    convolutions = ["stem_with_a_long_name", "body.0.conv", "body.1.conv"]
    assert places(tracer, "aten.convolution.") == [(path, "forward") for path in convolutions]
    assert places(tracer, "aten.convolution_backward") == [(path, "backward") for path in reversed(convolutions)]
    norms = [("body.0.norm", "forward"), ("body.1.norm", "forward")]
    assert places(tracer, "aten.native_batch_norm.") == norms
    assert places(tracer, "aten.native_batch_norm_backward") == [
        ("body.1.norm", "backward"),
        ("body.0.norm", "backward"),
    ]
    assert places(tracer, "aten.relu_.") == [("body.0", "forward"), ("body.1", "forward")]
    assert places(tracer, "aten.threshold_backward") == [("body.1", "backward"), ("body.0", "backward")]
    assert places(tracer, "aten.bernoulli_") == [("drop", "forward")]
    assert places(tracer, "aten.addmm") == [("h", "forward")]
    assert places(tracer, "aten.mm") == [("h", "backward")] * 2
    assert places(tracer, "aten.mean") == [("", "forward")]
    assert places(tracer, "aten.nll_loss_forward") == [("", "forward")]
    assert places(tracer, "aten.nll_loss_backward") == [("", "backward")]
    assert {record.phase for record in tracer.records[-4:]} == {"optimizer"}


def test_paths_are_relative_to_model() -> None:
    model = nn.ModuleDict({"trunk": nn.Linear(4, 4), "head": nn.Sequential(nn.ReLU(), nn.Linear(4, 5))})

    def run() -> None:
        hidden = model["trunk"](torch.randn(6, 4))
        F.cross_entropy(model["head"](hidden), LABELS).backward()

    tracer = trace(model, run=run)
    assert places(tracer, "aten.addmm") == [("trunk", "forward"), ("head.1", "forward")]
    assert places(tracer, "aten.relu.") == [("head.0", "forward")]


def test_paths_without_model_are_relative() -> None:
    model = Net()
    with OpTracer() as tracer:
        model(images())
    assert places(tracer, "aten.convolution.")[1:] == [("body.0.conv", "forward"), ("body.1.conv", "forward")]


def test_gradient_accumulation_has_parameters_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 5))
    inputs = torch.randn(6, 4)
    trace(model, inputs=inputs)
    assert sorted(places(trace(model, inputs=inputs), "aten.add_")) == [(m, "backward") for m in ("0", "1", "1")]


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 8)
            self.out = nn.Linear(8, 5, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.table(ids))

    tracer = trace(Tied(), inputs=LABELS)
    assert places(tracer, "aten.embedding.") == [("table", "forward")]
    assert places(tracer, "aten.embedding_dense_backward") == [("table", "backward")]
    assert {module for module, _ in places(tracer, "aten.mm")} == {"out"}
    # The two gradients are added up where the second meets the first: in the weight's own module.
    assert places(tracer, "aten.add") == [("table", "backward")]


def test_module_called_twice() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 5))
    tracer = trace(model, inputs=torch.randn(6, 4))
    assert [module for module, _ in places(tracer, "aten.addmm")] == ["0", "0", "3"]
    assert [module for module, _ in places(tracer, "aten.tanh_backward")] == ["1"]


def test_frozen_trunk_has_no_backward() -> None:
    model = Net()
    for module in (model.stem_with_a_long_name, model.body):
        module.requires_grad_(False)
    tracer = trace(model)
    assert len(places(tracer, "aten.convolution.")) == 3
    assert {module for module, phase in places(tracer, "aten.") if phase == "backward"} == {"", "h"}


def test_lstm_between_other_layers() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.lstm = nn.LSTM(4, 6, batch_first=True)
            self.out = nn.Linear(6, 5)

        def forward(self, ids: Tensor) -> Tensor:
            states, _ = self.lstm(self.embed(ids))
            return self.out(states[:, -1])

    tracer = trace(Tagger(), inputs=torch.arange(30).reshape(6, 5) % 7)
    recurrent = [record for record in tracer.records if "rnn" in record.name or "lstm" in record.name]
    assert {(record.module, record.phase) for record in recurrent} == {("lstm", "forward"), ("lstm", "backward")}
    assert places(tracer, "aten.embedding_dense_backward") == [("embed", "backward")]


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * 2.0 + 0.0


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Double.apply(x)


def test_custom_autograd_function() -> None:
    model = nn.Sequential(nn.Linear(4, 5), Doubling())
    tracer = trace(model, inputs=torch.randn(6, 4))
    assert places(tracer, "aten.mul.Tensor") == [("1", "forward"), ("1", "backward")]
    backward = [record for record in tracer.records if record.name == "aten.mul.Tensor"][1]
    assert backward.source.startswith(__file__)
    line = Path(__file__).read_text().splitlines()[int(backward.source.rpartition(":")[2]) - 1]
    assert "return grad * 2.0" in line


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
            self.last = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.inner, self.first(x), use_reentrant=reentrant))

    tracer = trace(Checkpointed(), inputs=torch.randn(6, 4))
    recomputed = [("inner.0", "backward")]
    assert places(tracer, "aten.addmm") == [(m, "forward") for m in ("first", "inner.0", "last")] + recomputed
    assert places(tracer, "aten.tanh_backward") == [("inner.1", "backward")]
    assert ("first", "backward") in places(tracer, "aten.mm")


def test_optimizer_phase_follows_backward() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)

    def run() -> None:
        F.cross_entropy(model(images()), LABELS).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        F.cross_entropy(model(images()), LABELS).backward()

    tracer = trace(model, optimizer, run)
    assert places(tracer, "aten._foreach_norm") == [("", "optimizer")]
    assert {phase for _, phase in places(tracer, "aten._foreach")} == {"optimizer"}
    assert len(places(tracer, "aten._foreach")) > 5
    assert [phase for _, phase in places(tracer, "aten.convolution.")] == ["forward"] * 6
    assert places(tracer, "aten.nll_loss_forward") == [("", "forward")] * 2


def test_closure_has_forward_and_backward() -> None:
    model = nn.Linear(4, 5)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1)
    inputs = torch.randn(6, 4)

    def closure() -> Tensor:
        loss = F.cross_entropy(model(inputs), LABELS)
        loss.backward()
        return loss

    tracer = trace(model, optimizer, lambda: optimizer.step(closure) and None)
    assert set(places(tracer, "aten.addmm")) == {("", "forward")}
    assert set(places(tracer, "aten.nll_loss_backward")) == {("", "backward")}
    assert tracer.records[-1].phase == "optimizer"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(dtype: torch.dtype) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)

    def run() -> None:
        with torch.autocast("cpu", dtype=dtype):
            loss = F.cross_entropy(model(images()), LABELS)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    tracer = trace(model, optimizer, run)
    assert ("body.0.conv", "forward") in places(tracer, "aten._to_copy")
    assert repr(dtype) in first(tracer.records, "aten._to_copy").scalars
    scaling = places(tracer, "aten._amp")
    assert set(scaling) == ({("", "optimizer")} if dtype is torch.float16 else set())


# What a record holds


def test_source_is_user_code_line() -> None:
    tracer = trace(nn.Linear(4, 5), inputs=torch.randn(6, 4))
    record = first(tracer.records, "aten.addmm")
    file, _, line = record.source.rpartition(":")
    assert file == __file__
    assert "F.cross_entropy(model(" in Path(file).read_text().splitlines()[int(line) - 1]


def test_source_is_empty_for_training_step() -> None:
    from dreplica.config.schema import TrainConfig
    from dreplica.data.loading.loader import Batch
    from dreplica.state.replica import Replica
    from dreplica.training.step import training_step

    model = Net()
    replica = Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1), None)
    batch = Batch(indices=torch.arange(6), inputs=images(), labels=LABELS)
    with OpTracer(replica.optimizer, model=model) as tracer:
        training_step(replica, batch, TrainConfig(accumulate=2))
    assert first(tracer.records, "aten.relu_").source.startswith(__file__)
    assert {record.source for record in tracer.records if record.phase != "forward"} == {""}
    assert first(tracer.records, "aten.split").source == ""


def test_batch_norm_statistics_are_outputs() -> None:
    model = nn.BatchNorm2d(3)
    with OpTracer() as tracer:
        model(images())
    record = first(tracer.records, "aten.native")
    statistics = [digest_tensor("", tensor) for tensor in (model.running_mean, model.running_var)]
    assert all(digest in record.outputs for digest in statistics)
    assert not any(digest in record.inputs for digest in statistics)


def test_digests_of_inputs_and_outputs() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 2)
    with OpTracer() as tracer:
        c = a @ b
    assert tracer.records[0].inputs == digest_tensor("", a) + digest_tensor("", b)
    assert tracer.records[0].outputs == digest_tensor("", c)
    before = digest_tensor("", a)
    with OpTracer() as tracer:
        a.mul_(2.5)
    assert tracer.records[0].inputs == before
    assert tracer.records[0].outputs == digest_tensor("", a)  # once, though it is both result and argument
    assert tracer.records[0].scalars == "2.5"


def test_scalars_distinguish_calls() -> None:
    x = torch.ones(3)
    with OpTracer() as tracer:
        torch.add(x, x, alpha=2)
        torch.add(x, x, alpha=3)
    one, other = tracer.records
    assert one.inputs == other.inputs
    assert (one.scalars, other.scalars) == ("alpha=2", "alpha=3")


@pytest.mark.parametrize("split", [torch.chunk, torch.unbind])
def test_views_with_several_results(split: Callable[..., tuple[Tensor, ...]]) -> None:
    x = torch.randn(2, 3)
    with OpTracer() as tracer:
        parts = split(x, 2) if split is torch.chunk else split(x)
    record = tracer.records[0]
    assert record.shows == b"".join(digest_tensor("", tensor) for tensor in (x, *parts))


@pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")
def test_records_hold_no_tensors() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trace(model, optimizer)
    gc.collect()
    before = sum(isinstance(item, Tensor) for item in gc.get_objects())
    tracer = trace(model, optimizer)
    gc.collect()
    assert sum(isinstance(item, Tensor) for item in gc.get_objects()) == before
    assert tracer.captured is None
    assert len(pickle.dumps(tracer.records)) < 600 * len(tracer.records)
    assert pickle.loads(pickle.dumps(tracer.records)) == tracer.records


@pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")
def test_trace_does_not_keep_model_alive() -> None:
    with OpTracer() as tracer:
        nn.Linear(1000, 2)(torch.randn(1, 1000))
    gc.collect()
    assert tracer.records
    initialized = [item for item in gc.get_objects() if type(item) in {Tensor, nn.Parameter}]
    assert not any(item.shape == (2, 1000) for item in initialized)


# Looking changes nothing


def bytes_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    tensors = [*model.state_dict().values(), *grads, *state]
    return b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)


def test_tracing_changes_neither_results_nor_generators() -> None:
    torch.manual_seed(0)
    models = [Net()]
    models.append(copy.deepcopy(models[0]))
    outcomes = []
    for model, traced in zip(models, (False, True), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        torch.manual_seed(5)
        for _ in range(2):
            optimizer.zero_grad()
            if traced:
                trace(model, optimizer)
            else:
                F.cross_entropy(model(images()), LABELS).backward()
                optimizer.step()
        outcomes.append((bytes_of(model, optimizer), torch.get_rng_state().numpy().tobytes()))
    assert outcomes[0] == outcomes[1]


def test_tracer_removes_hooks() -> None:
    hooks = nn.modules.module
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trace(model, optimizer)
    with pytest.raises(RuntimeError), OpTracer(optimizer):
        model(torch.randn(1, 2, 3))
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert places(trace(model), "aten.convolution.")[0] == ("stem_with_a_long_name", "forward")


def test_identical_runs_have_identical_records() -> None:
    def run() -> list[OpRecord]:
        torch.manual_seed(3)
        model = Net()
        return trace(model, torch.optim.AdamW(model.parameters(), lr=0.1)).records

    one, other = run(), run()
    assert len(one) > 100
    assert one == other


def test_draw_records_generator() -> None:
    x = torch.ones(100)
    torch.manual_seed(0)
    with OpTracer() as tracer:
        F.dropout(x)
        torch.rand(1)
        F.dropout(x)
    one, other = (record for record in tracer.records if record.name.startswith("aten.bernoulli_"))
    assert one.inputs == other.inputs
    assert one.generator != other.generator


# Uninitialised memory


DRAWS: dict[str, Callable[[], object]] = {
    "rand": lambda: torch.rand(3),
    "randn_like": lambda: torch.randn_like(torch.zeros(3)),
    "randint": lambda: torch.randint(5, (3,)),
    "randperm": lambda: torch.randperm(5),
    "normal": lambda: torch.normal(torch.zeros(3), 1.0),
    "uniform_": lambda: torch.zeros(3).uniform_(),
    "exponential_": lambda: torch.ones(3).exponential_(),
    "bernoulli": lambda: torch.full((3,), 0.5).bernoulli(),
    "poisson": lambda: torch.poisson(torch.ones(3)),
    "multinomial": lambda: torch.multinomial(torch.ones(3), 2),
    "dropout": lambda: nn.functional.dropout(torch.ones(3)),
    "alpha_dropout": lambda: nn.functional.alpha_dropout(torch.ones(3), training=True),
    "dropout2d": lambda: nn.functional.dropout2d(torch.ones(1, 3, 2, 2)),
    "rrelu": lambda: nn.functional.rrelu(-torch.ones(3), training=True),
    "gumbel_softmax": lambda: nn.functional.gumbel_softmax(torch.ones(1, 3)),
    "attention": lambda: nn.functional.scaled_dot_product_attention(*[torch.ones(1, 2, 3)] * 3, dropout_p=0.5),
    "fractional_max_pool2d": lambda: nn.functional.fractional_max_pool2d(torch.ones(1, 1, 4, 4), 2, output_size=2),
    "trunc_normal_": lambda: nn.init.trunc_normal_(torch.zeros(3)),
    "beta": lambda: torch.distributions.Beta(1.0, 1.0).sample(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_drawing_operators_do_not_mark_generator(draw: Callable[[], object]) -> None:
    before = torch.get_rng_state()
    with OpTracer() as tracer:
        draw()
        torch.ones(3) + 1
        draw()
    assert not torch.equal(before, torch.get_rng_state())
    assert not tracer.generator_changed


@pytest.mark.parametrize("then", [lambda: None, lambda: torch.rand(3)], ids=["at the end", "before a draw"])
def test_generator_changed_by_other_code(then: Callable[[], object]) -> None:
    with OpTracer() as tracer:
        torch.rand(3)
        state = torch.get_rng_state()
        state[104] ^= 1
        torch.set_rng_state(state)
        then()
    assert tracer.generator_changed


def test_uninitialized_memory_is_ignored() -> None:
    """The records of one program, run over memory filled with two different patterns, are the same."""
    script = """
import pickle, sys, torch
from torch import nn
from torch.nn import functional as F
from dreplica.diagnosis.tracing.op_tracer import OpTracer

torch.manual_seed(0)
with OpTracer() as tracer:
    # filled piece by piece, through views; overwritten; given as out=
    pieces = torch.empty(4, 3)
    pieces[:2] = torch.ones(2, 3)
    pieces[2:].copy_(torch.zeros(2, 3))
    (pieces * 2).sum()
    for fill in ("zero_", "normal_", "uniform_", "exponential_", "bernoulli_", "random_"):
        getattr(torch.empty(7), fill)()
    torch.empty(5).fill_(3.0)
    out = torch.empty(3)
    torch.add(torch.ones(3), 1, out=out)
    torch.empty_like(out).copy_(out)
    torch._foreach_copy_([torch.empty(3)], [out])
    # operators whose workspaces and results have parts that are never written
    x = torch.randn(3, 5, 6, requires_grad=True)
    for layer in (nn.LSTM(6, 7), nn.GRU(6, 7), nn.RReLU(), nn.RReLU().eval()):
        result = layer(x)
        (result[0] if isinstance(result, tuple) else result).sum().backward()
    scores = torch.randn(12, 4, 8, requires_grad=True).log_softmax(2)
    F.ctc_loss(scores, torch.randint(1, 8, (4, 5)), (12, 10, 9, 12), (5, 3, 4, 2)).backward()
    q = torch.randn(2, 2, 5, 8, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q).sum().backward()
    nn.EmbeddingBag(9, 4, mode="max")(torch.arange(8).reshape(2, 4)).sum().backward()
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    layers = [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3, stride=2), nn.MaxPool2d(2), nn.GroupNorm(3, 3)]
    for layer in [*layers, nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval(), nn.Upsample(scale_factor=2, mode="bilinear")]:
        layer(images).sum().backward()
sys.stdout.buffer.write(pickle.dumps(tracer.records))
"""
    records = []
    for pattern in ("85", "86"):
        environment = {**os.environ, "MALLOC_PERTURB_": pattern, "PYTHONPATH": str(REPOSITORY)}
        output = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True).stdout
        records.append(pickle.loads(output))
    one, other = records
    assert len(one) > 100
    differing = [(a.name, b.name) for a, b in zip(one, other, strict=True) if a != b]
    assert differing == []


def test_exception_tables_name_existing_operators() -> None:
    tables = (op_signature._SCRATCH_ARGUMENTS, op_signature._UNDECLARED_WRITES)
    for packet, names in [item for table in tables for item in table.items()]:
        operator = getattr(torch.ops.aten, packet.removeprefix("aten.")).default
        assert names <= {argument.name for argument in operator._schema.arguments}, packet
    for packet, positions in op_signature._SCRATCH_RESULTS.items():
        operator = getattr(torch.ops.aten, packet.removeprefix("aten.")).default
        assert max(positions) < len(operator._schema.returns), packet
    for packet in op_signature._UNINITIALIZED | op_signature._OVERWRITES:
        assert hasattr(torch.ops.aten, packet.removeprefix("aten.")), packet
    for packet in op_signature._OVERWRITES:
        name = packet.removeprefix("aten.")
        operator = getattr(torch.ops.aten, name)
        schema = getattr(operator, operator.overloads()[0])._schema
        assert schema.arguments[0].alias_info.is_write, packet


def test_read_of_uninitialized_memory_is_recorded() -> None:
    """Not a false difference but a true one: the result depends on it."""
    one, other = torch.zeros(3), torch.ones(3)
    records = []
    for garbage in (one, other):
        with OpTracer() as tracer:
            garbage.add_(1)
        records += tracer.records
    assert records[0].inputs != records[1].inputs


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_without_plain_memory() -> None:
    with OpTracer() as tracer:
        torch.ones(3, device="meta") * 2
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8).dequantize()
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        nested * 2
        torch.eye(3).to_sparse_csr() @ torch.ones(3, 1)
        torch.eye(3).to_sparse() * 2
    assert len(tracer.records) > 5


# Capture


def test_capture_keeps_tensors_of_one_operator() -> None:
    torch.manual_seed(0)
    model = Net()
    snapshot = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    records = trace(model).records
    for number, record in enumerate(records):
        if record.name not in {"aten.native_batch_norm.default", "aten.relu_.default", "aten.mm.default"}:
            continue
        model.load_state_dict(snapshot)
        model.zero_grad()
        torch.manual_seed(1)
        with OpTracer(capture=number, model=model) as tracer:
            F.cross_entropy(model(images()), LABELS).backward()
        captured = tracer.captured
        assert captured is not None
        assert tracer.records == []
        assert captured.function == record.name
        assert captured.device_type == "cpu"
        assert b"".join(digest_tensor("", tensor) for tensor in captured.inputs) == record.inputs
        assert b"".join(digest_tensor("", tensor) for tensor in captured.outputs) == record.outputs
        alive = {parameter.data_ptr() for parameter in model.parameters()}
        assert not alive & {tensor.data_ptr() for tensor in [*captured.inputs, *captured.outputs]}


def test_capture_keeps_overwritten_inputs() -> None:
    x = torch.arange(3.0)
    with OpTracer(capture=0) as tracer:
        x.mul_(2)
    assert tracer.captured is not None
    assert tracer.captured.inputs[0].tolist() == [0.0, 1.0, 2.0]
    assert tracer.captured.outputs[0].tolist() == [0.0, 2.0, 4.0]


# Compiled models


@pytest.mark.filterwarnings("error:Using `torch.compile")  # torch gives it where hooks are added to compiled modules
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_stays_compiled(backend: str, in_place: bool) -> None:
    torch._dynamo.reset()
    runs = []
    compile_with = torch._dynamo.lookup_backend(backend)

    def counting(graph: Any, inputs: Any) -> Callable[..., Any]:
        function = compile_with(graph, inputs)
        compilation = len(runs)

        def run(*args: Any) -> Any:
            runs.append(compilation)
            return function(*args)

        return run

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    model: Any = copy.deepcopy(plain)
    if in_place:
        model.compile(backend=counting)
    else:
        model = torch.compile(model, backend=counting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images()), LABELS).backward()
        optimizer.step()

    step()
    assert runs == [0]
    tracer = trace(model, optimizer, step)
    assert runs == [0, 0], "the same compiled code, compiled once"
    assert len(places(tracer, "aten.convolution")) == 2
    assert tracer.records[-1].phase == "optimizer"
    other = trace(model, optimizer, step)
    assert [record.name for record in other.records] == [record.name for record in tracer.records]


def test_compiled_function_within_model() -> None:
    torch._dynamo.reset()

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 5)
            self.scaled = torch.compile(lambda x: torch.tanh(x) * 2, backend="eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.scaled(self.layer(x))

    tracer = trace(Partly(), inputs=torch.randn(6, 4))
    assert places(tracer, "aten.addmm") == [("layer", "forward")]
    assert places(tracer, "aten.tanh.") == [("", "forward")]


def test_source_in_thread_without_frames() -> None:
    """As autograd's are that run the backward pass of a GPU: they are no threads of Python's."""
    tracer = OpTracer()
    arguments = (tracer, torch.ops.aten.add.Tensor, (), (torch.ones(2), torch.ones(2)))
    _thread.start_new_thread(inspect.unwrap(OpTracer.__torch_dispatch__), arguments)
    ends = time.monotonic() + 10
    while not tracer.records and time.monotonic() < ends:
        time.sleep(0.001)
    assert [(record.name, record.source) for record in tracer.records] == [("aten.add.Tensor", "")]


def test_gpu_draw_uses_gpu_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that makes a new tensor there, and is given none."""
    state = torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    there, here = ({"device": torch.device(kind)} for kind in ("cuda", "cpu"))
    assert drawn_from(([2],), there) == digest_tensor("", state)
    assert drawn_from(([2],), here) == digest_tensor("", torch.get_rng_state())
