"""Whole jobs that look like one cause and have another, or none that the evidence could tell."""

from typing import Any

import pytest

from tests.fixtures import SMALL
from tests.harness import Job, run_job
from tests.messages import data_of, texts

SHORT = (*SMALL, "--train.epochs=1")
FLIPPED_WEIGHT = "--inject=[{replica: 1, step: 3, target: weights}]"


def run(kind: str, name: str, *arguments: str, num_replicas: int = 3) -> Job:
    return run_job(
        *SHORT, f"--{kind}=tests.diagnosis.decision.lookalikes:{name}", *arguments, num_replicas=num_replicas
    )


def verdict_of(job: Job) -> dict[str, Any]:
    verdict = job.report["verdict"]
    assert verdict["cause"] != "replica-lost", job.output
    return verdict


# ---- nothing is wrong


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("model.factory", "own_torch_generator"),
        ("model.factory", "stochastic_depth"),
        ("model.factory", "global_python_and_numpy"),
        ("model.factory", "all_nan"),
        ("model.factory", "reseeded_alike"),
        ("model.factory", "newer_flags_everywhere"),
        ("replica.factory", "numpy_hook_on_all"),
        ("data.name", "flipped_at_random"),
        ("data.name", "noise_of_its_own"),
    ],
)
def test_what_is_unusual_but_the_same_everywhere_agrees(kind: str, name: str) -> None:
    verdict = verdict_of(run(kind, name, num_replicas=2))
    assert (verdict["cause"], verdict["agreed"]) == ("none", True)


def test_a_warm_up_from_zero_is_not_a_failure_to_learn() -> None:
    job = run("replica.factory", "warm_up_from_zero", "--train.epochs=2", num_replicas=2)
    assert verdict_of(job)["cause"] == "none"


# ---- a transient fault, in unusual models and data


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("model.factory", "global_python_and_numpy"),
        ("model.factory", "own_torch_generator"),
        ("model.factory", "stochastic_depth"),
        ("model.factory", "data_dependent_branch"),
        ("model.factory", "all_nan"),
        ("model.factory", "newer_flags_everywhere"),
        ("replica.factory", "numpy_hook_on_all"),
        ("data.name", "flipped_at_random"),
    ],
)
def test_flipped_weight_is_a_transient_fault(kind: str, name: str) -> None:
    verdict = verdict_of(run(kind, name, FLIPPED_WEIGHT))
    assert (verdict["cause"], verdict["suspects"], verdict["step"]) == ("transient-fault", [1], 3)
    assert verdict["stage"] == "weights"


def test_transient_fault_is_not_blamed_on_override() -> None:
    """The override enables oneDNN, which is enabled on all replicas."""
    verdict = verdict_of(run_job(*SHORT, "--overrides.1.determinism.onednn=true", FLIPPED_WEIGHT, num_replicas=3))
    assert (verdict["cause"], verdict["suspects"]) == ("transient-fault", [1])


def test_fault_without_reproducible_replay_is_unexplained() -> None:
    """The data set's private generator has advanced: samples differ each time, on all replicas."""
    verdict = verdict_of(run("data.name", "noise_of_its_own", FLIPPED_WEIGHT))
    assert (verdict["cause"], verdict["step"], verdict["stage"]) == ("unexplained", 3, "weights")
    assert verdict["groups"] == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("faults", "num_replicas", "suspects", "groups"),
    [
        ("{replica: 1, step: 3, target: weights}, {replica: 2, step: 3, target: gradients}", 3, [1, 2], [[0, 1], [2]]),
        ("{replica: 2, step: 3, target: weights}, {replica: 3, step: 3, target: weights}", 4, [2, 3], None),
    ],
)
def test_faults_on_half_of_the_replicas_are_unexplained(
    faults: str, num_replicas: int, suspects: list[int], groups: list[list[int]] | None
) -> None:
    verdict = verdict_of(run_job(*SHORT, f"--inject=[{faults}]", num_replicas=num_replicas))
    assert (verdict["cause"], verdict["suspects"]) == ("unexplained", suspects)
    assert groups is None or verdict["groups"] == groups


def test_a_number_drawn_once_is_no_fault_of_the_hardware() -> None:
    assert verdict_of(run("model.factory", "one_more_draw_once"))["cause"] != "transient-fault"


# ---- code that depends on the rank is no fault of the hardware


