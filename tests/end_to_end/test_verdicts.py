"""Whole jobs with one known fault each: the verdict names it, with place, suspects, evidence and remedy."""

from typing import Any

import pytest

from tests.fixtures import SMALL
from tests.harness import Job, run_job
from tests.messages import codes, commands, data_of, text_of, texts

FAULTY = "tests.end_to_end.faulty"
SHORT = (*SMALL, "--train.epochs=1")


def diverged(job: Job, cause: str, **fields: Any) -> dict[str, Any]:
    """The verdict of a job that must have ended with `cause`, exit code 3 on every replica, and `fields`."""
    verdict = job.report["verdict"]
    assert verdict["cause"] == cause, (verdict, job.output)
    # The launcher ends the rest once one worker has ended, so not every code need be there.
    assert job.exitcodes
    assert set(job.exitcodes.values()) <= {3, -15}, job.output
    assert 3 in job.exitcodes.values()
    assert verdict["summary"].strip()
    assert verdict["evidence"]
    assert {key: verdict[key] for key in fields} == fields
    assert verdict["remedy"]
    return verdict


def agreed(job: Job) -> dict[str, Any]:
    assert job.returncode == 0, job.output
    report = job.report
    assert (report["verdict"]["agreed"], report["verdict"]["cause"]) == (True, "none")
    return report


def digests_of(job: Job, stage: str) -> list[str]:
    return [line["digests"][stage] for line in job.trace_rows if stage in line["digests"]]


# ---- the build


def test_unseeded_builds_diverge_at_step_0() -> None:
    job = run_job(*SHORT, "--seed.model=null")
    verdict = diverged(
        job,
        "build-not-seeded",
        agreed=False,
        step=0,
        stage="weights",
        tensor="0.weight",
        module="0",
        suspects=[],
        groups=[[0], [1]],
    )
    assert "--seed.model 42" in commands(verdict["remedy"])
    seeds = [replica["seed"] for replica in job.report["replicas"]]
    assert len(set(seeds)) == 2
    assert data_of(verdict["evidence"], "build-seeds-drawn")["seeds"] == seeds


def test_unseeded_builds_agree_after_broadcast() -> None:
    job = run_job(*SHORT, "--seed.model=null", "--model.init=broadcast")
    report = agreed(job)
    assert report["expect"] == "identical"
    assert report["steps_checked"] == 5
    one, two = report["fingerprints"]
    assert {**one, "replica": None} == {**two, "replica": None}


@pytest.mark.parametrize(
    ("factory", "cause"),
    [("one_more_draw_on_rank_1", "build-rng-differs"), ("reseeded_from_the_os", "build-not-seeded")],
)
def test_build_that_draws_differently(factory: str, cause: str) -> None:
    job = run_job(*SHORT, f"--model.factory={FAULTY}:{factory}")
    diverged(job, cause, agreed=False, step=0, stage="weights", tensor="0.weight", groups=[[0], [1]], suspects=[])


@pytest.mark.parametrize(
    ("factory", "cause", "code"),
    [
        # Not drawn from the global generators, which are equal before and after: found by building again.
        ("drawn_elsewhere", "build-not-seeded", "rebuild-varies"),
        # The same picture without a random number in it: no cause that speaks of seeds is true of it.
        ("scaled_by_rank", "unexplained", "rebuild-reproduces"),
    ],
)
def test_build_diverges_with_equal_generators(factory: str, cause: str, code: str) -> None:
    job = run_job(*SHORT, f"--model.factory={FAULTY}:{factory}")
    verdict = diverged(job, cause, agreed=False, step=0, stage="weights", tensor="5.weight", module="5")
    assert "generators-equal-around-build" in codes(verdict["evidence"])
    assert code in codes(verdict["evidence"])
    assert "faulty.py" in text_of(verdict["evidence"], "rebuild-diverges")


# ---- the wiring


@pytest.mark.parametrize(
    ("factory", "cause", "fields", "remedy"),
    [
        ("copied_optimizer", "optimizer-not-bound", {"suspects": [0, 1]}, "copy.deepcopy((model, optimizer))"),
        ("copied_scheduler", "scheduler-not-bound", {"suspects": [0, 1]}, "StepLR(optimizer, ...)"),
        (
            "forgotten_head",
            "parameters-not-optimized",
            {"suspects": [0, 1], "tensor": "5.weight"},
            "model.parameters()",
        ),
        (
            "shared_storage_on_rank_1",
            "storage-shared",
            {"suspects": [1], "tensor": "1.running_var", "groups": [[0], [1]]},
            ".clone()",
        ),
    ],
)
def test_wiring_fault_is_named(factory: str, cause: str, fields: dict[str, Any], remedy: str) -> None:
    job = run_job(*SHORT, f"--replica.factory={FAULTY}:{factory}")
    verdict = diverged(job, cause, step=0, **fields)
    assert any(remedy in line for line in (*texts(verdict["remedy"]), *commands(verdict["remedy"])))


# ---- the data


