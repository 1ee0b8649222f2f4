"""One start of jobs that need a flag, with and without it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dreplica.commands.flags.flags import STRICT, Variant, closed
from dreplica.commands.flags.measure import Outcome, describe
from dreplica.commands.flags.trial import Trial
from dreplica.config.schema import DeterminismConfig
from dreplica.distributed.process_group import World
from dreplica.distributed.signals import StopRequest
from dreplica.errors import ExitCode, UsageError
from dreplica.run.bootstrap import prepare
from dreplica.run.session import Session
from tests.fixtures import SMALL, merged
from tests.harness import run_replicas
from tests.trace_rows import read_rows

WITHOUT_MODE = Variant(closed({"mode"}))
WITHOUT_FILLING = Variant(closed({"fill_uninitialized_memory"}))


def start(world: World, folder: Path, model: str, variant: Variant, stopped: bool = False, *settings: str) -> ExitCode:
    if world.num_replicas == 1:
        os.environ.pop("RANK", None)
    section = variant.section(DeterminismConfig()).model_dump()
    if section["mode"] == "off":
        del section["cublas_workspace_config"]
    factory = [f"--model.factory=tests.commands.flags.needing:{model}"] if model else []
    arguments = merged(*SMALL, f"--determinism={json.dumps(section)}", *settings, *factory)
    stop = StopRequest()
    stop.signal_name = "SIGTERM" if stopped else None
    others = [STRICT.section(DeterminismConfig())]
    session = Session(prepare(arguments), world, stop)
    return Trial(session, 6, others, folder).conduct()


def conduct(folder: Path, model: str, variant: Variant, num_replicas: int, *settings: str) -> dict[str, Any]:
    """found.json."""
    assert (
        run_replicas(start, num_replicas, folder, model, variant, False, *settings) == [ExitCode.AGREED] * num_replicas
    )
    return json.loads((folder / "found.json").read_text())


def test_trial_without_flags_agrees(tmp_path: Path) -> None:
    over_with_the_job = "--schedule={name: OneCycleLR, per: step, max_lr: 0.1, total_steps: 10}"
    found = conduct(tmp_path, "alone", WITHOUT_MODE, 2, over_with_the_job)
    seconds = found.pop("seconds_per_step")
    assert found == {"device": "cpu", "steps": 6, "verdict": None, "between": None}
    assert [len(row) for row in seconds] == [3, 3], "those of the trial, and those of strict mode measured with it"
    assert all(value > 0 for row in seconds for value in row)
    lines = read_rows(tmp_path)[1:]
    assert [line["step"] for line in lines if "predictions" not in line["digests"]][-1] == 6
    assert "weights" in lines[-1]["digests"]


def test_trial_names_operator_and_times_strict_mode(tmp_path: Path) -> None:
    found = conduct(tmp_path, "mode", WITHOUT_MODE, 2)
    assert found["between"] == "replicas"
    verdict = found["verdict"]
    assert (verdict["cause"], verdict["step"]) == ("nondeterministic-operator", 1)
    assert (verdict["operator"], verdict["module"]) == ("needing.noise.default", "0")
    _, strict = found["seconds_per_step"]
    assert min(strict) > 0.02, "it sleeps that long in strict mode"


def test_trial_finds_uninitialized_memory_alone(tmp_path: Path) -> None:
    found = conduct(tmp_path, "filling", WITHOUT_FILLING, 1)
    assert found["between"] == "repetitions"
    assert found["verdict"]["operator"] == "aten.nan_to_num.default"
    assert found["verdict"]["cause"] == "unexplained", "that operator has only read it"
    assert "diverged from the first training at step" in found["verdict"]["summary"]


@pytest.mark.parametrize("model", ["mode", "filling"])
def test_trial_agrees_in_strict_mode(model: str, tmp_path: Path) -> None:
    found = conduct(tmp_path, model, STRICT, 1, "--train.max_steps=3")
    assert (found["verdict"], found["steps"]) == (None, 3), "the job ends there"


def test_trial_names_operator_that_raises(tmp_path: Path) -> None:
    for result in run_replicas(start, 2, tmp_path, "refused", STRICT):
        assert isinstance(result, RuntimeError)
    refused = json.loads((tmp_path / "refused.json").read_text())
    assert (refused["step"], refused["operator"], refused["module"]) == (1, "aten.max_unpool2d.default", "0")
    assert refused["message"].startswith("max_unpooling2d_forward_out does not have a deterministic implementation")
    assert "F.interpolate with mode='nearest'" in refused["remedy"][0]["text"]
    assert not (tmp_path / "found.json").exists()


REFUSAL = "max_unpooling2d_forward_out does not have a deterministic implementation"


@pytest.mark.parametrize(
    ("model", "words", "rest"),
    [
        (
            "refused_on_replica_1",
            REFUSAL,
            {"step": 1, "operator": "aten.max_unpool2d.default", "module": "0.fails", "phase": "forward"},
        ),
        ("refused_in_the_build", REFUSAL, {"phase": "build"}),
        (
            "too_large_on_replica_1",
            "replica 1: CUDA out of memory. Tried to allocate 2.00 GiB",
            {"phase": "memory"},
        ),
    ],
)
def test_failing_replica_writes_the_record(model: str, words: str, rest: dict[str, Any], tmp_path: Path) -> None:
    assert isinstance(run_replicas(start, 2, tmp_path, model, STRICT)[1], RuntimeError)
    (place,) = tmp_path.glob("*refused*")
    found = json.loads(place.read_text())
    assert found.pop("message").startswith(words)
    found.pop("remedy", None)
    assert (place.name, found) == ("refused.json", rest)


def test_error_in_evaluation_is_not_repeated(tmp_path: Path) -> None:
    for result in run_replicas(start, 1, tmp_path, "refused_in_evaluation", STRICT):
        assert isinstance(result, RuntimeError)
    refused = json.loads((tmp_path / "refused.json").read_text())
    assert refused.pop("message").startswith("max_unpooling2d_forward_out does not have a deterministic implementation")
    assert refused == {"step": 5, "phase": "evaluation"}, "the first epoch's"
    outcome = Outcome(STRICT, "", 0, {}, tmp_path, refused=refused)
    assert describe(outcome) == "raises in the evaluation after step 5"


def test_wiring_error_ends_trial_in_preparation(tmp_path: Path) -> None:
    faulty = "--replica.factory=tests.end_to_end.faulty:copied_optimizer"
    found = conduct(tmp_path, "", STRICT, 1, faulty)
    assert (found["between"], found["verdict"]["cause"]) == ("preparation", "optimizer-not-bound")
    assert found["seconds_per_step"] == []


def test_trial_stops_on_all_replicas(tmp_path: Path) -> None:
    assert run_replicas(start, 2, tmp_path, "", STRICT, True) == [ExitCode.STOPPED] * 2
    assert not (tmp_path / "found.json").exists()


def test_trial_needs_two_batches_per_epoch(tmp_path: Path) -> None:
    for result in run_replicas(start, 2, tmp_path, "", STRICT, False, "--data.batch_size=80"):
        assert isinstance(result, UsageError)
        assert "got one with batch_size 80" in str(result)
