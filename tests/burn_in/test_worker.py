"""Burn-ins on gloo processes, and the command itself."""

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

from dreplica.burn_in import worker
from dreplica.burn_in.cards import PassDone
from dreplica.burn_in.worker import BurnIn
from dreplica.cli import main
from dreplica.errors import ExitCode, UsageError
from dreplica.meet import prepare
from dreplica.replica.replica import Replica
from dreplica.world.process_group import World
from dreplica.world.signals import stop_signals
from tests.fixtures import SMALL
from tests.harness import REPOSITORY, environment, run_job, run_replicas

FAULT = "{replica: 1, step: 3, target: activation, tensor: '5', repeat: true}"
SECONDS = 60.0
"""Of a burn-in that ends before."""


class Watched(BurnIn):
    """One that looks at what is alive after each pass, and may be told to stop."""

    def __init__(self, *args: Any, on_pass: Callable[[PassDone], None]) -> None:
        super().__init__(*args)
        self.on_pass = on_pass

    def note(self, done: PassDone) -> None:
        super().note(done)
        self.on_pass(done)


def burn_in(world: World, root: Path, seconds: float, arguments: tuple[str, ...], on_pass: Callable[..., None]) -> Any:
    os.dup2(os.open(root / f"{world.replica_id}.out", os.O_WRONLY | os.O_CREAT), sys.stdout.fileno())
    # Of what is given twice, the later one counts.
    given = {token.split("=")[0]: token for token in (*SMALL, f"--run.root={root}", "--run.name=job", *arguments)}
    prepared = prepare([*given.values()])
    with stop_signals() as told:
        code = Watched(prepared, world, told, seconds, on_pass=lambda done: on_pass(world, done)).conduct()
    sys.stdout.flush()
    return code


def nothing(_world: World, _done: PassDone) -> None:
    pass


def run(
    root: Path,
    *arguments: str,
    num_replicas: int = 2,
    seconds: float = SECONDS,
    on_pass: Callable[..., None] = nothing,
) -> list[Any]:
    return run_replicas(burn_in, num_replicas, root, seconds, arguments, on_pass)


def summary(root: Path) -> dict[str, Any]:
    return json.loads((root / "burn-in-job" / "burn_in.json").read_text())


def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "burn-in-job" / "burn_in.jsonl").read_text().splitlines()]


def kept(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "burn-in-job").iterdir() if path.is_dir())


def stop_after_third(_world: World, done: PassDone) -> None:
    if done.number == 3:
        os.kill(os.getpid(), signal.SIGTERM)


def look_around(_world: World, done: PassDone) -> None:
    alive = [item for item in gc.get_objects() if isinstance(item, Replica)]
    assert not alive, f"a pass leaves {len(alive)} replicas behind"
    number = len(os.listdir("/proc/self/fd"))
    look_around.open_files = getattr(look_around, "open_files", number)  # type: ignore[attr-defined]
    assert number == look_around.open_files, "a pass leaves files open"  # type: ignore[attr-defined]


def test_sound_cards_agree_until_the_time_is_up_and_leave_a_line_per_pass(tmp_path: Path) -> None:
    began = time.monotonic()
    assert run(tmp_path, seconds=1.5, on_pass=look_around) == [ExitCode.AGREED, ExitCode.AGREED]
    assert time.monotonic() - began > 1.5
    found, passes = summary(tmp_path), lines(tmp_path)
    assert (found["burn_in"]["ended"], found["burn_in"]["exit_code"], found["found"]) == ("time", 0, 0)
    assert [card["state"] for card in found["cards"]] == ["clean", "clean"]
    assert len(passes) == found["passes"] >= 2
    assert sum(row["steps"] for row in passes) == found["steps"] == found["cards"][1]["steps"]
    assert all(row["comparisons"] > 8 * row["steps"] and row["bytes_hashed"] > 0 for row in passes)
    assert len({row["weights"] for row in passes}) == len(passes), "each pass is to compute other numbers"
    assert [row["complete"] for row in passes[:-1]] == [True] * (len(passes) - 1)
    assert kept(tmp_path) == []
    assert (tmp_path / "0.out").read_text().splitlines()[-1].startswith("BURN-IN found=0 suspects=none ")
    assert (tmp_path / "1.out").read_text() == ""

    second = passes[1]
    seeds = [f"--seed.{key}={value}" for key, value in second["seed"].items()]
    again = run_job(f"--config={tmp_path / 'burn-in-job' / 'config.yaml'}", *seeds)
    assert {row["weights"] for row in again.report["fingerprints"]} == {second["weights"]}


def test_the_card_that_is_always_wrong_is_named_in_every_pass(tmp_path: Path) -> None:
    codes = run(tmp_path, f"--inject=[{FAULT}]", num_replicas=3, on_pass=stop_after_third)
    assert codes == [ExitCode.DIVERGED] * 3
    found, passes = summary(tmp_path), lines(tmp_path)
    assert found["suspects"] == [1]
    assert [row["suspects"] for row in passes] == [[1]] * 3
    assert found["causes"] == {"persistent-fault": {"passes": 3, "laid_to": "hardware"}}
    assert [card["named"] for card in found["cards"]] == [0, 3, 0]
    assert found["burn_in"]["ended"] == "told"
    assert kept(tmp_path) == [f"pass_{number:06}" for number in (1, 2, 3)]
    for row in passes:
        report = json.loads((Path(row["folder"]) / "report.json").read_text())
        assert report["verdict"] == row["verdict"]
    assert "SUSPECT replica 1" in (tmp_path / "0.out").read_text()