OF_CODE = {"unexplained", "environment-differs", "structure-differs", "generators-differ", "host-value-differs"}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(
            "model.factory",
            "plain_attribute",
        ),
        pytest.param(
            "model.factory",
            "flag_in_forward",
        ),
        pytest.param(
            "model.factory",
            "channels_last_on_replica_1",
        ),
        pytest.param(
            "replica.factory",
            "numpy_hook_on_replica_1",
        ),
        ("replica.factory", "numpy_hook_by_rank"),
        ("replica.factory", "numpy_bias_on_replica_1"),
        ("replica.factory", "numpy_bias_on_all_but_1"),
        ("replica.factory", "numpy_temperature_on_replica_1"),
        ("model.factory", "one_pixel_on_replica_1"),
        ("model.factory", "other_shape_on_replica_1"),
        ("model.factory", "other_dtype_on_replica_1"),
        pytest.param(
            "model.factory",
            "forked_generator",
        ),
        ("data.name", "draws_in_vain"),
    ],
)
def test_code_that_depends_on_the_rank_is_not_a_fault(kind: str, name: str) -> None:
    verdict = verdict_of(run(kind, name))
    assert verdict["agreed"] is False
    assert verdict["cause"] in OF_CODE


def test_fp32_precision_flag_of_one_replica_is_environment() -> None:
    verdict = verdict_of(run("model.factory", "bf16_convolutions_on_replica_1"))
    if verdict["agreed"]:  # a processor that has no such convolutions
        return
    assert (verdict["cause"], verdict["suspects"]) == ("environment-differs", [1])
    assert any("onednn_conv_fp32_precision" in line for line in texts(verdict["evidence"]))


def test_flag_changed_by_forward_is_reported_if_unproven() -> None:
    """A flag changed by a forward pass is reported where it cannot be proved to be the cause."""
    verdict = verdict_of(run("model.factory", "flag_in_fourth_forward"))
    if verdict["agreed"]:  # a processor on which oneDNN rounds as the other kernels do
        return
    assert (verdict["cause"], verdict["suspects"], verdict["step"]) == ("unexplained", [1], 4)
    assert data_of(verdict["evidence"], "later-difference")["field"] == "numerics.onednn"


def test_sign_of_zero_in_build_is_not_blamed_on_the_seed() -> None:
    verdict = verdict_of(run("model.factory", "negative_zero_on_replica_1"))
    assert (verdict["cause"], verdict["step"], verdict["tensor"]) == ("unexplained", 0, "1.bias")
    assert verdict["suspects"] == [1]


def test_extra_draw_is_not_blamed_on_equal_seeding() -> None:
    assert verdict_of(run("model.factory", "reseeded_alike_then_one_more_draw"))["cause"] == "build-rng-differs"


# ---- operators, data and settings


def test_racy_backward_operator_is_named_in_backward() -> None:
    verdict = verdict_of(run("model.factory", "racy_backward_model"))
    assert (verdict["cause"], verdict["phase"]) == ("nondeterministic-operator", "backward")
    assert verdict["operator"] == "tests_diagnosis.racy_backward.default"
    assert verdict["stage"] == "gradients"


def test_branch_on_corrupted_data_is_not_structure_differs() -> None:
    fault = "--inject=[{replica: 2, step: 3, target: activation, tensor: body.5, bits: 8, repeat: true}]"
    verdict = verdict_of(run("model.factory", "data_dependent_branch", fault))
    assert (verdict["cause"], verdict["suspects"], verdict["step"]) == ("persistent-fault", [2], 3)


@pytest.mark.parametrize("name", ["by_process", "by_chance"])
def test_samples_by_process_or_chance_are_batch_differs(name: str) -> None:
    verdict = verdict_of(run("data.name", name))
    assert (verdict["cause"], verdict["step"], verdict["stage"]) == ("batch-differs", 1, "batch")


def test_two_of_four_that_declare_a_difference_are_both_named() -> None:
    arguments = ("--overrides.2.determinism.onednn=false", "--overrides.3.determinism.onednn=false")
    verdict = verdict_of(run_job(*SHORT, *arguments, num_replicas=4))
    assert (verdict["cause"], verdict["suspects"]) == ("declared-override", [2, 3])


def test_verdict_is_first_of_override_and_fault() -> None:
    """Of a declared difference and a fault, the first is the verdict and the other is evidence."""
    fault = "--inject=[{replica: 2, step: 1, target: weights, repeat: true}]"
    verdict = verdict_of(run_job(*SHORT, "--overrides.1.determinism.onednn=false", fault, num_replicas=3))
    if verdict["stage"] == "weights":  # on a processor on which oneDNN rounds as the other kernels do
        assert (verdict["cause"], verdict["suspects"]) == ("persistent-fault", [2])
        return
    assert (verdict["cause"], verdict["suspects"]) == ("declared-override", [1])
    assert data_of(verdict["evidence"], "later-groups-split")["stage"] == "weights"


