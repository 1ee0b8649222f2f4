"""Definition, in NumPy, of the fingerprint that a GPU computes at the speed of its memory.

It is Carter and Wegman's multilinear hashing ("Universal classes of hash functions", 1979), in the form of Lemire and
Kaser ("Strongly universal string hashing is fast", 2014): products of 32-bit words and 64-bit keys, added modulo 2^64.
The keys and the finalizer are those of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014). The Triton kernel in `gpu_kernel` must compute exactly this, and is tested against it before use.

The bytes are read as little-endian 32-bit words; the last word is padded with zero bytes. The words are laid out row by
row in blocks of `ROWS` x `COLUMNS`; the last block is padded with zero words. For each of two lanes, modulo 2^64:

    sum[b, c] = sum over the rows r of  row_key[lane, r] * turn(word[b, r, c], lane)
    content[lane] = sum over blocks b and columns c of  mix64(sum[b, c] + column_key[lane, b * COLUMNS + c])

`turn` is the identity in lane 0 and swaps the 16-bit halves of each word in lane 1. Row keys are odd. Addition gives
the same result in any order, so any number of threads can share the work. A digest is the content of a tensor's bytes
in row-major order plus the XXH3 of its name, dtype and shape, lane by lane.

The probability that two different tensors with equal name, dtype and shape have equal digests:

- Tensors that differ in a single 32-bit word never collide, whichever bits differ: an odd number times a difference
  that is not 0 modulo 2^64 is not 0, and mix64 is a bijection. A flipped bit, the highest and the lowest included, is
  therefore always detected, in both lanes.
- Tensors that differ within one column of one block (in words at a distance of `COLUMNS`) are the weakest case of
  multilinear hashing. A difference whose lowest bit is bit v of a word uses 64 - v bits of its key. Over random odd
  row keys, a lane misses it with a probability of at most 2^-(63 - v). Because lane 1 swaps the halves, v is at worst
  31 in one lane and 15 in the other (signs of float32 flipped in an even number of words): 2^-80 for both lanes.
- Tensors that differ in several columns collide if all column sums do, or if the mixed sums cancel. If mix64 is taken
  as a random function, the latter has a probability of 2^-64 for each lane and 2^-128 for both.

The keys are fixed and public, so these are probabilities over the choice of keys. They do not hold against an adversary
who searches for collisions. Faults and wrong arithmetic do not know the keys.
"""

import struct

import numpy
import xxhash
from numpy.typing import NDArray

ALGORITHM = "multilinear-128/1"
"""Name of the hash function. Digests of different algorithms are never compared."""

ROWS, COLUMNS = 16, 1024
"""The shape of a block of words: 64 KiB."""

GOLDEN = 0x9E3779B97F4A7C15
COLUMN_SEED = 0xD1B54A32D192ED03
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

_Words = NDArray[numpy.uint64]


def digest(header: bytes, data: bytes | NDArray[numpy.uint8]) -> bytes:
    """Return 16 bytes over a tensor's `header` (`fingerprint.header`) and its bytes in row-major order."""
    lanes = zip(header_lanes(header), content(data), strict=True)
    return struct.pack("<QQ", *(sum(pair) % 2**64 for pair in lanes))


def header_lanes(header: bytes) -> tuple[int, int]:
    """Return the two lanes of 64 bits that are added to the content."""
    low, high = struct.unpack("<QQ", xxhash.xxh3_128_digest(header))
    return low, high


def content(data: bytes | NDArray[numpy.uint8]) -> tuple[int, int]:
    """Return two lanes of 64 bits over `data` alone, 0 if it is empty."""
    raw = numpy.frombuffer(data, numpy.uint8)
    num_blocks = -(-raw.size // (4 * ROWS * COLUMNS))
    padded = numpy.zeros(num_blocks * 4 * ROWS * COLUMNS, numpy.uint8)
    padded[: raw.size] = raw
    words = padded.view("<u4").reshape(num_blocks, ROWS, COLUMNS)
    turned = (words << numpy.uint32(16)) | (words >> numpy.uint32(16))
    positions = numpy.arange(num_blocks * COLUMNS, dtype=numpy.uint64).reshape(num_blocks, COLUMNS)
    lanes = []
    for lane, own in enumerate((words, turned)):
        sums = numpy.zeros((num_blocks, COLUMNS), numpy.uint64)
        for row, key in enumerate(row_keys(lane)):
            sums += own[:, row].astype(numpy.uint64) * key
        lanes.append(int(mix64(sums + column_keys(lane, positions)).sum(dtype=numpy.uint64)))
    return lanes[0], lanes[1]


def row_keys(lane: int) -> _Words:
    """Return the odd row keys of a lane, (ROWS,) uint64."""
    return mix64((numpy.arange(ROWS, dtype=numpy.uint64) * 2 + (lane + 1)) * GOLDEN) | numpy.uint64(1)


def column_keys(lane: int, positions: _Words) -> _Words:
    """Return the uint64 key of each column, given the columns' indices counted through all blocks."""
    return mix64((positions * 2 + (lane + 1)) * GOLDEN + COLUMN_SEED)


def mix64(values: _Words) -> _Words:
    """Apply the finalizer of splitmix64, a bijection of 64 bits, to each element."""
    values = (values ^ (values >> numpy.uint64(30))) * MIX_1
    values = (values ^ (values >> numpy.uint64(27))) * MIX_2
    return values ^ (values >> numpy.uint64(31))
