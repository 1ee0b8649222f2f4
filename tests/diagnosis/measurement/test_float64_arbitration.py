"""Arbitration in float64: another order of summation is possible, a flipped high bit is not."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dreplica.diagnosis.measurement import float64_arbitration as arbitrate_module
from dreplica.diagnosis.measurement.float64_arbitration import Arbitration, arbitrate
from dreplica.diagnosis.tracing.op_tracer import Captured, OpTracer

SIZES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def capture(function: str, run: Callable[[], object]) -> Captured:
    """Capture the first call of `function` in `run`."""
    with OpTracer() as tracer:
        run()
    number = next(i for i, record in enumerate(tracer.records) if record.name == function)
    with OpTracer(capture=number) as tracer:
        run()
    assert tracer.captured is not None
    assert tracer.captured.function == function
    return tracer.captured


def judge(captured: Captured, *sides: list[Tensor]) -> list[bool]:
    arbitration = arbitrate(captured, sides, range(len(sides)))
    assert isinstance(arbitration, Arbitration)
    codes = [f"float64-{'within' if possible else 'outside'}" for possible in arbitration.possible]
    assert [line.code for line in arbitration.evidence] == codes
    assert [line.data["replica"] for line in arbitration.evidence] == list(range(len(sides)))
    return arbitration.possible


def flip(outputs: list[Tensor], bit: int, which: int = 0) -> list[Tensor]:
    """Flip one bit in an element of median size; `bit` counts down from the sign bit, 0."""
    copies = [output.clone(memory_format=torch.contiguous_format) for output in outputs]
    target = copies[which].reshape(-1)
    index = int((target.abs() - target.abs().float().median()).abs().argmin())
    width = 8 * target.element_size()
    mask = 1 << (width - 1 - bit)
    target.view(SIZES[target.dtype])[index] ^= mask - (1 << width) if bit == 0 else mask
    copies[which] = target.reshape(copies[which].shape)
    return copies


def exponent_bits(dtype: torch.dtype) -> int:
    return 5 if dtype is torch.float16 else 8


def in_parts(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, dim_a: int, dim_b: int) -> Tensor:
    """Sum the product in another order: in three parts with shuffled terms."""
    order = torch.randperm(a.shape[dim_a], generator=torch.Generator().manual_seed(3))
    parts = [
        multiply(a.index_select(dim_a, part).float(), b.index_select(dim_b, part).float())
        for part in order.tensor_split(3)
    ]
    return (parts[2] + (parts[0] + parts[1])).to(a.dtype)


def check(captured: Captured, other_order: list[Tensor]) -> None:
    dtype = other_order[0].dtype
    assert [tensor.shape for tensor in captured.outputs] == [tensor.shape for tensor in other_order]
    assert judge(captured, captured.outputs, other_order) == [True, True]
    corrupted = []
    for which in range(len(other_order)):
        corrupted += [flip(captured.outputs, bit, which) for bit in range(exponent_bits(dtype) + 3)]
        for value in (math.nan, math.inf, -math.inf):
            corrupted.append([output.clone() for output in captured.outputs])
            corrupted[-1][which].reshape(-1)[0] = value
    assert judge(captured, *corrupted, other_order) == [False] * len(corrupted) + [True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_mm(dtype: torch.dtype) -> None:
    a, b = random(20, 300, dtype=dtype), random(300, 12, dtype=dtype, seed=1)
    check(capture("aten.mm.default", lambda: a @ b), [in_parts(torch.mm, a, b, 1, 0)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bmm(dtype: torch.dtype) -> None:
    a, b = random(3, 8, 300, dtype=dtype), random(3, 300, 5, dtype=dtype, seed=1)
    check(capture("aten.bmm.default", lambda: torch.bmm(a, b)), [in_parts(torch.bmm, a, b, 2, 1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (-0.5, -2.0)])
def test_addmm(dtype: torch.dtype, alpha: float, beta: float) -> None:
    bias, a, b = random(12, dtype=dtype, seed=2), random(20, 300, dtype=dtype), random(300, 12, dtype=dtype, seed=1)
    captured = capture("aten.addmm.default", lambda: torch.addmm(bias, a, b, alpha=alpha, beta=beta))
    product = in_parts(torch.mm, a.float(), b.float(), 1, 0)
    check(captured, [(alpha * product + beta * bias.float()).to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mul(dtype: torch.dtype) -> None:
    a, b = random(30, 40, dtype=dtype), random(40, dtype=dtype, seed=1)
    check(capture("aten.mul.Tensor", lambda: a * b), [(a.double() * b.double()).to(dtype)])
    check(capture("aten.mul.Tensor", lambda: a * -0.3), [(a.double() * -0.3).to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add(dtype: torch.dtype) -> None:
    a, b = random(30, 40, dtype=dtype), random(30, 40, dtype=dtype, seed=1)
    expected = (a.double() - 3 * b.double()).to(dtype)
    check(capture("aten.add.Tensor", lambda: torch.add(a, b, alpha=-3)), [expected])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_reductions(dtype: torch.dtype, reduce: Callable[..., Tensor]) -> None:
    a = random(400, 6, dtype=dtype)
    name = "sum.dim_IntList" if reduce is torch.sum else "mean.dim"
    other_order = reduce(a.flip(0).float(), 0).to(dtype)
    check(capture(f"aten.{name}", lambda: reduce(a, dim=0)), [other_order])
    narrow = capture(f"aten.{name}", lambda: reduce(a, dim=-2, dtype=torch.float32))
    check(narrow, [reduce(a.flip(0).float(), 0)])
    judged = arbitrate(narrow, [narrow.outputs], [0])
    assert judged is not None
    if dtype is torch.float32:  # sums of few bits are exact; others would be only if they were compared with themselves
        assert judged.evidence[0].data["ratio"] > 0


def test_arbitrate_integer_sums_exactly() -> None:
    a = torch.arange(100)
    captured = capture("aten.sum.default", lambda: a.sum())
    assert judge(captured, captured.outputs, [torch.tensor(4951)]) == [True, False]


def convolve(dtype: torch.dtype, bias: bool, input_grad: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    inputs = random(4, 12, 9, 9, dtype=dtype).requires_grad_(input_grad)
    weight = random(6, 12, 3, 3, dtype=dtype, seed=1).requires_grad_()
    return inputs, weight, random(6, dtype=dtype, seed=2).requires_grad_() if bias else None


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution(dtype: torch.dtype) -> None:
    inputs, weight, bias = convolve(dtype, bias=True)
    captured = capture("aten.convolution.default", lambda: F.conv2d(inputs, weight, bias, padding=1))
    with torch.no_grad():
        product = in_parts(lambda a, b: F.conv2d(a, b, padding=1), inputs.float(), weight.float(), 1, 1)
        assert bias is not None
        check(captured, [(product + bias.float()[:, None, None]).to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "input_grad"), [(True, True), (False, True), (True, False)])
def test_convolution_backward(dtype: torch.dtype, bias: bool, input_grad: bool) -> None:
    """Gradients that are not requested are None; the others are compared with their own reference."""
    inputs, weight, shift = convolve(dtype, bias, input_grad)
    given = random(4, 6, 9, 9, dtype=dtype, seed=4)

    def run() -> None:
        F.conv2d(inputs, weight, shift, padding=1).backward(given)

    captured = capture("aten.convolution_backward.default", run)
    wanted = [tensor for tensor in (inputs, weight, shift) if tensor is not None and tensor.requires_grad]
    assert len(captured.outputs) == len(wanted) == 1 + bias + input_grad
    # The samples of the batch, and the output channels, in another order; each sums over one of them.
    order, channels = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 0, 3, 1, 4, 2])
    parts = [tensor.detach().float().requires_grad_() for tensor in (inputs, weight)]
    bias_part = torch.zeros(6, requires_grad=True)
    F.conv2d(parts[0][order], parts[1][channels], bias_part[channels], padding=1).backward(
        given.float()[order][:, channels]
    )
    named = zip((inputs, weight, shift), (*parts, bias_part), strict=True)
    grads = [part.grad for tensor, part in named if tensor is not None and tensor.requires_grad]
    check(captured, [grad.to(dtype) for grad in grads if grad is not None])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_arbitrate_nonfinite_inputs(value: float) -> None:
    """Any result is possible where such an input contributes. Other results are still judged."""
    a, b = random(4, 50), random(50, 3, seed=1)
    a[0, 0] = value
    captured = capture("aten.mm.default", lambda: a @ b)
    elsewhere, nowhere = captured.outputs[0].clone(), captured.outputs[0].clone()
    elsewhere[1, 0] += 1
    nowhere[0, 0] = 5
    assert judge(captured, captured.outputs, [elsewhere], [nowhere]) == [True, False, True]


def test_arbitrate_accepts_overflow() -> None:
    a = torch.full((2, 4), 1e20)
    captured = capture("aten.mm.default", lambda: a @ a.t())
    assert captured.outputs[0].isinf().all()
    assert judge(captured, captured.outputs) == [True]


def test_arbitrate_empty_results() -> None:
    captured = capture("aten.mm.default", lambda: torch.zeros(0, 4) @ torch.zeros(4, 3))
    assert judge(captured, captured.outputs) == [True]


def test_arbitrate_tf32_only_where_allowed() -> None:
    """TensorFloat-32 results are possible only if it is allowed, and only on a GPU."""
    a, b = random(8, 64), random(64, 8, seed=1)
    captured = capture("aten.mm.default", lambda: a @ b)
    tf32 = [((a * (1 + 2.0**-12)) @ b)]  # a systematic error as large as that of rounding to 10 bits of mantissa
    assert judge(captured, tf32) == [False]
    on_gpu = Captured(captured.inputs, captured.outputs, captured.function, captured.arguments, "cuda")
    assert judge(on_gpu, tf32) == [False]
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert judge(on_gpu, tf32) == [True]
        assert judge(captured, tf32) == [False]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_arbitrate_unknown_operator_is_none() -> None:
    x = random(4, 4)
    captured = capture("aten.exp.default", lambda: x.exp())
    assert arbitrate(captured, [captured.outputs], [0]) is None


EXACT = {
    "aten.relu.default": lambda x: x.relu(),
    "aten.relu_.default": lambda x: x.clone().relu_(),
    "aten.clamp.default": lambda x: x.clamp(-0.1, 0.3),
    "aten.where.self": lambda x: torch.where(x > 0, x, -x),
    "aten.cat.default": lambda x: torch.cat([x, x]),
    "aten.index.Tensor": lambda x: x[:, torch.tensor([2, 0])],
    "aten.masked_fill.Scalar": lambda x: x.masked_fill(x > 0, 0.1),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("function", EXACT)
def test_arbitrate_exact_operators_have_one_result(function: str, dtype: torch.dtype) -> None:
    x = random(6, 7, dtype=dtype)
    x[0, 0], x[0, 1] = math.nan, -math.inf
    captured = capture(function, lambda: EXACT[function](x))
    (sound,) = captured.outputs
    target = torch.full_like(sound, 9.0)
    arbitration = arbitrate(captured, [[sound], [torch.nextafter(sound, target)]], [0, 1])
    assert arbitration is not None
    assert arbitration.possible == [True, False]
    assert [line.code for line in arbitration.evidence] == ["float64-equal", "float64-unequal"]
    assert arbitration.evidence[1].data["replica"] == 1
    assert judge_again(captured, sound), "an in-place operator must not change the captured inputs"


def judge_again(captured: Captured, sound: Tensor) -> bool:
    arbitration = arbitrate(captured, [[sound]], [0])
    assert arbitration is not None
    return arbitration.possible == [True]


def test_arbitrate_in_place_products() -> None:
    x = random(30, 40)
    captured = capture("aten.mul_.Tensor", lambda: x.clone().mul_(0.3))
    assert judge(captured, captured.outputs, flip(captured.outputs, 3)) == [True, False]
    double = capture("aten.mul_.Tensor", lambda: x.double().mul_(0.3))
    for _ in range(2):  # the second time from the same inputs
        assert judge(double, double.outputs, flip(captured.outputs, 3)) == [True, False]
    counted = capture("aten.add_.Tensor", lambda: torch.tensor(41).add_(1))
    assert judge(counted, counted.outputs, [torch.tensor(43)]) == [True, False]


def test_arbitrate_sparse_tensors_as_dense() -> None:
    a, b = random(4, 4).relu(), random(4, 4, seed=1)
    sparse = a.to_sparse()
    captured = Captured([sparse, b], [a @ b], "aten.mm.default", ((sparse, b), {}))
    assert judge(captured, [a @ b], [2 * (a @ b)]) == [True, False]
    total = a.to_sparse() + a.to_sparse()
    captured = capture("aten.add.Tensor", lambda: a.to_sparse() + a.to_sparse())
    assert judge(captured, [total], [total * 2]) == [True, False]


def test_arbitrate_accepts_allowed_onednn_precision() -> None:
    a, b = random(8, 64), random(64, 8, seed=1)
    captured = capture("aten.mm.default", lambda: a @ b)
    rounded = [a.bfloat16().float() @ b.bfloat16().float()]
    assert judge(captured, rounded) == [False]
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    matmul.fp32_precision = "bf16"
    try:
        assert judge(captured, rounded) == [True]
        assert judge(captured, [rounded[0] * 100]) == [False]
    finally:
        matmul.fp32_precision = "none"


def test_arbitrate_reads_new_precision_flags() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    a, b = random(8, 64), random(64, 8, seed=1)
    captured = capture("aten.mm.default", lambda: a @ b)
    on_gpu = Captured(captured.inputs, captured.outputs, captured.function, captured.arguments, "cuda")
    matmul.fp32_precision = "tf32"
    try:
        assert judge(on_gpu, [((a * (1 + 2.0**-12)) @ b)]) == [True]
    finally:
        matmul.fp32_precision = before


def test_arbitrate_distrusts_wrong_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    bias, a, b = random(12, seed=2), random(20, 300), random(300, 12, seed=1)
    runs = {
        "aten.mm.default": lambda: a @ b,
        "aten.addmm.default": lambda: torch.addmm(bias, a, b, alpha=-0.5, beta=2.0),
        "aten.mul.Tensor": lambda: a * 0.3,
        "aten.add.Tensor": lambda: torch.add(a, a, alpha=-3),
        "aten.relu.default": lambda: a.relu(),
        "aten.mm.default ": lambda: (a * math.nan) @ b,
        "aten.mul.Tensor ": lambda: (a > 0) * (a < 1),
        "aten.add.Tensor ": lambda: torch.arange(5) + torch.arange(5),
    }
    sound = arbitrate_module._run
    for name, run in runs.items():
        captured = capture(name.strip(), run)
        judged = arbitrate(captured, [captured.outputs], [0])
        assert judged is not None
        assert judged.trusted
    for name in ("aten.mm.default", "aten.addmm.default", "aten.mul.Tensor", "aten.add.Tensor", "aten.relu.default"):
        captured = capture(name, runs[name])
        monkeypatch.setattr(arbitrate_module, "_run", lambda *args: [part * 1.000001 for part in sound(*args)])
        judged = arbitrate(captured, [captured.outputs], [0])
        monkeypatch.setattr(arbitrate_module, "_run", sound)
        assert judged is not None
        assert not judged.trusted
