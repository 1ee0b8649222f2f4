"""Check the conclusion from the trials, for each of their possible outcomes."""

import copy
from typing import Any

import pytest

from dreplica.commands.doctor.judge import STRICT_FLAGS, judge_devices, judge_flags, judge_joining, judge_probes

_PLACES = {"step 1, buffers, 1.running_mean": "aa", "step 1, output, logits": "bb", "step 1, weights, 0.weight": "cc"}


def _trials(*devices: tuple[str, str]) -> list[dict[str, Any]]:
    found = {device: {"name": name, "runs": [dict(_PLACES), dict(_PLACES)]} for device, name in devices}
    return [copy.deepcopy(found), copy.deepcopy(found)]


def test_judge_devices_that_agree() -> None:
    (check,) = judge_devices(_trials(("cpu", "CPU")))
    assert check.status == "ok"
    assert check.seen == "4 runs in 2 processes agree in all of 3 digests"


def test_judge_process_that_diverges_from_itself() -> None:
    trials = _trials(("cpu", "CPU"))
    trials[1]["cpu"]["runs"][1] |= {"step 1, output, logits": "xx", "step 1, weights, 0.weight": "yy"}
    (check,) = judge_devices(trials)
    assert check.status == "bad"
    assert check.seen == "two runs in one process diverge at step 1, output, logits"


def test_judge_processes_that_diverge() -> None:
    trials = _trials(("cpu", "CPU"))
    for run in trials[1]["cpu"]["runs"]:
        run["step 1, weights, 0.weight"] = "yy"
    (check,) = judge_devices(trials)
    assert check.status == "bad"
    assert check.seen == "two processes diverge at step 1, weights, 0.weight"


@pytest.mark.parametrize(("names", "status"), [(("H100", "H100"), "bad"), (("H100", "A100"), None)])
def test_judge_gpus_that_diverge(names: tuple[str, str], status: str | None) -> None:
    trials = _trials(("cpu", "CPU"), ("cuda:0", names[0]), ("cuda:1", names[1]))
    for trial in trials:
        for run in trial["cuda:1"]["runs"]:
            run["step 1, weights, 0.weight"] = "yy"
    found = {check.name: check for check in judge_devices(trials)}
    assert {found[f"self-test on {device}"].status for device in ("cpu", "cuda:0", "cuda:1")} == {"ok"}
    against = found.get("cuda:0 against cuda:1")
    assert (against and against.status) == status


def test_judge_reports_error_of_strict_mode() -> None:
    trials = _trials(("cpu", "CPU"), ("cuda:0", "H100"))
    trials[0]["cuda:0"] = {"name": "H100", "error": "set CUBLAS_WORKSPACE_CONFIG=:4096:8"}
    cpu, gpu = judge_devices(trials)
    assert cpu.status == "ok"
    assert gpu.status == "bad"
    assert "set CUBLAS_WORKSPACE_CONFIG=:4096:8" in gpu.seen


@pytest.mark.parametrize("flag", STRICT_FLAGS)
def test_judge_flag_that_does_not_stay(flag: str) -> None:
    assert judge_flags([STRICT_FLAGS, STRICT_FLAGS]).status == "ok"
    check = judge_flags([STRICT_FLAGS, {**STRICT_FLAGS, flag: "other"}])
    assert check.status == "bad"
    assert check.seen == f"{flag} is other instead of {STRICT_FLAGS[flag]}"


def test_judge_probes() -> None:
    outcomes = {"aten.max_unpool2d": "raises", "aten.cumsum": "runs"}
    (check,) = judge_probes({"cpu": outcomes})
    assert check.status == "ok"
    assert "stops at 1 (max_unpool2d), 1 run" in check.seen
    (check,) = judge_probes({"cpu": outcomes | {"aten.max_unpool2d": "runs"}})
    assert check.status == "warn"
    (check,) = judge_probes({"cuda:0": outcomes | {"aten.histc": "runs"}})
    assert "documented to raise, and ran: aten.histc" in check.seen
    (check,) = judge_probes({"cpu": outcomes | {"aten.histc": "out of memory"}})
    assert check.status == "unknown"


@pytest.mark.parametrize(
    ("joined", "status"),
    [
        ([{"joined": [0, 1]}, {"joined": [0, 1]}], "ok"),
        ([{"joined": [0, 1]}, {"joined": None, "error": "no route to host"}], "bad"),
        ([{"joined": [0, 1]}, {"joined": [0]}], "bad"),
    ],
)
def test_judge_joining(joined: list[dict[str, Any]], status: str) -> None:
    assert judge_joining(joined).status == status
