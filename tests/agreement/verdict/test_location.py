"""Find where replicas first diverge, from what each of them compared."""

from collections.abc import Sequence

import pytest

from dreplica.agreement.verdict.advice import advise
from dreplica.agreement.verdict.location import Place, describe, first_difference
from dreplica.agreement.verdict.signs import Sign
from dreplica.state.stages import STAGES, Stage


def stage(**digests: str) -> Stage:
    """Entries with one-letter digests."""
    return Stage(tuple(digests), b"".join(letter.encode() * 16 for letter in digests.values()))


def place_of(*stages: dict[str, Stage]) -> Place:
    return first_difference([4] * len(stages), stages)


def test_first_difference_takes_first_stage_and_entry() -> None:
    same = {"weights": stage(a="x", b="x", c="x"), "rng": stage(python="x"), "buffers": stage(mean="x")}
    other = {"weights": stage(a="x", b="y", c="z"), "rng": stage(python="y"), "buffers": stage(mean="x")}
    place = place_of(same, other, same)
    assert place == Place(
        step=4,
        stage="weights",
        tensor="b",
        groups=[[0, 2], [1]],
        num_differing=2,
        num_entries=3,
        differing_stages=["weights", "rng"],
        only_on={},
        stage_groups={"buffers": [[0, 1, 2]], "weights": [[0, 2], [1]], "rng": [[0, 2], [1]]},
        differing=["b", "c"],
        generators=["python"],
    )
    assert not place.is_structural


@pytest.mark.parametrize("first", range(len(STAGES)))
def test_first_difference_follows_causal_order(first: int) -> None:
    one = {name: stage(t="x") for name in STAGES}
    two = {name: stage(t="y" if STAGES.index(name) >= first else "x") for name in reversed(STAGES)}
    place = place_of(one, two)
    assert place.stage == STAGES[first]
    assert place.differing_stages == list(STAGES[first:])


@pytest.mark.parametrize("owners", [[0], [1], [0, 2], [1, 2]])
def test_first_difference_finds_stage_of_some_replicas(owners: Sequence[int]) -> None:
    rows = [{"weights": stage(w="x")} | ({"batch": stage(i="x", j="x")} if r in owners else {}) for r in range(3)]
    place = place_of(*rows)
    assert (place.stage, place.tensor) == ("batch", "i")
    assert place.only_on == {"i": list(owners), "j": list(owners)}
    others = [replica for replica in range(3) if replica not in owners]
    assert sorted(place.groups) == sorted([list(owners), others])
    assert place.is_structural


def test_first_difference_finds_entries_of_some_replicas() -> None:
    place = place_of({"weights": stage(a="x", b="x")}, {"weights": stage(a="x", c="x")})
    assert (place.tensor, place.num_differing, place.num_entries) == ("b", 2, 3)
    assert place.only_on == {"b": [0], "c": [1]}


def test_first_difference_finds_order_of_entries() -> None:
    place = place_of({"batch": stage(a="x", b="y")}, {"batch": stage(b="y", a="x")})
    assert (place.stage, place.tensor, place.num_differing, place.only_on) == ("batch", None, 0, {})
    assert place.is_structural
    assert place.first_moved == (0, ["a", "b"])
    text = describe(place, None, 2).evidence[0].text
    assert text.startswith("the same 2 entries of batch are in different orders")
    assert text.endswith("the entry at position 0 is a on replicas [0]; b on replicas [1]")


def test_first_difference_finds_missing_empty_stage() -> None:
    place = place_of({"batch": stage()}, {})
    assert (place.stage, place.tensor, place.groups) == ("batch", None, [[0], [1]])
    assert describe(place, None, 2).evidence[0].text == "some replicas do not have the stage batch"


def test_first_difference_finds_different_steps() -> None:
    place = first_difference([6, 5, 6], [{"weights": stage(w="x")}] * 3)
    assert (place.step, place.stage, place.tensor, place.groups) == (5, None, None, [[0, 2], [1]])
    verdict = describe(place, None, 3)
    assert (verdict.cause, verdict.step, verdict.suspects) == ("structure-differs", 5, [1])
    assert "number of steps" in verdict.summary
    assert (
        verdict.evidence[0].text
        == "replicas compare different steps: step 6 on replicas [0, 2]; step 5 on replicas [1]"
    )


