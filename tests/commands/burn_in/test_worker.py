"""Burn-ins on gloo processes, and the command."""

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreplica.agreement.trace.writer import TraceWriter
from dreplica.commands.burn_in import worker
from dreplica.commands.burn_in.cards import PassDone
from dreplica.commands.burn_in.worker import BurnIn, Until
from dreplica.commands.main import main
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest, stop_signals
from dreplica.errors import ExitCode, UsageError
from dreplica.run.bootstrap import exit_unusable, prepare
from dreplica.state.replica import Replica
from dreplica.training.checkpoint.manager import Checkpoints
from tests.fixtures import SMALL, merged
from tests.harness import REPOSITORY, environment, run_job, run_replicas

SECONDS = 3600.0
"""Duration of a burn-in that ends earlier."""


class Watched(BurnIn):
    """A burn-in that calls a function after each pass."""

    def __init__(self, *args: Any, on_pass: Callable[[BurnIn, PassDone], None]) -> None:
        super().__init__(*args)
        self.on_pass = on_pass

    def note(self, done: PassDone) -> None:
        super().note(done)
        self.on_pass(self, done)


def burn_in(world: World, root: Path, arguments: tuple[str, ...], on_pass: Callable[..., None]) -> Any:
    os.dup2(os.open(root / f"{world.replica_id}.out", os.O_WRONLY | os.O_CREAT), sys.stdout.fileno())
    prepared = prepare(merged(*SMALL, f"--run.root={root}", "--run.name=job", *arguments))
    Checkpoints.save = saves_nothing
    with stop_signals() as told:
        code = Watched(prepared, world, told, SECONDS, on_pass=on_pass).conduct()
    sys.stdout.flush()
    return code


def saves_nothing(*_: Any) -> None:
    raise AssertionError("a burn-in saves no state")


def nothing(_burn_in: BurnIn, _done: PassDone) -> None:
    pass


def run(
    root: Path,
    *arguments: str,
    num_replicas: int = 2,
    on_pass: Callable[..., None] = nothing,
) -> list[Any]:
    return run_replicas(burn_in, num_replicas, root, arguments, on_pass)


def summary(root: Path) -> dict[str, Any]:
    return json.loads((root / "burn-in-job" / "burn_in.json").read_text())


def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "burn-in-job" / "burn_in.jsonl").read_text().splitlines()]


def kept(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "burn-in-job").iterdir() if path.is_dir())


def stop_after_third(_burn_in: BurnIn, done: PassDone) -> None:
    if done.number == 3:
        os.kill(os.getpid(), signal.SIGTERM)


def look_around(burn_in: BurnIn, done: PassDone) -> None:
    torch.set_num_threads(1 + burn_in.world.replica_id)  # as a model may: the next pass is to begin as the first did
    alive = [item for item in gc.get_objects() if type(item) is Replica]
    assert not alive, f"a pass leaves {len(alive)} replicas behind"
    open_files.append(len(os.listdir("/proc/self/fd")))
    assert len(set(open_files)) == 1, "a pass leaves files open"
    if done.number == 3 and burn_in.world.is_coordinator:
        burn_in.until.end = time.monotonic()


open_files: list[int] = []
"""After each pass, in a separate process."""


def test_sound_cards_agree_until_time_is_over(tmp_path: Path) -> None:
    assert run(tmp_path, on_pass=look_around) == [ExitCode.AGREED, ExitCode.AGREED]
    found, passes = summary(tmp_path), lines(tmp_path)
    assert (found["burn_in"]["ended"], found["burn_in"]["exit_code"], found["found"]) == ("time", 0, 0)
    assert [card["state"] for card in found["cards"]] == ["clean", "clean"]
    assert len(passes) == found["passes"] == 3
    assert sum(row["steps"] for row in passes) == found["steps"] == found["cards"][1]["steps"]
    assert all(row["comparisons"] > 8 * row["steps"] and row["bytes_hashed"] > 0 for row in passes)
    assert len({row["weights"] for row in passes}) == len(passes), "each pass is to compute other numbers"
    assert all(row["complete"] for row in passes)
    assert kept(tmp_path) == []
    assert (tmp_path / "0.out").read_text().splitlines()[-1].startswith("BURN-IN found=0 suspects=none ")
    assert (tmp_path / "1.out").read_text() == ""

    second = passes[1]
    seeds = [f"--seed.{key}={value}" for key, value in second["seed"].items() if key != "augment"]
    again = run_job(f"--config={tmp_path / 'burn-in-job' / 'config.yaml'}", *seeds)
    assert {row["weights"] for row in again.report["fingerprints"]} == {second["weights"]}


