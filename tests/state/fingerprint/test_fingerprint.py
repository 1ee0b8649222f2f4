"""Fingerprints differ if a single bit differs, and only then."""

import ctypes
import hashlib
import resource
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dreplica.distributed.process_group import World
from dreplica.state.fingerprint import fingerprint as module
from dreplica.state.fingerprint.fingerprint import ALGORITHM, digest_bytes, digest_tensor, fingerprint, num_bytes
from tests.harness import run_replicas

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.int32,
    torch.int64,
)


pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def digest(tensor: Tensor) -> str:
    return fingerprint({"t": tensor})["t"]


def pattern(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Return bytes that are the same on every machine: SHA-256 of a counter."""
    wanted = num_elements * dtype.itemsize
    blocks = (hashlib.sha256(struct.pack("<q", i)).digest() for i in range(wanted // 32 + 1))
    raw = torch.tensor(list(b"".join(blocks)[:wanted]), dtype=torch.uint8)
    return (raw % 2).bool() if dtype is torch.bool else raw.view(dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a copy of the tensor's bytes, (elements, bytes per element) uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).reshape(-1, tensor.dtype.itemsize).clone()


def from_bytes(raw: Tensor, like: Tensor) -> Tensor:
    return raw.reshape(-1).view(like.dtype).reshape(like.shape)


# What must differ


def test_constant_tensors_differ() -> None:
    constants = (torch.zeros(64), torch.ones(64), torch.full((64,), 2.0), torch.full((64,), 3.0))
    assert len({digest(tensor) for tensor in constants}) == 4


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_flipped_bit_differs(data: st.DataObject) -> None:
    tensor = pattern(data.draw(st.integers(1, 300)), data.draw(st.sampled_from(DTYPES)))
    raw = as_bytes(tensor)
    byte = data.draw(st.integers(0, raw.numel() - 1))
    raw.view(-1)[byte] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(from_bytes(raw, tensor)) != digest(tensor)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_two_different_elements_swapped_differ(data: st.DataObject) -> None:
    tensor = pattern(data.draw(st.integers(2, 300)), data.draw(st.sampled_from(DTYPES)))
    raw = as_bytes(tensor)
    one, two = data.draw(st.tuples(*[st.integers(0, len(raw) - 1)] * 2))
    raw[[one, two]] = raw[[two, one]]
    swapped = from_bytes(raw, tensor)
    assert (digest(swapped) == digest(tensor)) == torch.equal(as_bytes(swapped), as_bytes(tensor))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sign_flips_of_any_even_number_of_elements_differ(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    tensor = torch.arange(data.draw(st.integers(2, 64))).to(dtype)
    chosen = data.draw(st.sets(st.integers(0, tensor.numel() - 1), min_size=2).filter(lambda ids: len(ids) % 2 == 0))
    flipped = tensor.clone()
    flipped[list(chosen)] = -flipped[list(chosen)]
    assert digest(flipped) != digest(tensor)


def test_permuted_rows_and_columns_differ() -> None:
    matrix = torch.arange(12.0).reshape(4, 3)
    variants = (matrix, matrix[[1, 0, 2, 3]], matrix.flip(0), matrix[:, [1, 0, 2]], matrix.flip(1))
    assert len({digest(tensor) for tensor in variants}) == 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_transpose_differs_as_a_view_and_as_a_copy(dtype: torch.dtype) -> None:
    square = pattern(25, dtype).reshape(5, 5)
    view, copy = square.t(), square.t().contiguous()
    assert not view.is_contiguous()
    assert digest(view) == digest(copy)
    assert digest(view) != digest(square)


def test_reshape_differs() -> None:
    flat = torch.arange(24.0)
    shapes = [(24,), (1, 24), (24, 1), (4, 6), (6, 4), (2, 3, 4), (4, 3, 2)]
    assert len({digest(flat.reshape(shape)) for shape in shapes}) == len(shapes)


def test_scalar_and_one_element_vector_differ() -> None:
    assert digest(torch.tensor(3.0)) != digest(torch.tensor([3.0]))


def test_same_values_in_other_dtypes_differ() -> None:
    values = torch.tensor([1.0, 2.0, -3.0])
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.complex64)
    assert len({digest(values.to(dtype)) for dtype in dtypes}) == len(dtypes)


def test_same_bytes_in_other_dtypes_differ() -> None:
    raw = torch.zeros(8)
    assert len({digest(raw.view(dtype)) for dtype in (torch.float32, torch.int32, torch.uint32)}) == 3


def test_swapped_names_differ() -> None:
    one, two = torch.ones(3), torch.zeros(3)
    assert not set(fingerprint({"a": one, "b": two}).values()) & set(fingerprint({"a": two, "b": one}).values())
    assert fingerprint({"a": one, "b": one})["a"] != fingerprint({"a": one, "b": one})["b"]


def test_zero_and_negative_zero_differ() -> None:
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 5)])
def test_empty_tensors_differ_by_shape_and_dtype(shape: tuple[int, ...]) -> None:
    assert digest(torch.empty(shape)) == digest(torch.empty(shape))
    assert digest(torch.empty(shape)) != digest(torch.empty(*shape, 1))
    assert digest(torch.empty(shape)) != digest(torch.empty(shape, dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_slice_equals_empty_tensor(dtype: torch.dtype) -> None:
    assert digest(torch.zeros(4, dtype=dtype)[0:0:2]) == digest(torch.zeros(0, dtype=dtype))


def test_bytes_differ_by_name_and_content() -> None:
    digests = {digest_bytes(name, data) for name in ("a", "b") for data in (b"", b"x", b"y")}
    assert len(digests) == 6


# What must not


def test_nan_is_stable_and_its_payload_counts() -> None:
    quiet, other = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert quiet.isnan()
    assert other.isnan()
    assert digest(quiet) == digest(quiet.clone())
    assert digest(quiet) != digest(other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_has_the_same_digest(dtype: torch.dtype) -> None:
    tensor = pattern(35, dtype).reshape(5, 7)
    shifted = torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(5, 7)  # not aligned to 16 bytes
    assert digest(tensor) == digest(tensor.clone()) == digest(shifted)
    assert digest(tensor[:, ::2]) == digest(tensor[:, ::2].contiguous())
    assert digest(tensor[0].expand(3, 7)) == digest(tensor[0].expand(3, 7).contiguous())


def test_channels_last_has_the_digest_of_its_elements() -> None:
    images = pattern(2 * 3 * 4 * 4, torch.float32).reshape(2, 3, 4, 4)
    other = images.to(memory_format=torch.channels_last)
    assert other.stride() != images.stride()
    assert digest(other) == digest(images)


def test_lazy_conjugation_and_negation_are_carried_out() -> None:
    numbers = pattern(6, torch.complex64)
    assert numbers.conj().is_conj()
    assert digest(numbers.conj()) == digest(numbers.conj().resolve_conj()) != digest(numbers)
    negated = numbers.conj().imag
    assert negated.is_neg()
    assert digest(negated) == digest(negated.resolve_neg()) != digest(numbers.imag)
    contiguous = torch._neg_view(torch.arange(3.0))
    assert contiguous.is_neg()
    assert digest(contiguous) == digest(-torch.arange(3.0))


class Renamed(Tensor):
    """A tensor subclass."""


def test_autograd_and_subclasses_do_not_matter() -> None:
    values = torch.arange(6.0)
    assert digest(nn.Parameter(values.clone())) == digest(values)
    assert digest(values.clone().requires_grad_() * 1) == digest(values)
    assert digest(values.as_subclass(Renamed)) == digest(values)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_tensors() -> None:
    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    sparse = dense.to_sparse()
    twice = torch.sparse_coo_tensor(torch.tensor([[1, 0, 1], [0, 1, 0]]), torch.tensor([1.5, 1.0, 0.5]), (2, 2))
    assert not twice.is_coalesced()
    assert digest(sparse) == digest(twice)
    variants = (dense, sparse, dense.t().to_sparse(), 2 * sparse, dense.double().to_sparse())
    assert len({digest(tensor) for tensor in variants}) == len(variants)
    larger = torch.sparse_coo_tensor(sparse.indices(), sparse.values(), (3, 3))
    assert digest(larger) != digest(sparse)


# The contract


def test_result_has_the_names_and_32_hex_digits() -> None:
    result = fingerprint({"a": torch.ones(2), "b.c": torch.zeros((), dtype=torch.bool)})
    assert list(result) == ["a", "b.c"]
    for text in result.values():
        assert len(text) == 32
        assert bytes.fromhex(text).hex() == text


GOLDEN = {
    (torch.float32, (16,)): "115cd7932d6a1476246e701d7792d9b1",
    (torch.float32, (4, 4)): "6fcfe5398d734936a94781500b714733",
    (torch.bfloat16, (3, 5)): "9c4724df77bc755bd638767b04a81d4f",
    (torch.float8_e4m3fn, (7,)): "f1df9afd4c6b456c5d6e1a1c13ca6b9a",
    (torch.complex64, (3,)): "3fcf540a3d1951c040d066648360b620",
    (torch.int64, ()): "a7ab87907da7c74bfecd657914202097",
    (torch.bool, (9,)): "0830e88868d0c6ac0021b4bbfb94fb78",
    (torch.uint8, (0,)): "f643f359f9a19528dae0f13402a422ac",
    (torch.float32, (64, 128)): "d841a20c81dfe5b166b4b6dbe6af0053",
}


@pytest.mark.parametrize(("dtype", "shape"), GOLDEN, ids=str)
def test_algorithm_name_matches_known_digests(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """If these values change, `ALGORITHM` must change, since recorded traces are compared with new ones."""
    assert ALGORITHM == "xxh3-128/1"
    tensor = pattern(torch.Size(shape).numel(), dtype).reshape(shape)
    assert fingerprint({"layer.weight": tensor})["layer.weight"] == GOLDEN[dtype, shape]


def test_algorithm_name_matches_sparse_and_bytes_digests() -> None:
    assert digest_tensor("s", torch.eye(3).to_sparse()).hex() == "855df52bd03b4f1b76ac84f4e940e6a9"
    assert digest_bytes("lr", b"0.1").hex() == "cf3214efa053c01e3f1f89928137c73e"


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:Sparse CSR")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("kind", ["meta", "sparse on meta", "csr", "quantized", "nested", "lazy", "fake", "float"])
def test_tensors_without_plain_memory_are_rejected(kind: str) -> None:
    tensor = {
        "meta": lambda: torch.empty(3, device="meta"),
        "sparse on meta": lambda: torch.empty(3, 3, device="meta", layout=torch.sparse_coo),
        "csr": lambda: torch.eye(3).to_sparse_csr(),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "lazy": lambda: torch.nn.LazyLinear(3).weight,
        "fake": lambda: FakeTensorMode().from_tensor(torch.ones(2)),
        "float": lambda: 1.5,
    }[kind]()
    with pytest.raises(
        TypeError, match=r"'head\.weight': (a fingerprint|the bytes of this FakeTensor)|must be a tensor"
    ):
        fingerprint({"head.weight": tensor})


def test_num_bytes() -> None:
    assert num_bytes(torch.zeros(3, 4)) == 48
    assert num_bytes(torch.zeros(1).expand(10)) == 40
    assert num_bytes(torch.eye(3).to_sparse()) == 3 * 2 * 8 + 3 * 4


# No copy


@pytest.mark.parametrize("dtype", DTYPES)
def test_contiguous_tensor_is_hashed_without_a_copy(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = []

    def recorded(data: Any) -> bytes:
        if isinstance(data, ctypes.Array):
            addresses.append((ctypes.addressof(data), ctypes.sizeof(data)))
        return xxhash.xxh3_128_digest(data)

    monkeypatch.setattr(module, "xxhash", SimpleNamespace(xxh3_128_digest=recorded))
    tensor = pattern(24, dtype).reshape(4, 6)
    digest_tensor("t", tensor)
    assert addresses == [(tensor.data_ptr(), tensor.nbytes)]
    tensor.resize_(100)  # as it could be before


def test_tensor_with_released_memory_is_rejected() -> None:
    tensor = torch.ones(8)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match=r"'t': the bytes of this Tensor cannot be read: it has no memory"):
        digest_tensor("t", tensor)


def _growth_of_peak_memory(world: World, num_elements: int) -> tuple[int, int]:
    def grown(tensor: Tensor) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        digest_tensor("t", tensor)
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)

    square = torch.ones(num_elements // 1024, 1024)
    return grown(square), grown(square.t())


def test_hashing_allocates_no_copy() -> None:
    (results,) = run_replicas(_growth_of_peak_memory, 1, 16 * 2**20)
    contiguous, strided = results
    assert contiguous < 2**24
    assert strided > 2**25  # the measure does see a copy of the 64 MiB


def test_tensors_without_names_are_rejected() -> None:
    with pytest.raises(TypeError, match=r"tensors must be a dict such as .*, got list"):
        fingerprint([torch.ones(1)])  # type: ignore[arg-type]