@pytest.mark.parametrize(
    ("name", "tensor", "cause", "module"),
    [
        ("indices", "indices", "indices-differ", None),
        ("batch", "inputs", "batch-differs", None),
        ("predictions", "logits", "evaluation-differs", None),
        ("weights", "layer1.0.conv1.weight", "unexplained", "layer1.0.conv1"),
        ("gradients", "head.bias", "unexplained", "head"),
        ("buffers", "bn.running_var", "unexplained", "bn"),
        ("weights", "scale", "unexplained", None),
        ("optimizer", "group0.lr", "hyperparameter-differs", None),
        ("output", "loss", "unexplained", None),
        ("rng", "torch.cpu", "unexplained", None),
    ],
)
def test_describe_names_place_groups_and_cause(name: str, tensor: str, cause: str, module: str | None) -> None:
    good, bad = {name: stage(**{"0": "x", tensor: "x"})}, {name: stage(**{"0": "x", tensor: "y"})}
    verdict = describe(place_of(good, good, bad), 2, 3)
    assert (verdict.agreed, verdict.cause, verdict.step, verdict.epoch) == (False, cause, 4, 2)
    assert (verdict.stage, verdict.tensor, verdict.module) == (name, tensor, module)
    assert (verdict.groups, verdict.suspects) == ([[0, 1], [2]], [2])
    lines = [f"1 of 2 entries of {name} differ: {tensor}", f"differing stages: {name}"]
    assert [item.text for item in verdict.evidence] == lines
    assert verdict.summary == f"replicas diverged at step 4: {name}, {tensor}; groups [[0, 1], [2]]"


def test_describe_reports_missing_majority_and_entries() -> None:
    place = first_difference([0, 0], [{"weights": stage(a="x")}, {"weights": stage(a="x", b="x")}])
    verdict = describe(place, None, 2)
    assert verdict.cause == "structure-differs"
    assert "at the build (step 0)" in verdict.summary
    assert verdict.suspects == []
    found = {item.code: item for item in verdict.evidence}
    assert found["entries-missing"].data["entries"] == {"b": [1]}
    assert found["entries-missing"].text == "1 entries exist on some replicas only: b only on replicas [1]"
    assert found["no-majority"].data == {"num_replicas": 2}


def test_describe_omits_missing_names() -> None:
    for place in (
        place_of({"batch": stage(a="x", b="y")}, {"batch": stage(b="y", a="x")}),
        place_of({"batch": stage()}, {}),
        first_difference([1, 2], [{}, {}]),
    ):
        verdict = describe(place, None, 2)
        assert verdict.cause == ("order-differs" if place.num_entries else "structure-differs")
        assert "None" not in " ".join([verdict.summary, *map(str, verdict.evidence)])


@pytest.mark.parametrize(("step", "name", "seeds"), [(0, "weights", True), (0, "rng", True), (1, "weights", False)])
def test_advise_recommends_seeding_the_build(step: int, name: str, seeds: bool) -> None:
    def codes(*rows: dict[str, Stage]) -> list[str]:
        verdict = describe(first_difference([step, step], rows), None, 2)
        return [item.code for item in advise(verdict.with_(signs=verdict.signs | {Sign.LIBRARY: []}))]

    assert ("seed-before-build" in codes(*({name: stage(a=letter)} for letter in "xy"))) == seeds
    assert "seed-before-build" not in codes({name: stage(a="x")}, {name: stage(b="x")}), "no seed gives another tensor"


@pytest.mark.parametrize(
    ("differing", "cause"),
    [
        (["group0.lr"], "hyperparameter-differs"),
        (["group0.lr", "w.momentum_buffer"], "hyperparameter-differs"),  # which follows from it
        (["critic.group1.betas.0"], "hyperparameter-differs"),
        (["GradScaler.scale", "GradScaler._growth_tracker"], "hyperparameter-differs"),
        (["ReduceLROnPlateau.best"], "hyperparameter-differs"),
        (["StepLR.last_epoch", "StepLR._step_count"], "hyperparameter-differs"),
        (["w.momentum_buffer"], "unexplained"),
        (["w.momentum_buffer", "GradScaler.scale"], "unexplained"),  # a step was skipped
        (["Average.w"], "unexplained"),
        (["group0.params.1"], "unexplained"),
    ],
)
def test_describe_names_settings_that_differ(differing: list[str], cause: str) -> None:
    weights = {"weights": stage(w="x")}
    one, other = (
        weights | {"optimizer": Stage(tuple(differing), b"".join(value * 16 for _ in differing))}
        for value in (b"a", b"b")
    )
    assert describe(first_difference([1, 1], [one, other]), None, 2).cause == cause