def with_room_for_two(world: World, root: Path) -> Any:
    worker.MOST_KEPT = 2
    fault = "{replica: 1, step: 3, target: activation, tensor: '5', repeat: true}"
    return burn_in(world, root, (f"--inject=[{fault}]",), stop_after_third)


def test_persistent_fault_is_named_in_every_pass(tmp_path: Path) -> None:
    assert run_replicas(with_room_for_two, 3, tmp_path) == [ExitCode.DIVERGED] * 3
    found, passes = summary(tmp_path), lines(tmp_path)
    assert found["suspects"] == [1]
    assert [row["suspects"] for row in passes] == [[1]] * 3
    assert found["causes"] == {"persistent-fault": {"passes": 3, "laid_to": "hardware"}}
    assert [card["named"] for card in found["cards"]] == [0, 3, 0]
    assert found["burn_in"]["ended"] == "told"
    assert "SUSPECT replica 1" in (tmp_path / "0.out").read_text()

    assert kept(tmp_path) == ["pass_000001", "pass_000002"]
    assert [Path(row["folder"]).name for row in passes[:2]] == kept(tmp_path)
    assert passes[2]["folder"] is None
    assert all(row["verdict"]["evidence"] for row in passes)
    report = json.loads((Path(passes[1]["folder"]) / "report.json").read_text())
    assert report["verdict"] == passes[1]["verdict"]
    assert [row["pass"] for row in found["passes_found"]] == [1, 2]


def test_transient_fault_is_named_and_burn_in_continues(tmp_path: Path) -> None:
    model = "--model.factory=tests.commands.burn_in.failing:FlipsOnce"
    codes = run(tmp_path, model, num_replicas=3, on_pass=stop_after_third)
    assert codes == [ExitCode.DIVERGED] * 3
    found, passes = summary(tmp_path), lines(tmp_path)
    assert [row["cause"] for row in passes] == ["none", "transient-fault", "none"]
    assert [card["state"] for card in found["cards"]] == ["clean", "suspect", "clean"]
    assert kept(tmp_path) == ["pass_000002"]


def test_lost_replica_ends_burn_in_with_report(tmp_path: Path) -> None:
    began = time.monotonic()
    codes = run(tmp_path, "--model.factory=tests.commands.burn_in.failing:DiesOnce", num_replicas=3)
    assert time.monotonic() - began < 30
    assert codes == [None, None, None], "no replica returns: each exits its process"
    found, passes = summary(tmp_path), lines(tmp_path)
    assert [row["cause"] for row in passes] == ["none", "replica-lost"]
    assert (found["burn_in"]["ended"], found["burn_in"]["exit_code"]) == ("lost", ExitCode.FAILED)
    assert [card["state"] for card in found["cards"]] == ["clean", "lost", "clean"]
    assert found["steps"] > passes[0]["steps"]
    text = (tmp_path / "0.out").read_text()
    assert "LOST replica 1" in text
    assert text.splitlines()[-1].startswith("BURN-IN found=0 suspects=none passes=2 ")


def lose_rank_0(burn_in: BurnIn, done: PassDone) -> None:
    if burn_in.world.is_coordinator and done.number == 2:
        raise ArithmeticError("the sky fell")


def test_failure_between_passes_is_reported(tmp_path: Path) -> None:
    assert run(tmp_path, on_pass=lose_rank_0) == [None, None]
    found = summary(tmp_path)
    assert [card["state"] for card in found["cards"]] == ["lost", "clean"]
    assert "the sky fell" in found["cards"][0]["lost"]
    assert (tmp_path / "1.out").read_text().splitlines()[-1].startswith("BURN-IN found=0 suspects=none passes=2 ")


def stop_one_in_the_next(burn_in: BurnIn, done: PassDone) -> None:
    def stop() -> None:
        while (agreement := burn_in.current and burn_in.current.run.agreement) is None or agreement.steps_done < 3:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    if burn_in.world.replica_id == 1 and done.number == 1:
        threading.Thread(target=stop, daemon=True).start()


def test_stop_request_cuts_the_pass_short(tmp_path: Path) -> None:
    codes = run(tmp_path, "--train.epochs=30", on_pass=stop_one_in_the_next)
    assert codes == [ExitCode.STOPPED, ExitCode.STOPPED]
    found = summary(tmp_path)
    assert (found["burn_in"]["ended"], found["found"]) == ("told", 0)
    assert (found["passes"], found["passes_complete"]) == (2, 1)
    assert [row["complete"] for row in lines(tmp_path)] == [True, False]
    assert not (tmp_path / "burn-in-job" / "pass_000002").exists()