KERNELS = {"kernel-differs"}
CAUSES_WITHOUT_TENSORS = {"unexplained"}
"""A forward pass has spread the flipped bits, and code that ran once would spread its own in the same way."""
SLOWER = "--overrides.1.optim.lr=0.2"


@pytest.mark.parametrize("replica", [1, 2])
@pytest.mark.parametrize(("repeat", "causes"), [(False, CAUSES_WITHOUT_TENSORS), (True, {"persistent-fault"})])
def test_forward_fault_is_not_blamed_on_learning_rate(replica: int, repeat: bool, causes: set[str]) -> None:
    fault = f"--inject=[{{replica: {replica}, step: 1, target: activation, tensor: '0', bits: 8, repeat: {repeat}}}]"
    verdict = verdict_of(run_job(*SHORT, SLOWER, fault.lower(), num_replicas=3))
    assert verdict["suspects"] == [replica]
    assert verdict["cause"] in causes


def broken(*replicas: int, operator: str = "aten.relu.default") -> str:
    """Return faults of an arithmetic unit that computes one element of an operator's result wrongly, each time."""
    fault = f"step: 1, target: operator, tensor: {operator}, element: 7, scale: 1.5, repeat: true"
    return f"--inject=[{', '.join(f'{{replica: {replica}, {fault}}}' for replica in replicas)}]"


def test_faulty_processor_is_not_blamed_on_learning_rate() -> None:
    verdict = verdict_of(run_job(*SHORT, SLOWER, broken(1, operator="aten.addmm.default"), num_replicas=3))
    assert (verdict["cause"], verdict["suspects"]) == ("persistent-fault", [1])
    assert verdict["operator"] == "aten.addmm.default"
    assert verdict["remedy"][0]["code"] == "excluded-always"


@pytest.mark.parametrize("replica", [0, 1])
def test_exact_operator_identifies_faulty_replica_of_two(replica: int) -> None:
    """Between two replicas, an operator that does not round identifies the faulty one."""
    verdict = verdict_of(run_job(*SHORT, broken(replica), num_replicas=2))
    assert (verdict["cause"], verdict["suspects"]) == ("persistent-fault", [replica])


def test_suspects_are_two_of_three_with_the_same_wrong_result() -> None:
    verdict = verdict_of(run_job(*SHORT, broken(0, 1, operator="aten.addmm.default"), num_replicas=3))
    assert (verdict["cause"], verdict["suspects"]) == ("persistent-fault", [0, 1])
    assert verdict["groups"] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("name", "num_replicas"),
    [
        ("wrong_relu_on_replica_0", 2),
        ("wrong_relu_on_replica_1", 3),
        ("wrong_addmm_on_replica_0_and_1", 3),
        ("relu_wrong_in_any_precision_on_replica_0", 2),
        ("relu_wrong_in_any_precision_on_replica_0_and_1", 3),
        ("hardtanh_wrong_in_any_precision_on_replica_0", 3),
    ],
)
def test_kernel_of_one_replica_is_not_a_fault(name: str, num_replicas: int) -> None:
    """A kernel that is registered on some replicas computes wrongly each time, as a broken processor does."""
    verdict = verdict_of(run("model.factory", name, num_replicas=num_replicas))
    assert verdict["cause"] in KERNELS
    assert verdict["operator"] in {"aten.relu.default", "aten.addmm.default", "aten.hardtanh.default"}


def test_an_override_that_changes_nothing_explains_nothing() -> None:
    """The weights are corrupted at step 3, which is not compared: step 5 starts from different weights."""
    fault = "--inject=[{replica: 1, step: 3, target: weights, bits: 8, repeat: true}]"
    arguments = ("--agreement.every=5", "--overrides.1.determinism.onednn=true", fault)
    verdict = verdict_of(run_job(*SHORT, *arguments, num_replicas=3))
    assert (verdict["cause"], verdict["suspects"]) == ("unexplained", [1])


def test_fault_between_two_comparisons_is_unexplained() -> None:
    """The flipped bits have spread over the weights by the next comparison."""
    verdict = verdict_of(run_job(*SHORT, "--agreement.every=5", FLIPPED_WEIGHT, num_replicas=3))
    assert (verdict["cause"], verdict["suspects"], verdict["step"]) == ("unexplained", [1], 5)
