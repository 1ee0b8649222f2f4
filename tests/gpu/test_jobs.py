"""Whole jobs on one GPU, which replicas share if there is only one."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dreplica.state.fingerprint import multilinear
from tests.fixtures import SMALL
from tests.harness import REPOSITORY, Job, environment, run_job
from tests.messages import commands, texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RESNET = (
    "--data.name=tests.gpu.models:noise",
    "--data.batch_size=16",
    "--schedule={}",
    "--model.name=resnet18",
    "--model.channels_last=true",
    "--train.amp=bf16",
    "--train.epochs=2",
)


def assert_agreed(job: Job, steps: int) -> None:
    assert job.returncode == 0, job.output
    verdict = job.report["verdict"]
    assert (verdict["agreed"], verdict["cause"], job.report["steps_checked"]) == (True, "none", steps), verdict
    assert multilinear.ALGORITHM in job.trace[0], "fingerprints are taken on the device"
    assert "slow" not in job.output


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_thousand_steps_in_strict_mode(num_replicas: int) -> None:
    job = run_job(*SMALL, "--train.epochs=200", num_replicas=num_replicas, timeout=300)
    assert_agreed(job, 1000)
    names = {row["device"] for row in job.report["replicas"]}
    assert names == {torch.cuda.get_device_name(0)}
    if torch.cuda.device_count() < num_replicas:
        assert any("share a GPU" in warning for warning in job.report["warnings"])


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_resnet_in_strict_mode(num_replicas: int) -> None:
    assert_agreed(run_job(*RESNET, num_replicas=num_replicas, timeout=300), 20)


@pytest.mark.parametrize(
    ("model", "operator", "phase"),
    [
        ("both", "aten.index_add.default", "forward"),
        ("gathered", "aten.index_add.default", "forward"),
        ("interpolated", "aten.upsample_bilinear2d_backward.default", "backward"),
    ],
)
def test_atomic_operator_is_named_and_remedy_helps(model: str, operator: str, phase: str) -> None:
    settings = (*SMALL, f"--model.factory=tests.gpu.models:{model}", "--train.epochs=4")
    job = run_job(*settings, "--determinism.mode=off", timeout=300)
    verdict = job.report["verdict"]
    assert (verdict["cause"], verdict["operator"], verdict["phase"]) == ("nondeterministic-operator", operator, phase)
    assert any(torch.cuda.get_device_name(0) in line for line in texts(verdict["evidence"])), "the card is named"
    remedy = shlex.split(commands(verdict["remedy"])[0])
    assert remedy[0].startswith("--")
    assert_agreed(run_job(*settings, "--determinism.mode=off", *_joined(remedy), timeout=300), 20)


def _joined(tokens: list[str]) -> list[str]:
    """Return `--key VALUE` as `--key=VALUE`."""
    return [f"{key}={value}" for key, value in zip(tokens[::2], tokens[1::2], strict=True)]


def test_pasted_remedies_are_combined() -> None:
    assert _joined(["--determinism.mode", "strict"]) == ["--determinism.mode=strict"]


@pytest.mark.parametrize("target", ["weights", "gradients", "optimizer", "buffers", "batch", "activation"])
def test_flipped_bit_on_device_is_a_transient_fault(target: str) -> None:
    fault = f"[{{replica: 1, step: 3, target: {target}}}]"
    verdict = run_job(*SMALL, f"--inject={fault}", num_replicas=3, timeout=300).report["verdict"]
    assert (verdict["cause"], verdict["step"], verdict["suspects"]) == ("transient-fault", 3, [1])


def test_fault_campaign() -> None:
    """A short campaign. Run it with `--faults 300` by hand."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    campaign = ["-m", "tests.benchmarks.fault_campaign", "--device", "cuda", "--faults", "16", "--clean-steps", "50"]
    done = subprocess.run(
        [*launcher, *campaign],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=REPOSITORY,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_interrupted_job_resumes(tmp_path: Path) -> None:
    straight = run_job(*SMALL, root=tmp_path / "straight")
    run_job(*SMALL, "--run.stop_after=4", root=tmp_path / "stopped")
    again = run_job(*SMALL, root=tmp_path / "stopped")
    assert again.report["verdict"]["agreed"]
    assert again.report["fingerprints"] == straight.report["fingerprints"]
    assert again.trace == straight.trace
