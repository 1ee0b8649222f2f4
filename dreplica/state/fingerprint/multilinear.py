"""The fingerprint that a GPU can compute at the speed of its memory: its definition, in NumPy.

Carter and Wegman's multilinear hashing ("Universal classes of hash functions", 1979), in the form of Lemire and Kaser
("Strongly universal string hashing is fast", 2014): 32-bit words times 64-bit keys, added up modulo 2^64. Keys and
finalizer are splitmix64's (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).

The bytes are read as little-endian words of 32 bits, the last one filled up with zero bytes, and the words laid out row
by row in blocks of `ROWS` x `COLUMNS`, the last one filled up with zero words. For each of two lanes, modulo 2^64:

    sum[b, c] = sum over the rows r of  row_key[lane, r] * turn(word[b, r, c], lane)
    content[lane] = sum over blocks b and columns c of  mix64(sum[b, c] + column_key[lane, b * COLUMNS + c])

`turn` leaves the words of lane 0 as they are and swaps the 16-bit halves of those of lane 1. Row keys are odd. Adding
is the same in any order, so any number of threads can share the work and the result stays the same. A digest is the
content of a tensor's bytes in row-major order plus the XXH3 of its name, dtype and shape, lane by lane.

How likely it is that two tensors with the same name, dtype and shape have the same digest:

- Bytes that differ in a single 32-bit word never collide, whichever bits it is: an odd number times a difference that
  is not 0 modulo 2^64 is not 0, and mix64 is a bijection. So a flipped bit, the highest and the lowest included, is
  always seen, in both lanes.
- Bytes that differ within one column of one block (words `COLUMNS` apart) are the weakest spot of multilinear hashing:
  a difference whose lowest bit is bit v of a word uses 64 - v bits of its key. Over random odd row keys it goes unseen
  by a lane with a probability of at most 2^-(63 - v). Because the halves are swapped in lane 1, v is 31 in one lane and
  15 in the other at worst (signs of float32 flipped in an even number of words): 2^-80 for both lanes together.
- Bytes that differ in several columns collide if all their sums do, or if the mixed sums cancel; with mix64 taken
  for a random function, the latter has a probability of 2^-64 for each lane, 2^-128 together.

The keys are fixed and public, so these probabilities are over keys that might have been chosen, and no promise against
someone who searches for collisions on purpose. Faults and wrong arithmetic do not know the keys.
"""

import struct

import numpy
import xxhash
from numpy.typing import NDArray

ALGORITHM = "multilinear-128/1"
"""Names the function: digests of different algorithms are never compared."""

ROWS, COLUMNS = 16, 1024
"""Of a block of words: 64 KiB."""

GOLDEN = 0x9E3779B97F4A7C15
COLUMN_SEED = 0xD1B54A32D192ED03
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

_Words = NDArray[numpy.uint64]


def digest(header: bytes, data: bytes | NDArray[numpy.uint8]) -> bytes:
    """16 bytes over a tensor's `header` (`fingerprint.header`) and its bytes in row-major order."""
    lanes = zip(header_lanes(header), content(data), strict=True)
    return struct.pack("<QQ", *(sum(pair) % 2**64 for pair in lanes))


def header_lanes(header: bytes) -> tuple[int, int]:
    """What is added to the content: two lanes of 64 bits."""
    low, high = struct.unpack("<QQ", xxhash.xxh3_128_digest(header))
    return low, high


def content(data: bytes | NDArray[numpy.uint8]) -> tuple[int, int]:
    """Two lanes of 64 bits over `data` alone; 0 where there are no bytes."""
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
    """(ROWS,) uint64, odd."""
    return mix64((numpy.arange(ROWS, dtype=numpy.uint64) * 2 + (lane + 1)) * GOLDEN) | numpy.uint64(1)


def column_keys(lane: int, positions: _Words) -> _Words:
    """A uint64 for each of `positions`, the number of a column counted through all blocks."""
    return mix64((positions * 2 + (lane + 1)) * GOLDEN + COLUMN_SEED)


def mix64(values: _Words) -> _Words:
    """splitmix64's finalizer, a bijection of 64 bits, element by element."""
    values = (values ^ (values >> numpy.uint64(30))) * MIX_1
    values = (values ^ (values >> numpy.uint64(27))) * MIX_2
    return values ^ (values >> numpy.uint64(31))
