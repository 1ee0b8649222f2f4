"""Lines of a trace: what they hold, how long they are, and that no change to them passes for a result."""

import itertools
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from dreplica.agreement.trace import writer
from dreplica.agreement.trace.line import GENERATORS, Line
from dreplica.agreement.trace.line_format import Header, encode_content, parse_header, read_lines
from dreplica.agreement.trace.reader import TRACE_NAME, Trace
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.errors import UsageError
from dreplica.state.fingerprint.stage import STAGES, Stage
from tests.agreement.recording import record

FORMAT_1 = Path(__file__).parent / "format1"


def lines_of(path: Path) -> list[Line]:
    return list(Trace(path).lines())


@pytest.mark.parametrize("not_drawn", [(), ("python",), ("numpy",), GENERATORS])
@pytest.mark.parametrize("coordinate", [None, (0,), (3, 17)])
def test_lines_hold_what_was_written(
    not_drawn: tuple[str, ...], coordinate: tuple[int, ...] | None, tmp_path: Path
) -> None:
    path = tmp_path / TRACE_NAME
    axes = ("tp", "pp")[: len(coordinate or ())]
    rows = itertools.product([0, 1, 10**12], [False, True], [None, 1, 10**9], [True, False], [STAGES, STAGES[3:4], ()])
    expected, evaluations = [], Counter[int]()
    with TraceWriter(path, 2, axes=axes) as trace:
        for step, is_evaluation, epoch, agreed, names in rows:
            evaluations[step] += is_evaluation
            stages = {name: Stage(("x",), f"{name}{step}".encode()) for name in names}
            keywords = {"is_evaluation": is_evaluation, "coordinate": coordinate, "not_drawn": not_drawn}
            trace.step(step, epoch, agreed, stages, **keywords)
            digests = b"".join(stage.digest for stage in stages.values())
            key, number = (step, is_evaluation), max(evaluations[step], 1)
            expected.append(Line(key, epoch, agreed, tuple(names), digests, not_drawn, coordinate, number))
    assert Trace(path).axes == axes
    assert lines_of(path) == expected


def test_stages_are_in_the_order_of_the_header(tmp_path: Path) -> None:
    stages = {name: Stage((name,), b"x") for name in reversed(STAGES)}
    with TraceWriter(tmp_path / TRACE_NAME, 1) as trace:
        trace.step(1, None, True, stages)
    (line,) = lines_of(tmp_path)
    assert line.stages == STAGES
    assert line.by_stage() == {name: stage.digest for name, stage in stages.items()}


@pytest.mark.parametrize(
    "names",
    [STAGES[:-1], ("batch", *STAGES[2:-1]), ("predictions",), ("batch", "predictions"), ("weights",)],
)
def test_line_has_at_most_half_the_bytes_of_format_1(names: tuple[str, ...], tmp_path: Path) -> None:
    sizes = []
    for number in (1, 2):
        path = tmp_path / f"{number}.jsonl"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "Header", partial(Header, format=number))
            with TraceWriter(path, 2) as trace:
                for step in range(1, 2001):
                    stages = {name: Stage((name,), str(step).encode()) for name in names}
                    trace.step(step, step // 100 + 1, True, stages, not_drawn=GENERATORS)
        sizes.append(path.stat().st_size)
    assert sizes[1] <= sizes[0] / 2


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    whole = (record(tmp_path / "run", range(3), evaluated=[1]) / TRACE_NAME).read_bytes()
    path = tmp_path / TRACE_NAME
    ends = [match.start() for match in re.finditer(b"\n", whole)]
    for bit in range(8 * len(whole)):
        at = bit // 8
        changed = bytearray(whole)
        changed[at] ^= 1 << bit % 8
        path.write_bytes(changed)
        if at == ends[-1]:
            trace = Trace(path)
            trace.read_through()
            assert trace.is_cut_off, "indistinguishable from a line that was not written to its end"
            continue
        with pytest.raises(UsageError) as error:
            lines_of(path)
        # A line without its end includes the next line; a header without its end has no first row.
        number = 1 + sum(end < at for end in ends)
        assert (error.value.code, error.value.fields["line"]) == ("damaged-trace", number), (at, bit % 8)


def swap(rows: list[bytes]) -> list[bytes]:
    return [rows[0], rows[2], rows[1], *rows[3:]]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (swap, 3),
        (lambda rows: rows[1:], 2),
        (lambda rows: rows[:2] + rows[3:], 4),
        (lambda rows: [*rows[:3], rows[2], *rows[3:]], 5),
        (lambda rows: rows[:-2] + rows[-1:], 5),
        (lambda rows: [rows[0], b"\n", *rows[1:]], 3),
        (lambda rows: [rows[0].replace(b",", b", "), *rows[1:]], 2),
        (lambda rows: [rows[0], rows[1][:-1] + b"\r\n", *rows[2:]], 3),
        (lambda rows: [*rows, rows[-1]], 7),
    ],
)
def test_moved_missing_and_changed_lines_are_found(change, line: int, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = record(tmp_path / "run", range(5)) / TRACE_NAME
    header, *rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([header, *change(rows)]))
    with pytest.raises(UsageError, match=f"damaged at line {line}. ") as error:
        lines_of(path)
    assert error.value.fields == {"path": str(path), "line": line}


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_line_of_another_trace_is_found(number: int, tmp_path: Path) -> None:
    """A line that replaces the one of the same step breaks the chain there or at the next line."""
    here, there = (record(tmp_path / name, range(6), (2, "weights", name)) / TRACE_NAME for name in ("one", "two"))
    rows = here.read_bytes().splitlines(keepends=True)
    other = there.read_bytes().splitlines(keepends=True)
    assert (rows[number] == other[number]) == (number < 3)
    rows[number] = other[number]
    here.write_bytes(b"".join(rows))
    if number < 3:
        assert len(lines_of(here)) == 6
    else:
        with pytest.raises(UsageError, match=f"damaged at line {number + 2 if number == 3 else number + 1}. "):
            lines_of(here)