def test_a_card_that_fails_once_is_named_and_the_night_goes_on(tmp_path: Path) -> None:
    model = "--model.factory=tests.burn_in.failing:FlipsOnce"
    codes = run(tmp_path, model, num_replicas=3, on_pass=stop_after_third)
    assert codes == [ExitCode.DIVERGED] * 3
    found, passes = summary(tmp_path), lines(tmp_path)
    assert [row["cause"] for row in passes] == ["none", "transient-fault", "none"]
    assert [card["state"] for card in found["cards"]] == ["clean", "suspect", "clean"]
    assert kept(tmp_path) == ["pass_000002"]


def test_a_lost_replica_ends_it_in_seconds_and_a_survivor_tells(tmp_path: Path) -> None:
    began = time.monotonic()
    codes = run(tmp_path, "--model.factory=tests.burn_in.failing:DiesOnce", num_replicas=3)
    assert time.monotonic() - began < 30
    assert codes == [None, None, None], "nobody returns: each has ended itself"
    found, passes = summary(tmp_path), lines(tmp_path)
    assert [row["cause"] for row in passes] == ["none", "replica-lost"]
    assert (found["burn_in"]["ended"], found["burn_in"]["exit_code"]) == ("lost", ExitCode.FAILED)
    assert [card["state"] for card in found["cards"]] == ["clean", "lost", "clean"]
    assert found["steps"] > passes[0]["steps"]
    text = (tmp_path / "0.out").read_text()
    assert "LOST replica 1" in text
    assert text.splitlines()[-1].startswith("BURN-IN found=0 suspects=none passes=2 ")


def lose_rank_0(world: World, done: PassDone) -> None:
    if world.is_coordinator and done.number == 2:
        raise ArithmeticError("the sky fell")


def test_one_that_fails_between_passes_is_named_by_another(tmp_path: Path) -> None:
    assert run(tmp_path, on_pass=lose_rank_0) == [None, None]
    found = summary(tmp_path)
    assert [card["state"] for card in found["cards"]] == ["lost", "clean"]
    assert "the sky fell" in found["cards"][0]["lost"]
    assert (tmp_path / "1.out").read_text().splitlines()[-1].startswith("BURN-IN found=0 suspects=none passes=2 ")


def tell_one_soon(world: World, done: PassDone) -> None:
    if world.replica_id == 1 and done.number == 1:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_told_to_stop_it_stops_on_all_replicas_and_is_not_taken_for_a_full_one(tmp_path: Path) -> None:
    # So long a pass that the request comes in the middle of one.
    codes = run(tmp_path, "--train.epochs=30", on_pass=tell_one_soon, seconds=3600)
    assert codes == [ExitCode.STOPPED, ExitCode.STOPPED]
    found = summary(tmp_path)
    assert (found["burn_in"]["ended"], found["found"]) == ("told", 0)
    assert (found["passes"], found["passes_complete"]) == (2, 1)
    assert [row["complete"] for row in lines(tmp_path)] == [True, False]
    assert not (tmp_path / "burn-in-job" / "pass_000002").exists()


def test_an_operator_that_is_not_deterministic_is_held_against_no_card(tmp_path: Path) -> None:
    job = ("--model.factory=dreplica.cases.models:racy_pooling", "--data.name=dreplica.cases.data:tiny_images")
    codes = run(tmp_path, *job, on_pass=stop_after_third)
    assert codes == [ExitCode.DIVERGED] * 2
    found = summary(tmp_path)
    assert set(found["causes"]) == {"nondeterministic-operator"}
    assert found["causes"]["nondeterministic-operator"]["laid_to"] == "software"
    assert (found["suspects"], [card["state"] for card in found["cards"]]) == ([], ["clean", "clean"])


def test_what_never_comes_to_a_step_is_given_up(tmp_path: Path) -> None:
    codes = run(tmp_path, "--replica.factory=tests.burn_in.failing:unbound")
    assert codes == [ExitCode.DIVERGED] * 2
    found = summary(tmp_path)
    assert (found["burn_in"]["ended"], found["passes"], found["steps"]) == ("idle", 3, 0)
    assert set(found["causes"]) == {"optimizer-not-bound"}
    assert [card["state"] for card in found["cards"]] == ["not checked"] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seed.model=distinct",), "seed.model: distinct will not do for a burn-in"),
        (("--overrides.1.determinism.mode=off",), "replica 1: determinism.mode: off will not do"),
        (("--data.batch_size=1000",), "data.batch_size: 1000"),
    ],
)
def test_an_unusable_job_leaves_nothing_behind(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    for result in run(tmp_path, *arguments):
        assert isinstance(result, UsageError)
        assert words in str(result)
    assert not (tmp_path / "burn-in-job").exists()


def test_a_night_of_failures_does_not_fill_the_disk(tmp_path: Path) -> None:
    codes = run_replicas(with_room_for_one, 3, tmp_path)
    assert codes == [ExitCode.DIVERGED] * 3
    assert kept(tmp_path) == ["pass_000001"]
    assert [row["folder"] is None for row in lines(tmp_path)] == [False, True, True]
    assert all(row["verdict"]["evidence"] for row in lines(tmp_path))
    assert len(summary(tmp_path)["passes_found"]) == 1


def with_room_for_one(world: World, root: Path) -> Any:
    worker.MOST_KEPT = 1
    return burn_in(world, root, SECONDS, (f"--inject=[{FAULT}]",), stop_after_third)


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dreplica.cli", "burn-in", "--for=1s", "--replicas=2", "--json", *SMALL]
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


def test_how_long_has_to_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["burn-in", "--replicas=2"]) == ExitCode.UNUSABLE
    assert "error: --for: it is needed" in capsys.readouterr().err
    assert main(["burn-in", "--for=soon"]) == ExitCode.UNUSABLE
    assert "error: --for: 'soon' will not do" in capsys.readouterr().err
