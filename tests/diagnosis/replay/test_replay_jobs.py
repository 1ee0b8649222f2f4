"""Whole jobs whose models, criteria or data have state that is not compared: replays equal the original steps."""

from typing import Any

import pytest

from tests.fixtures import SMALL
from tests.harness import run_job

MODELS = ["own_generators", "draws_always", "freezing", "buffer_of_weights", "expanded", "odd_dtypes"]
FLIPPED = "--inject=[{{replica: 1, step: {}, target: weights}}]"


def part(name: str) -> str:
    return f"--{'replica' if name.startswith('with_') else 'model'}.factory=tests.diagnosis.replay.stateful:{name}"


def verdict_of(*arguments: str) -> dict[str, Any]:
    job = run_job(*SMALL, *arguments, num_replicas=3)
    verdict = job.report["verdict"]
    assert verdict["cause"] != "replica-lost", job.output
    return verdict


@pytest.mark.parametrize("name", ["by_the_count", *MODELS, "with_center_loss"])
def test_flipped_weight_is_found_across_evaluation(name: str) -> None:
    verdict = verdict_of(part(name), FLIPPED.format(8))
    assert (verdict["cause"], verdict["suspects"], verdict["step"]) == ("transient-fault", [1], 8)
    assert verdict["stage"] == "weights"


@pytest.mark.parametrize(
    ("name", "stage", "operator"),
    [("once_on_replica_1", "output", "aten.mul.Tensor"), ("resized_on_replica_1", "buffers", "aten.zeros.default")],
)
def test_code_run_once_is_no_fault(name: str, stage: str, operator: str) -> None:
    verdict = verdict_of(part(name))
    assert (verdict["cause"], verdict["suspects"], verdict["stage"]) == ("structure-differs", [1], stage)
    assert verdict["operator"] == operator


def test_criterion_parameters_in_optimizer() -> None:
    assert verdict_of(part("with_center_loss"))["cause"] == "none"


def test_broadcast_of_unusual_buffers() -> None:
    assert verdict_of(part("expanded"), "--model.init=broadcast")["cause"] == "none"
    assert verdict_of(part("odd_dtypes"), "--model.init=broadcast")["cause"] == "none"


@pytest.mark.parametrize(
    "argument", [*map(part, (*MODELS, "with_center_loss")), "--data.name=tests.diagnosis.replay.stateful:restless"]
)
def test_diagnosis_does_not_change_training(argument: str) -> None:
    arguments = (*SMALL, argument, FLIPPED.format(3), "--agreement.on_divergence=continue")
    probed, unprobed = (run_job(*arguments, f"--agreement.snapshot_every={every}", num_replicas=2) for every in (50, 0))
    assert len(probed.report["verdict"]["evidence"]) > len(unprobed.report["verdict"]["evidence"]), probed.output
    assert probed.report["fingerprints"] == unprobed.report["fingerprints"]
    assert probed.report["epochs"] == unprobed.report["epochs"]
    assert probed.trace[1:] == unprobed.trace[1:]