def test_unseeded_data_order_agrees_between_replicas() -> None:
    jobs = [run_job(*SHORT, "--seed.data=null") for _ in range(2)]
    for job in jobs:
        agreed(job)
    one, other = (digests_of(job, "indices") for job in jobs)
    assert len(one) == len(other) == 5
    assert not set(one) & set(other)
    weights = [digests_of(job, "weights") for job in jobs]
    assert weights[0][0] == weights[1][0], "the build does not depend on the data's seed"
    assert weights[0][1] != weights[1][1]


def test_different_bytes_of_equal_samples() -> None:
    job = run_job(*SHORT, f"--data.name={FAULTY}:noisy_on_rank_1", "--data.batch_size=80")
    verdict = diverged(job, "batch-differs", agreed=False, step=1, stage="batch", tensor="inputs", groups=[[0], [1]])
    assert "indices" not in str(texts(verdict["evidence"])[1:3])


# ---- training and evaluation


def test_independent_replicas_report_spread() -> None:
    job = run_job(*SHORT, "--seed.model=[1, 2]")
    report = agreed(job)
    assert report["expect"] == "independent"
    assert report["verdict"]["groups"] == [[0], [1]]
    accuracies = job.values("val", "accuracy")
    spread = report["spread"]
    assert spread["n"] == 2
    assert spread["accuracy_mean"] == pytest.approx(sum(accuracies) / 2)
    assert spread["accuracy_std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert spread["disagreement"][0][0] == 0
    assert spread["disagreement"][0][1] == spread["disagreement"][1][0]
    one, two = report["fingerprints"]
    assert one["weights"] != two["weights"]


def test_changing_buffers_are_not_learning() -> None:
    job = run_job(*SHORT, "--optim.lr=0")
    verdict = diverged(job, "not-learning", step=5, epoch=1, stage="weights", suspects=[0, 1])
    assert data_of(verdict["evidence"], "parameters-unchanged")["buffers_changed"] is True
    assert data_of(verdict["evidence"], "learning-rates")["before"] == [0.0]
    assert len(set(digests_of(job, "buffers"))) == 6
    assert len(set(digests_of(job, "weights"))) == 1


def test_evaluation_differs_on_one_replica() -> None:
    job = run_job(*SHORT, f"--model.factory={FAULTY}:other_evaluation")
    diverged(job, "evaluation-differs", agreed=False, step=5, epoch=1, stage="predictions", groups=[[0], [1]])


def test_different_validation_labels_are_different_data() -> None:
    job = run_job(*SHORT, f"--data.name={FAULTY}:other_labels_to_validate_on_rank_1")
    verdict = diverged(job, "batch-differs", step=5, stage="batch", tensor="validation batch 0", phase="evaluation")
    assert data_of(verdict["evidence"], "differing-stages") == {"stages": ["batch"]}


@pytest.mark.parametrize("cause", ["declared-override", "build-rng-differs"])
def test_build_differs_as_declared(cause: str) -> None:
    """A declared difference that does not affect the build is not blamed for a fault."""
    declared = "--overrides.1.model.num_classes=7"
    if cause == "build-rng-differs":
        declared = f"--model.factory={FAULTY}:one_more_draw_on_rank_1"
    job = run_job(*SHORT, declared, "--overrides.2.determinism.onednn=false", num_replicas=3)
    diverged(job, cause, step=0, suspects=[1])


def test_different_seeds_have_their_own_remedy() -> None:
    verdict = diverged(
        run_job(*SHORT, "--seed.model=distinct", "--agreement.expect=identical"), "declared-override", step=0
    )
    assert verdict["remedy"][0]["command"] == "--seed.model 42"


def test_nan_losses_agree_with_a_warning() -> None:
    report = agreed(run_job(*SHORT, "--optim.lr=1e38", "--optim.momentum=0.9"))
    assert any("is not finite. Replicas agree, but do not learn." in warning for warning in report["warnings"])
    (epoch,) = report["epochs"]
    assert None in (epoch["train"]["loss"][0]["value"], epoch["val"]["loss"][0]["value"])


def test_without_comparisons_only_final_state_agrees() -> None:
    report = agreed(run_job(*SHORT, "--agreement.every=0"))
    assert report["verdict"]["summary"] == "2 replicas, 5 steps: only the final state compared: bit-identical"
    assert report["steps_checked"] == 0


def test_interrupt_on_all_replicas_leaves_a_report() -> None:
    job = run_job(*SHORT, f"--model.factory={FAULTY}:interrupted")
    assert set(job.exitcodes.values()) == {1}
    assert "raised KeyboardInterrupt" in job.report["verdict"]["summary"]


def test_schedule_per_step_is_replayed() -> None:
    schedule = "--schedule={name: LinearLR, start_factor: 0.1, total_iters: 4, per: step}"
    flip = "--inject=[{replica: 1, step: 4, target: optimizer}]"
    job = run_job(*SHORT, "--optim={name: AdamW, lr: 1e-3}", schedule, flip, num_replicas=3)
    diverged(job, "transient-fault", step=4, stage="optimizer", suspects=[1])