def test_nondeterministic_operator_accuses_no_card(tmp_path: Path) -> None:
    job = (
        "--model.factory=dreplica.commands.cases.samples.models:racy_pooling",
        "--data.name=dreplica.commands.cases.samples.data:tiny_images",
    )
    codes = run(tmp_path, *job, on_pass=stop_after_third)
    assert codes == [ExitCode.DIVERGED] * 2
    found = summary(tmp_path)
    assert set(found["causes"]) == {"nondeterministic-operator"}
    assert found["causes"]["nondeterministic-operator"]["laid_to"] == "software"
    assert (found["suspects"], [card["state"] for card in found["cards"]]) == ([], ["clean", "clean"])


def burn_in_as_met(world: World, *arguments: Any) -> Any:
    try:
        return burn_in(world, *arguments)
    except UsageError as error:
        return exit_unusable(error, world)


def fill_the_disk_in_mid_pass(burn_in: BurnIn, _done: PassDone) -> None:
    def step(*_: Any, **_keywords: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if burn_in.world.is_coordinator:
        TraceWriter.step = step  # of the next pass; this process ends with it


def test_full_disk_in_mid_pass_is_no_lost_card(tmp_path: Path) -> None:
    run_replicas(burn_in_as_met, 2, tmp_path, (), fill_the_disk_in_mid_pass)
    told = [line for path in tmp_path.glob("*.out") for line in path.read_text().splitlines() if "BURN-IN" in line]
    assert len(told) == 1, "by one replica"
    assert "passes=1 " in told[0]
    assert "ended=unusable exit=2" in told[0]
    assert [card["state"] for card in summary(tmp_path)["cards"]] == ["clean", "clean"]


def test_passes_without_steps_end_burn_in(tmp_path: Path) -> None:
    codes = run(tmp_path, "--replica.factory=tests.commands.burn_in.failing:unbound")
    assert codes == [ExitCode.DIVERGED] * 2
    found = summary(tmp_path)
    assert (found["burn_in"]["ended"], found["passes"], found["steps"]) == ("idle", 3, 0)
    assert set(found["causes"]) == {"optimizer-not-bound"}
    assert [card["state"] for card in found["cards"]] == ["not checked"] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seed.model=distinct",), "seed.model: distinct cannot be used for a burn-in"),
        (("--overrides.1.determinism.mode=off",), "replica 1: determinism.mode: off cannot be used"),
        (("--data.batch_size=1000",), "data.batch_size: 1000"),
    ],
)
def test_unusable_job_leaves_nothing_behind(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    for result in run(tmp_path, *arguments):
        assert isinstance(result, UsageError)
        assert words in str(result)
    assert not (tmp_path / "burn-in-job").exists()


def fill_the_disk(burn_in: BurnIn, _done: PassDone) -> None:
    if burn_in.world.is_coordinator:
        lines = burn_in.record.folder / "burn_in.jsonl"
        lines.unlink()
        lines.mkdir()


def test_unwritable_folder_ends_burn_in_with_report(tmp_path: Path) -> None:
    for result in run(tmp_path, on_pass=fill_the_disk):
        assert isinstance(result, UsageError)
        assert "can no longer be written to (Is a directory)" in str(result)
    found = summary(tmp_path)
    assert (found["burn_in"]["ended"], found["burn_in"]["exit_code"], found["passes"]) == ("unusable", 2, 2)
    assert (tmp_path / "0.out").read_text().splitlines()[-1].startswith("BURN-IN found=0 suspects=none passes=2 ")


@pytest.mark.cluster
def test_burn_in_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dreplica.commands.main", "burn-in", "--for=1s", "--replicas=2", "--json", *SMALL]
    process = subprocess.run(
        [*command, f"--run.root={tmp_path}", "--run.name=job"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment(),
        timeout=100,
        check=False,
    )
    assert process.returncode == ExitCode.AGREED, process.stderr
    assert json.loads(process.stdout) == summary(tmp_path)


def test_until_is_set_by_time_or_stop_request() -> None:
    told = StopRequest()
    assert not Until(told, 3600)
    assert Until(told, 0)
    assert Until(told, 0).time_is_over
    other = Until(told, None)
    assert not other
    told.signal_name = "SIGTERM"
    assert other
    assert not other.time_is_over


def test_duration_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["burn-in", "--replicas=2"]) == ExitCode.UNUSABLE
    assert "error: --for: a duration is required" in capsys.readouterr().err
    assert main(["burn-in", "--for=soon"]) == ExitCode.UNUSABLE
    assert "error: --for: expected a positive number and a unit (s, m, h or d), got 'soon'" in capsys.readouterr().err