def test_line_of_another_algorithm_is_found(tmp_path: Path) -> None:
    here, there = (record(tmp_path / name, range(3), algorithm=name) / TRACE_NAME for name in ("a", "b"))
    rows, other = (path.read_bytes().splitlines(keepends=True) for path in (here, there))
    here.write_bytes(b"".join([rows[0], *other[1:]]))
    with pytest.raises(UsageError, match=r"damaged at line 2\. "):
        lines_of(here)


def test_rows_do_not_depend_on_replicas_or_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = record(tmp_path / "one", range(5), evaluated=[4]) / TRACE_NAME
    monkeypatch.setattr("torch.__version__", "3.0")
    other = record(tmp_path / "other", range(5), evaluated=[4], num_replicas=7) / TRACE_NAME
    (header, *rows), (other_header, *other_rows) = (path.read_text().splitlines() for path in (one, other))
    assert rows == other_rows
    assert json.loads(other_header)["torch"] == "3.0"
    assert header != other_header


@pytest.mark.parametrize("at", ["format", "algorithm", "replicas", "check"])
def test_changed_header_is_damaged(at: str, tmp_path: Path) -> None:
    path = record(tmp_path / "run", range(3)) / TRACE_NAME
    path.write_bytes(path.read_bytes().replace(at.encode(), at.upper().encode(), 1))
    with pytest.raises(UsageError, match=r"damaged at line 1. .* or record the run again") as error:
        Trace(path)
    assert error.value.code == "damaged-trace"


def test_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / TRACE_NAME
    path.write_bytes(Header("a", "2", 1, format=3).encode())
    for reads in (Trace, partial(TraceWriter, num_replicas=1, algorithm="a")):
        with pytest.raises(UsageError, match=r"has format 3, expected 2 or lower\. Upgrade dreplica\.") as error:
            reads(path)
        assert error.value.code == "newer-trace"


def test_format_1_is_read(tmp_path: Path) -> None:
    lines = lines_of(FORMAT_1)
    keys = [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (4, 0), (5, 0), (5, 1)]
    assert [line.key for line in lines] == keys
    assert [line.epoch for line in lines] == [None, 1, 1, 1, 1, 2, 2, 2]
    again = record(tmp_path / "run", range(6), evaluated=[3, 5], epochs={step: 1 + (step > 3) for step in range(1, 6)})
    assert lines_of(again) == lines, "what is recorded is the same in both formats"


def test_format_1_is_encoded_to_the_same_bytes() -> None:
    raw = (FORMAT_1 / TRACE_NAME).read_bytes()
    with (FORMAT_1 / TRACE_NAME).open("rb") as file:
        header = parse_header(file.readline(), FORMAT_1)
        assert header.format == 1
        lines = [each[1] for each in read_lines(file, header, FORMAT_1) if each is not None]
    assert b"".join([header.encode(), *(encode_content(header, line) + b"\n" for line in lines)]) == raw
