"""What accounts for a difference from a recorded run, from what the two were given and ran on alone."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from dreplica.agreement.reference import ReferenceDifference
from dreplica.agreement.trace.run_metadata import RunDifference
from dreplica.agreement.verdict.location import Place
from dreplica.config.schema import RunConfig
from dreplica.diagnosis.decision import decide_reference as against_reference
from dreplica.diagnosis.decision.decide_reference import AgainstReference
from dreplica.diagnosis.evidence.finding import Finding, Kind
from dreplica.diagnosis.evidence.observation import Witness
from dreplica.environment.determinism import CHANGEABLE, numerics_as, numerics_flags
from tests.messages import codes

ZERO, ONE, TWO = (bytes([number]) * 16 for number in range(3))


def against(
    step: int,
    stage: str,
    config: Sequence[tuple[str, Any, Any]] = (),
    manifest: Sequence[tuple[str, Any, Any]] = (),
    is_first: bool = True,
    unseeded: Sequence[str] = (),
    recorded: bytes = ONE,
) -> AgainstReference:
    place = Place(step, stage, None, [[0], [1]], 0, 0, [stage], {})
    rows = ([RunDifference(*row, matters=True) for row in rows] for rows in (config, manifest))
    difference = ReferenceDifference("ref", place, {stage: recorded.hex()}, is_first)
    return AgainstReference(difference, *rows, frozenset(unseeded))


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        (against(1, "optimizer", [("optim.lr", 1, 2)]), "config-differs"),
        (against(1, "optimizer", [("optim.lr", 1, 2)], [("code", "a", "b")]), "config-differs"),
        (against(1, "indices", [("seed.data", 0, 7)]), "config-differs"),
        (against(1, "indices", [("seed.data", None, 7)]), "config-differs"),
        (against(0, "weights", [("seed.model", 1, 2)]), "config-differs"),
        (against(1, "gradients", [("train.grad_clip", None, 1.0)]), "config-differs"),
        (against(1, "batch", [("seed.augment", 1, 2)]), "config-differs"),
        (against(1, "batch", [("overrides.0.data.image_size", None, 4)]), "config-differs"),
        (against(1, "output", [], [("cpu.model", "X", "Y")]), "environment-differs"),
        (against(0, "weights", [], [("packages.torchvision", "1", "2")]), "environment-differs"),
        (against(1, "batch", [], [("data", "a", "b")]), "environment-differs"),
        (against(1, "indices", [], unseeded=["seed.data"]), "indices-differ"),
        (against(0, "weights", [], unseeded=["seed.model"]), "build-not-seeded"),
        # Steps before were not compared: what acts on any of their stages shows in all that is computed from them.
        (against(3, "buffers", [("optim.momentum", 0.9, 0.5)]), "config-differs"),
        (against(3, "output", [], [("data", "a", "b")]), "environment-differs"),
        (against(3, "buffers", [("optim.momentum", 0.9, 0.5)], [("data", "a", "b")]), "unexplained"),
        (against(3, "batch", [("optim.momentum", 0.9, 0.5)]), "batch-differs"),
        # What differs cannot act there, or has acted before, or is not the only thing.
        (against(1, "output", [("optim.lr", 1, 2)]), "unexplained"),
        (against(1, "indices", [("seed.augment", 1, 2)]), "indices-differ"),
        (against(1, "gradients", [("optim.lr", 1, 2), ("seed.data", 1, 2)]), "unexplained"),
        (against(1, "output", [], [("python", "3.11", "3.12"), ("packages.pillow", "1", "2")]), "unexplained"),
        (against(1, "output", [("model.compile", False, True)], [("code", "a", "b")]), "unexplained"),
        (against(1, "batch", [("overrides.1.data.image_size", None, 4)]), "batch-differs"),
        (against(7, "optimizer", [("optim.lr", 1, 2)], is_first=False), "unexplained"),
        (against(7, "output", [], [("cpu.model", "X", "Y")], is_first=False), "unexplained"),
        (against(7, "indices", [("seed.data", 0, 7)], is_first=False), "indices-differ"),
        (against(1, "weights"), "unexplained"),
    ],
)
def test_a_cause_is_named_where_nothing_else_can_have_been_it(given: AgainstReference, cause: str) -> None:
    assert given.account().cause == cause


def test_manifest_field_implied_by_setting_counts_once() -> None:
    both = [("determinism.threads", 1, 2)], [("numerics.threads", 1, 2)]
    assert against(1, "output", *both).account().cause == "config-differs"
    assert against(1, "output", [], both[1]).account().cause == "environment-differs"
    excluded = {"determinism.threads", "numerics.threads"}
    assert against(1, "output", *both).account(excluded).cause == "unexplained"


def test_all_settings_that_are_named_exist() -> None:
    config = RunConfig().model_dump()
    sections = {**against_reference._SHOWS_IN, **against_reference._ACTS_ON}
    free = {"optim"}  # takes any keyword of its class
    for name in [*sections, *against_reference._SHOWS_IN_BUILD, *against_reference._SHOWS_NOWHERE]:
        section, _, key = name.partition(".")
        assert section in config
        assert not key or section in free or key in config[section], name


def witness(original: bytes, first: bytes, second: bytes, **changes: Any) -> Witness:
    stages = ({"output": digest} for digest in (original, first, second))
    fields = {"records": [], "against_itself": None, "contents": None, "indices_intact": True, "generator": b""}
    return Witness(*stages, **fields, generator_changed=False, sample_digests=[], **changes)  # type: ignore[arg-type]


FEW, DRAWN = Finding(Kind.FEW_BITS), Finding(Kind.DRAWN_FURTHER)


def never() -> Any:
    raise AssertionError("nothing is to be tried")


@pytest.mark.parametrize(
    ("rows", "cause", "suspects", "code"),
    [
        ([witness(ZERO, ZERO, ZERO)], "config-differs", [], "reference-reproduces"),
        ([witness(ZERO, ONE, ONE)], "unexplained", [0], "reference-matches-replay"),
        ([witness(ZERO, ONE, ONE, findings=[FEW])], "transient-fault", [0], "reference-matches-replay"),
        ([witness(ZERO, ONE, ONE, findings=[FEW, DRAWN])], "generators-differ", [0], "reference-matches-replay"),
        ([witness(ZERO, ONE, ONE)] * 2, "unexplained", [], "reference-on-all-replicas"),
        ([witness(ZERO, TWO, TWO)], "unexplained", [], "reference-neither"),
        ([witness(ZERO, ZERO, ONE)], "unexplained", [], "replays-vary"),
        ([witness(ZERO, ZERO, ZERO, unreproduced=3)], "unexplained", [], "replays-miss-agreed-step"),
    ],
)
def test_this_side_is_looked_at_before_the_settings_are(
    rows: list[Witness], cause: str, suspects: list[int], code: str
) -> None:
    decision = against(1, "output", [("model.compile", False, True)]).judge(rows, never)
    assert (decision.cause, decision.suspects) == (cause, suspects)
    assert code in codes(decision.evidence)


@pytest.mark.parametrize(
    ("config", "comes_to", "cause"),
    [
        ([("determinism.threads", 3, 1)], ONE, "config-differs"),
        ([], ONE, "environment-differs"),
        ([("determinism.threads", 3, 1)], ZERO, "unexplained"),
        ([("determinism.threads", 3, 1), ("model.compile", False, True)], ZERO, "config-differs"),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_the_threads_of_the_reference_are_tried(config: Any, comes_to: bytes, cause: str, is_first: bool) -> None:
    before, seen = torch.get_num_threads(), []

    def again() -> dict[str, bytes]:
        seen.append(torch.get_num_threads())
        return {"output": comes_to}

    given = against(1, "output", config, [("numerics.threads", 3, 1)], is_first)
    decision = given.judge([witness(ZERO, ZERO, ZERO)], again)
    assert (seen, torch.get_num_threads()) == ([3], before)
    proved = comes_to == ONE
    assert decision.cause == (cause if proved or is_first else "unexplained")


def test_changed_numerics_are_put_back_after_an_error_too() -> None:
    before = numerics_flags()
    assert set(CHANGEABLE) <= before.keys()
    other = {"threads": before["threads"] + 1, "onednn": not before["onednn"]}

    def fail() -> None:
        with numerics_as(other):
            assert {name: numerics_flags()[name] for name in CHANGEABLE} == other
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    with numerics_as({}):
        assert numerics_flags() == before
    assert numerics_flags() == before
