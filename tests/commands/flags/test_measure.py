"""Starts and their outcomes, without processes."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dreplica.commands.flags import measure
from dreplica.commands.flags.flags import STRICT, Variant, closed
from dreplica.commands.flags.measure import Measurements, Outcome, TrialFailed, describe
from dreplica.config.load import load_config
from dreplica.distributed.launch.background import Finished
from dreplica.errors import ExitCode, UsageError
from tests.commands.flags.jobs import MadeUp, options_in, write_trace

OFF = Variant(closed({"mode"}))
NO_WORKSPACE = Variant(closed({"mode", "cublas_workspace_config"}))
CHOOSING = Variant(frozenset({"cudnn_benchmark"}))


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Measurements]:
    def make(job: object) -> Measurements:
        monkeypatch.setattr(measure, "run_in_background", job)
        return Measurements(load_config([], 2), 2, 4, Path(tempfile.mkdtemp(dir=tmp_path)), 60.0, lambda _: None)

    return make


def test_compatible_settings_are_timed_in_one_process(make: Callable[..., Measurements]) -> None:
    job = MadeUp("cuda", lambda *_: None, lambda section: 3.0 if section["mode"] == "strict" else 2.0)
    measurements = make(job)
    measurements.measure([STRICT, OFF], rounds=2, alongside=[STRICT])
    assert measurements.ratios(OFF, STRICT) == [pytest.approx(2 / 3)] * 6, "three in each of two starts"
    assert measurements.ratios(STRICT, OFF) == [pytest.approx(3 / 2)] * 6
    assert [section["mode"] for section in job.sections] == ["strict", "off", "off", "strict"], (
        "another order each time"
    )


@pytest.mark.parametrize("other", [NO_WORKSPACE, CHOOSING], ids=["cuBLAS", "cuDNN"])
def test_settings_kept_by_a_library_are_timed_apart(make: Callable[..., Measurements], other: Variant) -> None:
    times = iter([4.0, 3.0, 3.0, 5.0])  # strict, without; without, strict
    measurements = make(MadeUp("cuda", lambda *_: None, lambda _: next(times)))
    measurements.measure([STRICT, other], rounds=2, alongside=[STRICT])
    assert measurements.ratios(other, STRICT) == [pytest.approx(3 / 4), pytest.approx(3 / 5)]


def test_starts_are_compared_with_each_other(make: Callable[..., Measurements]) -> None:
    class Diverging(MadeUp):
        def __call__(self, *arguments: object, **more: object) -> Finished:
            ended = super().__call__(*arguments, **more)
            folder = Path(options_in(arguments[1])["folder"])  # type: ignore[arg-type]
            write_trace(folder, "ab"[len(self.sections) > 2], steps=4)
            return ended

    measurements = make(Diverging("cpu", lambda *_: None))
    assert measurements.try_out(OFF, 2)
    assert not measurements.try_out(OFF, 2), "the third"
    assert len(measurements.of(OFF)) == 3, "and then no more"
    assert not measurements.agrees(OFF)
    divergent = measurements.first_divergent(OFF)
    assert divergent is not None
    assert describe(divergent) == "starts diverge at step 4 (weights)"
    assert measurements.same_numbers(OFF, STRICT) is None


def test_same_numbers_compares_with_strict_mode(make: Callable[..., Measurements]) -> None:
    measurements = make(MadeUp("cpu", lambda *_: None))
    measurements.measure([STRICT, OFF], rounds=1, alongside=[])
    assert measurements.same_numbers(OFF, STRICT) is True
    write_trace(measurements.of(OFF)[0].folder, "b", steps=4)
    assert measurements.same_numbers(OFF, STRICT) is False


def test_raising_operator_is_an_outcome(make: Callable[..., Measurements]) -> None:
    measurements = make(MadeUp("cuda", lambda *_: "raises aten.addmm.default"))
    assert not measurements.start(CHOOSING, [STRICT]).agrees
    assert describe(measurements.of(CHOOSING)[0]) == "raises at step 1: aten.addmm.default in head (forward)"
    assert measurements.ratios(CHOOSING, STRICT) == []


def out_of_memory(_module: str, arguments: Sequence[str], *_: Any) -> Finished:
    told = {"phase": "memory", "message": "replica 1: CUDA out of memory. Tried to allocate 2.00 GiB"}
    (Path(options_in(arguments)["folder"]) / "refused.json").write_text(json.dumps(told))
    return Finished(ExitCode.FAILED, "a traceback")


def test_exhausted_memory_is_an_outcome(
    make: Callable[..., Measurements],
) -> None:
    measurements = make(out_of_memory)
    assert not measurements.try_out(OFF, 2)
    assert describe(measurements.of(OFF)[0]) == "replica 1: CUDA out of memory. Tried to allocate 2.00 GiB"
    with pytest.raises(
        TrialFailed, match=r"^strict: replica 1: CUDA out of memory.* GiB\. Use a smaller data\.batch_size"
    ):
        measurements.start(STRICT)


def test_describe_error_in_the_build(tmp_path: Path) -> None:
    outcome = Outcome(STRICT, "", 0, {}, tmp_path, refused={"phase": "build", "message": "it is not deterministic"})
    assert describe(outcome) == "raises before the first step: it is not deterministic"


def test_unusable_setting_is_not_started(make: Callable[..., Measurements]) -> None:
    job = MadeUp("cuda", lambda *_: None)
    measurements, refused = make(job), Variant(frozenset({"cublas_workspace_config"}))
    measurements.measure([refused], rounds=2, alongside=[STRICT])
    assert (job.sections, measurements.num_starts(refused), measurements.agrees(refused)) == ([], 0, False)
    assert describe(measurements.of(refused)[0]).startswith("strict mode does not start without CUBLAS_WORKSPACE_CON")


UNUSABLE = UsageError("data.root: the folder is missing")


@pytest.mark.parametrize(
    ("ended", "error", "message"),
    [
        (Finished(ExitCode.UNUSABLE, "hm", UNUSABLE), UsageError, r"^data\.root: the folder is missing$"),
        (Finished(ExitCode.UNUSABLE, "no record"), TrialFailed, "(?s)strict: exit code 2:.*no record"),
        (Finished(ExitCode.FAILED, "out of memory, say"), TrialFailed, "(?s)strict: exit code 1:.*out of memory, say"),
        (Finished(ExitCode.STOPPED, ""), TrialFailed, "^strict: a replica was asked to stop$"),
        (Finished(None, "still at it"), TrialFailed, r"(?s)no end within 60 seconds \(--timeout\):.*still at it"),
    ],
)
def test_start_that_fails_raises_its_reason(
    make: Callable[..., Measurements], ended: Finished, error: type[Exception], message: str
) -> None:
    measurements = make(lambda *_: ended)
    with pytest.raises(error, match=message):
        measurements.start(STRICT)


def lose_replica_1(_module: str, arguments: Sequence[str], *_: Any) -> Finished:
    lost = {"lost": [{"replica_id": 1, "reason": "raised OSError"}]}
    (Path(options_in(arguments)["folder"]) / "lost.json").write_text(json.dumps(lost))
    return Finished(ExitCode.FAILED, "a survivor's traceback")


def test_start_that_loses_a_replica_names_it(make: Callable[..., Measurements]) -> None:
    with pytest.raises(TrialFailed, match=r"^strict: exit code 1:\nreplica 1 was lost: raised OSError$"):
        make(lose_replica_1).start(STRICT)


def test_describe_end_before_first_step(tmp_path: Path) -> None:
    outcome = Outcome(STRICT, "cpu", 0, {}, tmp_path, {"cause": "optimizer-not-bound", "step": 0}, "preparation")
    assert describe(outcome) == "ends before the first step (optimizer-not-bound)"
