"""Control messages as bytes: values survive, other classes are refused, and bytes of a stranger run nothing."""

import contextlib
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreplica.agreement.trace.line import Line
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.distributed import messages
from dreplica.distributed.messages import BadMessage, decode, encode
from dreplica.errors import ExitCode
from dreplica.state.rng import get_rng_state

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=9) | st.tuples(st.integers()), inner, max_size=3)
        | st.frozensets(st.integers(), max_size=3)
        | st.sets(st.text(max_size=9), max_size=3)
    ),
    max_leaves=10,
)


def typed(value: Any) -> Any:
    """Return a value with the types of all that it contains."""
    if isinstance(value, set | frozenset):
        return type(value), value
    if isinstance(value, dict):
        return dict, [(typed(key), typed(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [typed(item) for item in value]
    return type(value), value


@given(PLAIN)
def test_plain_values_survive_with_their_types(value: Any) -> None:
    assert typed(decode(encode(value))) == typed(value)


def test_a_nan_keeps_its_bits() -> None:
    value = numpy.frombuffer(b"\x01\x00\x00\x00\x00\x00\xf8\x7f", numpy.float64)[0].item()
    assert numpy.float64(decode(encode(value))).tobytes() == numpy.float64(value).tobytes()


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint16, torch.complex64, torch.bool, torch.int64],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 2)], ids=str)
def test_tensors_survive_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 4).to(dtype)
    again = decode(encode([tensor]))[0]
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert again.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_views_and_conjugates_arrive_as_their_values() -> None:
    tensor = torch.randn(4, 3, dtype=torch.complex64)
    assert torch.equal(decode(encode(tensor.t().conj())), tensor.t().conj())
    assert torch.equal(decode(encode(torch.nn.Parameter(tensor.real))), tensor.real)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.sparse_coo_tensor([[1, 1]], [1.0, 2.0], (3,)),
        lambda: torch.eye(4).to_sparse_csr(),
        lambda: torch.eye(4).to_sparse_csc(),
        lambda: torch.eye(4).to_sparse_bsr((2, 2)),
        lambda: torch.eye(4).to_sparse_bsc((2, 2)),
    ],
    ids=["coo", "uncoalesced", "csr", "csc", "bsr", "bsc"],
)
def test_sparse_tensors_survive(make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    again = decode(encode(tensor))
    assert (again.layout, again.shape, again.dtype) == (tensor.layout, tensor.shape, tensor.dtype)
    assert torch.equal(again.to_dense(), tensor.to_dense())
    assert tensor.layout is not torch.sparse_coo or again.is_coalesced() == tensor.is_coalesced()


def test_generator_states_survive() -> None:
    state = get_rng_state()
    assert repr(decode(encode(state))) == repr(state)


def test_own_classes_survive() -> None:
    line = Evidence.of("replays-agree")
    finding = Finding(Kind.FEW_BITS, [line], (1,))
    values = (finding, Kind.OTHER_DRAW, ExitCode.DIVERGED, torch.float16, torch.Size([2]), Path("a/b"))
    again = decode(encode(values))
    assert again == values
    assert [type(item) for item in again] == [type(item) for item in values]


def test_named_tuples_survive() -> None:
    line = Line(*range(len(Line._fields)))  # type: ignore[arg-type]
    again = decode(encode(line))
    assert (again, type(again)) == (line, Line)


@pytest.mark.parametrize("value", [object(), lambda: 0, torch.empty(2, device="meta"), {"a": [print]}])
def test_other_classes_are_refused_by_name(value: Any) -> None:
    with pytest.raises(BadMessage, match="cannot send this to the other replicas: it contains a") as caught:
        encode(value)
    assert caught.value.code == "unsendable"


def test_a_message_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_BYTES", 10)
    with pytest.raises(BadMessage, match="the limit is 10"):
        encode(b"0" * 11)


def record(module: str, name: str, fields: Any, code: int = 4) -> bytes:
    packed: bytes = msgpack.packb(msgpack.ExtType(code, msgpack.packb([module, name, fields])))
    return packed


@dataclasses.dataclass
class Foreign:
    """A dataclass of another package."""

    command: str = ""


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(pickle.dumps(print), id="pickle"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1", id="reserved"),
        pytest.param(b"\x91" * 5000, id="deep"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="long"),
        pytest.param(encode([1]) + b"\x00", id="more"),
        pytest.param(record("os", "system", {}), id="function"),
        pytest.param(record("subprocess", "Popen", {"args": ["true"]}), id="class"),
        pytest.param(record(__name__, "Foreign", {"command": ""}), id="foreign"),
        pytest.param(record("dreplica.errors", "os", {}), id="module"),
        pytest.param(record("dreplica.errors", "DreplicaError", {}), id="no-dataclass"),
        pytest.param(record("dreplica.not_loaded", "X", {}), id="not-loaded"),
        pytest.param(record("dreplica.diagnosis.evidence.finding", "Finding", {"kind": 1}), id="fields"),
        pytest.param(record("dreplica.errors", "ExitCode", 77, code=5), id="enum"),
        pytest.param(msgpack.packb(msgpack.ExtType(1, msgpack.packb(["float32", [2**40], b""]))), id="size"),
        pytest.param(msgpack.packb(msgpack.ExtType(1, msgpack.packb(["load", [0], b""]))), id="dtype"),
        pytest.param(msgpack.packb(msgpack.ExtType(2, msgpack.packb(["O", [1], b"01234567"]))), id="objects"),
        pytest.param(msgpack.packb(msgpack.ExtType(99, b"")), id="extension"),
    ],
)
def test_bytes_of_a_stranger_are_refused(data: bytes) -> None:
    with pytest.raises(BadMessage, match="a control message of"):
        decode(data)


def nested(depth: int) -> bytes:
    data: bytes = b"\x90"
    for _ in range(depth):
        data = msgpack.packb(msgpack.ExtType(10, data))
    return data


def test_tuples_nested_without_end_are_refused() -> None:
    value: Any = ()
    for _ in range(3000):
        value = (value,)
    for action in (lambda: decode(nested(3000)), lambda: encode(value)):
        with pytest.raises(BadMessage, match="more than 100 values are nested"):
            action()


@given(st.binary(max_size=200))
def test_random_bytes_end_in_a_value_or_an_error(data: bytes) -> None:
    with contextlib.suppress(BadMessage):
        decode(data)
