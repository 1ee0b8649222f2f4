"""Starts that are made up: what a job would leave behind, without a process."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.distributed.launch.background import Finished
from dreplica.errors import ExitCode

Section = Mapping[str, Any]


def options_in(arguments: Sequence[str]) -> dict[str, str]:
    """What a worker is started with, by name."""
    return dict(argument.removeprefix("--").split("=", 1) for argument in arguments)


class MadeUp:
    """A substitute for `run_in_background`.

    Args:
        device: on which the job would run.
        needs: what happens with a section `determinism` and a CUBLAS_WORKSPACE_CONFIG: the operator that is not
            deterministic, `raises OPERATOR`, or None where the job agrees.
        milliseconds: that a step would take.

    Attributes:
        sections: of all starts.
    """

    def __init__(
        self,
        device: str,
        needs: Callable[[Section, str | None], str | None],
        milliseconds: Callable[[Section], float] = lambda _: 1.0,
    ) -> None:
        self.device, self.needs, self.milliseconds = device, needs, milliseconds
        self.sections: list[Section] = []

    def __call__(
        self,
        module: str,
        arguments: Sequence[str],
        num_replicas: int,
        log: Path,
        timeout: float,
        variables: Mapping[str, str | None],
    ) -> Finished:
        assert module == "dreplica.commands.flags"
        given = options_in(arguments)
        section = yaml.safe_load(Path(given["config"]).read_text())["determinism"]
        refused = section["mode"] == "strict" and section["cublas_workspace_config"] is None
        assert not (refused and self.device == "cuda"), "the preflight does not let this start"
        self.sections.append(section)
        folder, steps = Path(given["folder"]), int(given["steps"])
        operator = self.needs(section, variables["CUBLAS_WORKSPACE_CONFIG"])
        if operator is not None and operator.startswith("raises "):
            row = {"step": 1, "operator": operator.split()[1], "module": "head", "phase": "forward"}
            (folder / "refused.json").write_text(json.dumps(row | {"message": "not deterministic", "remedy": []}))
            return Finished(ExitCode.FAILED, "Traceback ...")
        timed = [section, *json.loads(given["others"])]
        found = {
            "device": self.device,
            "steps": steps,
            "verdict": None if operator is None else self.verdict(operator),
            "between": None if operator is None else "replicas",
            "seconds_per_step": [[self.milliseconds(each) / 1000] * 3 for each in timed],
        }
        (folder / "found.json").write_text(json.dumps(found))
        write_trace(folder, "a", steps)
        return Finished(ExitCode.AGREED, "")

    def verdict(self, operator: str) -> dict[str, Any]:
        place = {"step": 2, "stage": "output", "tensor": "logits", "module": "body", "phase": "forward"}
        evidence, remedy = Evidence("text", "seen"), Remedy("text", "fix it")
        words = {
            "summary": f"diverged at {operator}",
            "evidence": [evidence.as_dict()],
            "remedy": [remedy.as_dict()],
        }
        return place | words | {"cause": "nondeterministic-operator", "operator": operator}


def write_trace(folder: Path, digit: str, steps: int) -> None:
    """A trace whose last step has this hex digit all over."""
    header = {"algorithm": "some", "torch": "2", "replicas": 2}
    rows = [
        {"step": step, "epoch": 1, "agreed": True, "digests": {"weights": "a" * 32}} for step in range(1, steps + 1)
    ]
    rows[-1]["digests"] = {"weights": digit * 32}
    (folder / "trace.jsonl").write_text("\n".join(map(json.dumps, [header, *rows])) + "\n")
