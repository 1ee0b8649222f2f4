"""Compare the operators that vary on this machine with PyTorch's documentation.

    python -m tests.benchmarks.nondeterministic_operators --write docs/nondeterministic_operators.md

Each operator in the documentation of `torch.use_deterministic_algorithms`, and some that other pages warn about, is run
several times from the same inputs, on the GPU if there is one. All operators are recorded and compared as in a replay.
The columns say what is documented, if strict mode raises, if two runs differ in mode off and which operator is then
found, and if they agree with the verdict's remedy, where that is a setting. The exit code is 1 if the operator found is
not the expected one, or if a remedy does not help.
"""

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dreplica.agreement.verdict.remedy import Remedy
from dreplica.config.schema import DeterminismConfig
from dreplica.diagnosis.decision.documented_ops import DOCUMENTED
from dreplica.diagnosis.decision.nondeterministic_ops import explain_operator
from dreplica.diagnosis.evidence.observation import first_difference
from dreplica.diagnosis.tracing.op_tracer import OpRecord, OpTracer
from dreplica.environment.determinism import apply_determinism, numerics_flags, set_environment
from dreplica.state.fingerprint.fingerprint import digest_bytes
from tests.benchmarks.documented_operators import CASES, Case, read_documentation

SIZES = {"cuda": 2**20, "cpu": 2**12}
OFF = DeterminismConfig(mode="off")
STRICT = DeterminismConfig()
_REFUSES = "deterministic"
"""A word in the text of torch's errors about operators without a deterministic algorithm."""
_UNAVAILABLE = ("No available kernel", "not available", "Could not run", "not implemented")


@dataclass(frozen=True)
class Row:
    """The result of one case."""

    case: Case
    documented: str
    raises: str = ""
    differs: str = ""
    found: str = ""
    remedy: Remedy | None = None
    helps: str = ""
    is_wrong: bool = False

    def cells(self) -> list[str]:
        """Return the cells of the table's row."""
        name = f"`{self.found}`" if self.found else ""
        remedy = ""
        if self.remedy is not None:
            remedy = self.remedy.text if self.remedy.command is None else f"`{self.remedy.command}`"
        return [self.case.name, self.documented, self.raises, self.differs, name, remedy, self.helps]


COLUMNS = (
    "operator",
    "documented as",
    "raises in strict mode",
    "differs in mode off",
    "found by replay as",
    "remedy",
    "agrees with it",
)


def documented_as(case: Case) -> str:
    """Return in which of the documentation's lists the operator is, for the installed torch."""
    entries = read_documentation(torch.use_deterministic_algorithms.__doc__ or "")
    lists = {entry.raises for entry in entries if case.documented in entry.names and not entry.elsewhere}
    words = [word for raises, word in ((False, "deterministic in strict mode"), (True, "raises")) if raises in lists]
    return " or ".join(words) or "elsewhere"


def records_of(case: Case, device: torch.device, config: DeterminismConfig, repeats: int) -> list[list[OpRecord]]:
    """Run a case several times from the same inputs, and return the operators of each run.

    Args:
        case: The case.
        device: The device to run on.
        config: Settings of determinism.
        repeats: Number of runs.
    """
    apply_determinism(replace_benchmark(config, case.benchmark))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work = case.make(device, SIZES[device.type])
        runs = []
        for _ in range(repeats):
            with OpTracer() as tracer:
                work()
            runs.append(tracer.records)
    return runs


def replace_benchmark(config: DeterminismConfig, benchmark: bool) -> DeterminismConfig:
    """Return `config` with cuDNN's benchmark mode, if mode `off` allows it."""
    return config.model_copy(update={"cudnn_benchmark": benchmark and config.mode == "off"})


def differing_operator(runs: Sequence[Sequence[OpRecord]]) -> str | None:
    """Return the first operator whose result differs between the first and any other run, None if none does."""
    places = [place for run in runs[1:] if (place := first_difference(runs[0], run)) is not None]
    return min(places, key=lambda place: place.index).record.name if places else None


