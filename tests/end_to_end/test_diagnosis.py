"""Whole jobs that diverge, and their diagnosis."""

import pytest
import torchvision

from tests.fixtures import SMALL
from tests.harness import run_job
from tests.messages import codes, data_of

SUMS = "dreplica.commands.cases.samples.models:scaled_by_sums"
"""A model whose sums have another order of addition on two threads, on every CPU."""


def test_override_of_threads_names_the_operator() -> None:
    """ResNet-18 trains differently on two threads; which of its layers rounds differently depends on the CPU."""
    job = run_job("--train.max_steps=1", "--data.batch_size=32", "--overrides.1.determinism.threads=2")
    verdict = job.report["verdict"]
    assert (verdict["agreed"], verdict["cause"]) == (False, "declared-override"), job.output
    assert (verdict["step"], verdict["stage"], verdict["phase"]) == (1, "buffers", "forward")
    assert verdict["operator"].startswith("aten.")
    assert verdict["module"] in dict(torchvision.models.resnet18().named_modules())
    assert (verdict["groups"], verdict["suspects"]) == ([[0], [1]], [1])
    assert data_of(verdict["evidence"], "declared-settings") == {"replica": 1, "settings": "determinism.threads=2"}
    assert "operator-outputs-differ" in codes(verdict["evidence"])
    assert data_of(verdict["evidence"], "output-differs")["max_ulp"] > 0
    assert set(job.exitcodes.values()) == {3}


def test_suspect_is_minority_thread_count() -> None:
    override = "--overrides.0.determinism.threads=2"
    job = run_job(
        *SMALL, f"--model.factory={SUMS}", "--data.batch_size=80", "--train.max_steps=1", override, num_replicas=3
    )
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["step"], verdict["stage"]) == ("declared-override", 1, "output"), job.output
    assert (verdict["module"], verdict["operator"]) == ("sums", "aten.sum.default")
    assert (verdict["groups"], verdict["suspects"]) == ([[1, 2], [0]], [0])


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("{replica: 0, step: 3, target: weights}", "transient-fault"),
        ("{replica: 2, step: 4, target: activation, tensor: '0', bits: 8, repeat: true}", "persistent-fault"),
    ],
)
def test_fault_is_found_at_its_step_and_replica(fault: str, cause: str) -> None:
    job = run_job(*SMALL, f"--inject=[{fault}]", num_replicas=3)
    verdict = job.report["verdict"]
    replica = int(fault[10])
    assert (verdict["cause"], verdict["suspects"]) == (cause, [replica]), job.output
    assert verdict["step"] == int(fault.split("step: ")[1][0])
    assert set(job.exitcodes.values()) == {3}
    assert any("fault injection" in warning for warning in job.report["warnings"])
    assert job.output.count("fault injection: ") == 1


def test_diagnosis_does_not_change_a_continued_run() -> None:
    """The final digests are those of the same run without snapshots, which cannot be replayed."""
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
