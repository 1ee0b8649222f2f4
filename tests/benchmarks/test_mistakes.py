"""Tests of the mistakes campaign: its table is complete, its judge is strict, and a few plants run."""

from collections import Counter

import pytest

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.config.schema import DeterminismConfig
from dreplica.distributed.process_group import World
from dreplica.environment.determinism import apply_determinism, set_environment
from dreplica.state.stages import STAGES
from tests.benchmarks.mistakes.judge import judge
from tests.benchmarks.mistakes.kinds import CHANGED, KINDS, Kind
from tests.benchmarks.mistakes.site import draw_site
from tests.benchmarks.mistakes_campaign import SETTINGS, campaign, list_plants
from tests.harness import run_replicas

FEW = {
    "lr_by_rank": {"loop", "ddp", "trainer"},
    "shuffled_by_rank": {"loop", "ddp", "trainer"},
    "flag_at_build": {"trainer"},
    "optimizer_of_a_copy": {"trainer"},
    "wrong_for_all": {"loop", "ddp", "trainer"},
    "scale_head_once": {"ddp"},
    "scale_by_rank": {"loop"},
    "kernel_of_relu": {"loop"},
}
"""Plants of which everything is known in less than a second each: name to settings."""


def _kind(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def test_campaign_is_large_enough() -> None:
    assert len({kind.name for kind in KINDS}) >= 40
    assert len(list_plants(0, settings="LT")) >= 120


def test_expectations_are_known_words() -> None:
    assert {cause for kind in KINDS for cause in (kind.cause, *kind.also)} <= CAUSES.keys()
    assert {stage for kind in KINDS for stage in kind.stages} <= set(STAGES)
    assert CHANGED.keys() <= {kind.name for kind in KINDS}


def test_second_causes_have_a_reason() -> None:
    assert [kind.name for kind in KINDS if kind.also and not kind.why] == []


def test_plants_have_one_expectation_each() -> None:
    rows = Counter((kind.name, kind.point, letter) for kind in KINDS for letter in kind.settings)
    assert [row for row, count in rows.items() if count > 1] == []


def test_drawing_does_not_depend_on_the_rank() -> None:
    first, second = (draw_site(7, 3, rank, 2, _kind("scale_by_rank"), "loop") for rank in range(2))
    assert (first.at, first.bad_rank, first.network) == (second.at, second.bad_rank, second.network)
    assert first.is_bad is not second.is_bad


@pytest.mark.parametrize(
    ("cause", "step", "problem"),
    [
        ("hyperparameter-differs", 1, None),
        ("hyperparameter-differs", 2, "WRONG STEP 2, expected 1"),
        ("batch-differs", 1, "WRONG CAUSE"),
        ("transient-fault", 1, "HARDWARE"),
        ("unexplained", 1, "not explained"),
    ],
)
def test_judge_is_strict(cause: str, step: int, problem: str | None) -> None:
    kind = _kind("lr_by_rank")
    site = draw_site(0, 0, 0, 2, kind, "loop")
    verdict = Verdict(False, cause, "", step=step, stage="optimizer", tensor="group0.lr")
    problems = judge(kind, site, verdict).problems
    assert (problems[0] if problems else None) == problem


def test_judge_notices_missed_and_false_alarms() -> None:
    kind, fine = _kind("lr_by_rank"), _kind("wrong_for_all")
    assert judge(kind, draw_site(0, 0, 0, 2, kind, "loop"), None).problems == ["MISSED"]
    verdict = Verdict(False, "unexplained", "", step=1, stage="output")
    assert judge(fine, draw_site(0, 0, 0, 2, fine, "loop"), verdict).problems == ["FALSE ALARM"]


def _run_few(world: World) -> dict[tuple[str, str], list[str]]:
    determinism = DeterminismConfig()
    set_environment(determinism)
    apply_determinism(determinism)
    plants = [(kind, letter) for kind, letter in list_plants(0) if SETTINGS[letter] in FEW.get(kind.name, ())]
    results = campaign(world, plants, 0)
    return {(judged.kind.name, judged.site.setting): judged.problems for judged in results}


@pytest.mark.process
def test_a_few_plants_are_as_expected() -> None:
    results = run_replicas(_run_few, 2)
    assert results[0] == results[1]
    assert results[0] == {(name, setting): [] for name, settings in FEW.items() for setting in settings}
