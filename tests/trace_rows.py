"""Traces as JSON values, for tests that look at their content or change it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dreplica.agreement.trace.line import Line
from dreplica.agreement.trace.line_format import Header, encode_content, seal
from dreplica.agreement.trace.reader import TRACE_NAME, Trace


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return header and lines of a trace, in the order of the file. Digests are in hex."""
    trace = Trace(path)
    header = {"algorithm": trace.algorithm, "torch": trace.torch_version, "replicas": trace.num_replicas}
    return [header] + [
        {
            "step": line.key[0],
            "is_evaluation": line.key[1],
            "epoch": line.epoch,
            "agreed": line.agreed,
            "digests": trace.digests(line),
        }
        for line in trace.lines()
    ]


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the trace of a run folder from what `read_rows` returned, changed or not, as a sound trace of format 2."""
    first, *others = rows
    header = Header(first["algorithm"], first["torch"], first["replicas"])
    before = header.seed
    with (folder / TRACE_NAME).open("wb") as file:
        file.write(header.encode())
        for row in others:
            digests = b"".join(map(bytes.fromhex, row["digests"].values()))
            key = row["step"], row.get("is_evaluation", False)
            line = Line(key, row["epoch"], row["agreed"], tuple(row["digests"]), digests)
            raw, before = seal(header, encode_content(header, line), before)
            file.write(raw)
