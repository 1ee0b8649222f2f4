"""The table of causes: complete, in sentences, with settings that can be pasted."""

import shlex

import pytest

from dreplica.agreement.verdict.causes import CAUSES, Cause
from dreplica.config.load import load_config
from dreplica.config.schema import RunConfig

LISTED = """none config-differs environment-differs optimizer-not-bound scheduler-not-bound parameters-not-optimized
storage-shared build-not-seeded build-rng-differs indices-differ batch-differs nondeterministic-operator transient-fault
persistent-fault declared-override evaluation-differs not-learning structure-differs order-differs replica-lost
generators-differ hyperparameter-differs host-value-differs kernel-differs uninitialized-memory unreplayed-state
unexplained"""

SETTINGS = [(cause, str(remedy)) for cause in CAUSES.values() for remedy in cause.remedy if remedy.settings]


def test_causes_are_complete() -> None:
    assert sorted(CAUSES) == sorted(LISTED.split())
    assert all(code == cause.code for code, cause in CAUSES.items())


@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES)
def test_explanation_is_one_sentence(cause: Cause) -> None:
    assert cause.explanation.endswith(".")
    assert cause.explanation[0].isupper()
    assert ". " not in cause.explanation


@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES)
def test_every_cause_except_none_has_a_remedy(cause: Cause) -> None:
    assert bool(cause.remedy) == (cause.code != "none")
    lines = [str(remedy) for remedy in cause.remedy]
    assert all(line.strip() == line and not line.endswith(".") for line in lines)


@pytest.mark.parametrize(("cause", "line"), SETTINGS, ids=[f"{cause.code}-{line[2:20]}" for cause, line in SETTINGS])
def test_settings_can_be_pasted(cause: Cause, line: str) -> None:
    config = load_config(shlex.split(line, comments=True), num_replicas=2)
    assert isinstance(config, RunConfig)


def test_some_causes_have_settings_to_paste() -> None:
    assert {cause.code for cause, _ in SETTINGS} >= {"build-not-seeded", "nondeterministic-operator", "unexplained"}


@pytest.mark.parametrize("code", ["transient-fault", "persistent-fault"])
def test_faults_name_memory_tests(code: str) -> None:
    codes = {remedy.code for remedy in CAUSES[code].remedy}
    assert codes >= {"check-host-memory", "check-gpu-memory", "test-host-memory"}
