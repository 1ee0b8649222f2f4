"""The whole search on simulated jobs, one of them on a GPU, and its output."""

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dreplica.commands.flags import measure
from dreplica.commands.flags.flag_search import Study, investigate
from dreplica.commands.flags.measure import Measurements
from dreplica.commands.flags.print_results import print_study
from dreplica.config.load import load_config
from tests.commands.flags.jobs import MadeUp, Section

Made = Callable[[MadeUp], Study]


@pytest.fixture
def of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def of(job: MadeUp) -> Study:
        monkeypatch.setattr(measure, "run_in_background", job)
        config = load_config([], 2)
        measurements = Measurements(config, 2, 4, Path(tempfile.mkdtemp(dir=tmp_path)), 60.0, lambda _: None)
        return investigate(measurements, config.determinism, 2, rounds=2, cpus=8)

    return of


def printed(found: Study) -> str:
    text = io.StringIO()
    print_study(Console(file=text, width=120), found)
    return text.getvalue()


def needs_convolutions(section: Section, workspace: str | None) -> str | None:
    """Diverge unless a flag makes cuDNN deterministic and cuDNN does not choose by timing."""
    deterministic = section["mode"] == "strict" or section["cudnn_deterministic"]
    return None if deterministic and not section["cudnn_benchmark"] else "aten.cudnn_convolution.default"


def costs(section: Section) -> float:
    return 10.0 + 2.0 * (section["mode"] == "strict") + 1.0 * section["fill_uninitialized_memory"]


def test_search_on_gpu_finds_smallest_set(of: Made) -> None:
    job = MadeUp("cuda", needs_convolutions, costs)
    found = of(job)
    assert found.needed == ["cudnn_deterministic", "cudnn_benchmark"]
    verified = [section for section in job.sections if section["mode"] == "off" and section["cudnn_deterministic"]]
    assert verified[-1]["cublas_workspace_config"] is None
    row = found.as_dict()
    assert row["smallest"]["determinism"] == {
        "mode": "off",
        "fill_uninitialized_memory": False,
        "cudnn_deterministic": True,
        "cudnn_benchmark": False,
        "cublas_workspace_config": None,
    }
    assert row["smallest"]["starts"] == 4, "two in the search, and two to confirm"
    assert row["flags"]["cudnn_deterministic"]["agrees"], "as long as the mode is strict"
    assert "does not start" in row["flags"]["cublas_workspace_config"]["raised"]["message"]
    assert row["flags"]["cublas_workspace_config"]["starts"] == 0
    assert row["flags"]["cudnn_benchmark"]["parted"]["operator"] == "aten.cudnn_convolution.default"
    assert row["flags"]["fill_uninitialized_memory"]["step_time_to_strict"]["median"] == pytest.approx(12 / 13)
    assert [next(iter(option)) for option in row["options"]] == ["tf32", "reduced_precision_reduction"]
    json.dumps(row)
    text = printed(found)
    assert "SMALLEST SET cudnn_deterministic, cudnn_benchmark\n" in text
    assert "--determinism.mode off --determinism.fill_uninitialized_memory false" in text
    assert "time per step: 0.769 (0.769 to 0.769) x strict mode's, 1.000 (1.000 to 1.000) x with everything off" in text
    assert "cublas_workspace_config off: strict mode does not start without CUBLAS_WORKSPACE_CONFIG" in text
    assert (
        "cudnn_benchmark off: replicas diverge at step 2 (output, logits): aten.cudnn_convolution.default in body"
        in text
    )
    assert "evidence, not proof: 4 steps, trained twice in each of 4 starts" in text
    assert "32 between 2 replicas, 16 with those of the first training in the same process, 12 with those of" in text


def test_search_job_that_needs_no_flag(of: Made) -> None:
    job = MadeUp("cpu", lambda *_: None, costs)
    found = of(job)
    assert found.needed == []
    text = printed(found)
    assert "SMALLEST SET none: no flag was needed in 4 steps\n" in text
    assert "no effect on cpu: cudnn_deterministic, cudnn_benchmark, cublas_workspace_config, tf32, red" in text
    assert "  determinism: {mode: 'off', fill_uninitialized_memory: false}\n" in text
    assert "time per step: 0.769 (0.769 to 0.769) x strict mode's\n" in text
    assert "measurable" not in text, "each of them costs"
    varied = ("cudnn_deterministic", "cudnn_benchmark")
    assert {tuple(section[key] for key in varied) for section in job.sections} == {(True, False)}, "only noise"


def test_search_reports_flags_without_cost(of: Made) -> None:
    found = of(MadeUp("cpu", lambda section, _: "aten.index_put_.default" if section["mode"] == "off" else None))
    assert found.needed == ["mode"]
    text = printed(found)
    assert "no cost of fill_uninitialized_memory is measurable" in text
    assert "fill_uninitialized_memory has no effect without mode\n" in text
    everything = of(
        MadeUp("cpu", lambda section, _: None if section["fill_uninitialized_memory"] else "aten.add.Tensor")
    )
    assert everything.needed == ["mode", "fill_uninitialized_memory"]
    assert "time per step: strict mode's, 1.000 (1.000 to 1.000) x with everything off\n" in printed(everything)


def test_search_ends_if_strict_mode_diverges(of: Made) -> None:
    job = MadeUp("cpu", lambda *_: "mine.race.default")
    found = of(job)
    assert len(job.sections) == 1
    assert (
        "NOT EVEN IN STRICT MODE replicas diverge at step 2 (output, logits): mine.race.default in body (forward)"
        in (printed(found))
    )
    assert "  remedy: fix it\n" in printed(found)
    assert found.as_dict()["strict"]["agrees"] is False
    assert "smallest" not in found.as_dict()


def test_search_ends_if_strict_mode_diverges_later(of: Made) -> None:
    starts = iter([None, "mine.race.default", *[None] * 20])
    found = of(MadeUp("cpu", lambda *_: next(starts)))
    assert found.smallest is None
    assert found.as_dict()["strict"] | {"parted": None} == {
        "agrees": False,
        "starts": 3,
        "parted": None,
        "raised": None,
        "step_time_to_strict": {"median": 1.0, "min": 1.0, "max": 1.0},
        "same_numbers_as_strict": None,
    }


def test_search_ends_if_strict_mode_raises(of: Made) -> None:
    found = of(MadeUp("cpu", lambda *_: "raises aten.put_.default"))
    assert "STRICT MODE DOES NOT RUN raises at step 1: aten.put_.default in head (forward)\n" in printed(found)
