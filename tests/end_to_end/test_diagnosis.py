"""Whole jobs that part, and what the replay says of them."""

import pytest
from torch import nn

from tests.fixtures import SMALL
from tests.harness import run_job


def wide_model(num_classes: int) -> nn.Module:
    """The gradient of its convolution rounds otherwise on two threads."""
    body = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(32, num_classes))


def test_another_thread_count_is_a_declared_override_and_its_operator_is_named() -> None:
    # ResNet-18: its first BatchNorm statistics round otherwise on two threads.
    job = run_job("--train.max_steps=1", "--data.batch_size=32", "--overrides.1.determinism.threads=2")
    verdict = job.report["verdict"]
    assert (verdict["agreed"], verdict["cause"]) == (False, "declared-override"), job.output
    assert (verdict["step"], verdict["stage"], verdict["phase"]) == (1, "buffers", "forward")
    assert verdict["operator"].startswith("aten.")
    assert verdict["module"].startswith("layer")
    assert (verdict["groups"], verdict["suspects"]) == ([[0], [1]], [1])
    for words in (("determinism.threads=2",), ("inputs agree", "outputs do not"), ("ULP",)):
        assert any(all(word in line for word in words) for line in verdict["evidence"]), words
    assert set(job.exitcodes.values()) == {3}


def test_of_three_replicas_the_one_with_another_thread_count_is_the_suspect_be_it_the_coordinator() -> None:
    model = "--model.factory=tests.end_to_end.test_diagnosis:wide_model"
    override = "--overrides.0.determinism.threads=2"
    job = run_job(*SMALL, model, "--data.batch_size=80", "--train.max_steps=1", override, num_replicas=3)
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["step"], verdict["stage"]) == ("declared-override", 1, "gradients"), job.output
    assert (verdict["module"], verdict["operator"]) == ("0", "aten.convolution_backward.default")
    assert (verdict["groups"], verdict["suspects"]) == ([[1, 2], [0]], [0])


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("{replica: 0, step: 3, target: weights}", "transient-fault"),
        ("{replica: 2, step: 4, target: activation, tensor: '0', bits: 8, repeat: true}", "persistent-fault"),
    ],
)
def test_a_fault_is_found_at_its_step_on_its_replica(fault: str, cause: str) -> None:
    job = run_job(*SMALL, f"--inject=[{fault}]", num_replicas=3)
    verdict = job.report["verdict"]
    replica = int(fault[10])
    assert (verdict["cause"], verdict["suspects"]) == (cause, [replica]), job.output
    assert verdict["step"] == int(fault.split("step: ")[1][0])
    assert set(job.exitcodes.values()) == {3}
    assert any("fault injection" in warning for warning in job.report["warnings"])
    assert "FAULT INJECTION" in job.output


def test_going_on_after_a_difference_ends_as_if_it_had_not_been_looked_into() -> None:
    """Probing changes nothing: the final digests are those of the same run without snapshots, hence without replay."""
    arguments = (*SMALL, "--overrides.1.determinism.onednn=false", "--agreement.on_divergence=continue")
    probed, unprobed = run_job(*arguments), run_job(*arguments, "--agreement.snapshot_every=0")
    assert probed.report["verdict"]["cause"] == "declared-override", probed.output
    assert probed.report["verdict"]["operator"] == "aten.convolution.default"
    assert unprobed.report["verdict"]["operator"] is None
    assert probed.report["fingerprints"] == unprobed.report["fingerprints"]
    assert probed.report["epochs"] == unprobed.report["epochs"]
    assert probed.report["steps_checked"] == 10
    distances = probed.report["distance"]
    assert [row["epoch"] for row in distances] == [1, 2]
    assert distances[0]["weights"]["l2"][0] == 0.0
    assert distances[0]["weights"]["l2"][1] > 0.0
    assert distances[0]["weights"]["max_ulp"][1] > 0