def run_case(case: Case, device: torch.device, repeats: int) -> Row:
    """Run one case in mode off and in strict mode.

    Args:
        case: The case.
        device: The device to run on.
        repeats: Number of runs in each mode.
    """
    row = Row(case, documented_as(case))
    if device.type not in case.devices:
        return replace(row, differs="not on this device")
    try:
        return _run_case(case, row, device, repeats)
    except (RuntimeError, subprocess.CalledProcessError) as error:  # the table is useful without this case
        text = getattr(error, "stderr", None) or str(error)
        return replace(row, differs=f"fails: {text.strip().splitlines()[-1]}", is_wrong=True)


def _run_case(case: Case, row: Row, device: torch.device, repeats: int) -> Row:
    try:
        found = _find(case, device, OFF, repeats)
        flags = numerics_flags()
    except RuntimeError as error:
        if not any(words in str(error) for words in _UNAVAILABLE):
            raise
        return replace(row, differs=f"not available here: {str(error).splitlines()[0]}")
    row = replace(row, differs="yes" if found else "no", found=found or "")
    remains = None
    try:
        remains = _find(case, device, STRICT, repeats)
        row = replace(row, raises="no")
    except RuntimeError as error:
        if _REFUSES in str(error):
            row = replace(row, raises="yes")
        elif any(words in str(error) for words in _UNAVAILABLE):
            row = replace(row, raises="uses another backend")
        else:
            raise
    if found is None:
        return replace(row, is_wrong=remains is not None, helps="" if remains is None else f"no: {remains} differs")
    explanation = explain_operator(found, device.type, flags)
    settings = [remedy for remedy in explanation.remedy if remedy.settings]
    row = replace(row, remedy=explanation.remedy[0])
    row = replace(row, is_wrong=found not in _names(case) or not explanation.known)
    if row.raises == "yes" or not settings:
        return replace(row, helps="no setting helps: strict mode raises there")
    return replace(row, helps="yes" if remains is None else "NO", is_wrong=row.is_wrong or remains is not None)


def _find(case: Case, device: torch.device, config: DeterminismConfig, repeats: int) -> str | None:
    if not case.by_process:
        return differing_operator(records_of(case, device, config, repeats))
    command = [sys.executable, "-m", "tests.benchmarks.nondeterministic_operators", "--digest", case.name]
    outputs = [
        subprocess.run([*command, config.mode], capture_output=True, text=True, check=True).stdout
        for _ in range(min(repeats, 5))
    ]
    return f"aten.{case.operator}.default" if len(set(outputs)) > 1 else None


def _names(case: Case) -> set[str]:
    """Return the names that a trace may give the operator: all overloads, in place or not, and related operators."""
    own = f"aten.{case.operator}"
    related = [name for name, other in DOCUMENTED.items() if other == DOCUMENTED.get(own)] or [own]
    names = set()
    for name in related:
        packet, _, overload = name.removeprefix("aten.").partition(".")
        overloads = [overload] if overload else getattr(torch.ops.aten, packet).overloads()
        names |= {f"aten.{packet}.{each}" for each in overloads}
    return names


def as_markdown(rows: Sequence[Row], title: str) -> str:
    """Return a page with the table."""
    lines = ["# Nondeterministic operators, as documented and as measured", "", title, ""]
    lines += [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cell.replace('|', ' ') for cell in row.cells())} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names of cases; by default all")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--write", type=Path, help="a file for the table")
    parser.add_argument("--digest", nargs=2, metavar=("CASE", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    set_environment(STRICT)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if arguments.digest:
        name, mode = arguments.digest
        (case,) = [case for case in CASES if case.name == name]
        (records,) = records_of(case, device, OFF if mode == "off" else STRICT, repeats=1)
        print(digest_bytes("outputs", b"".join(record.outputs for record in records)).hex())
        return 0
    rows = []
    for case in CASES:
        if not arguments.names or any(name in case.name for name in arguments.names):
            rows.append(run_case(case, device, arguments.repeats))
            print(" | ".join(rows[-1].cells()) + ("  <-- NOT AS EXPECTED" if rows[-1].is_wrong else ""), flush=True)
    where = torch.cuda.get_device_name(0) if device.type == "cuda" else f"the CPU, {STRICT.threads} thread"
    title = (
        f"On {where}, torch {torch.__version__}, {arguments.repeats} runs of each; "
        f"CUBLAS_WORKSPACE_CONFIG={os.environ.get('CUBLAS_WORKSPACE_CONFIG')}."
    )
    if arguments.write is not None:
        arguments.write.write_text(as_markdown(rows, title), encoding="utf-8")
    return int(any(row.is_wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
