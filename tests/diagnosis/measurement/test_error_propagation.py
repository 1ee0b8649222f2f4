"""Measurement of a difference, operator by operator."""

import math

import pytest
import torch
from torch import nn

from dreplica.agreement.verdict.verdict import Verdict
from dreplica.diagnosis.evidence.observation import Decision
from dreplica.diagnosis.measurement import error_propagation as path
from dreplica.diagnosis.measurement.error_propagation import measure_path
from dreplica.diagnosis.tracing.op_tracer import OpRecord, OpTracer
from dreplica.diagnosis.tracing.output_sampler import OutputSampler
from dreplica.distributed.channel import Channel
from tests.diagnosis.replay.test_replay_run import indices_of, load, train, with_momentum
from tests.fixtures import SMALL
from tests.harness import run_job


def record(name: str, outputs: bytes, phase: str = "forward") -> OpRecord:
    return OpRecord(f"aten.{name}.default", "", phase, b"in", outputs, "")


def test_differing_operators_end_with_their_phase() -> None:
    one = [record(name, b"x") for name in "abcd"] + [record("e", b"x", "backward")]
    other = [record(name, b"y" if name in "bd" else b"x") for name in "abcd"] + [record("e", b"y", "backward")]
    assert path._differing(one, other, 1) == [1, 3]
    assert path._differing(one, [*other[:2], record("z", b"x"), *other[3:]], 1) == [1], "the runs differ from there on"


@pytest.mark.parametrize("count", [1, 5, 6, 7, 100])
def test_evenly_keeps_first_and_last(count: int) -> None:
    chosen = path.evenly(range(10, 10 + count), 6)
    assert len(chosen) == min(count, 6)
    assert (chosen[0], chosen[-1]) == (10, 9 + count)
    assert chosen == sorted(set(chosen))


def test_distance_is_maximum_over_results() -> None:
    one = torch.tensor([1.0, 2.0, -4.0])
    other = one.clone()
    for _ in range(3):
        other[1] = torch.nextafter(other[1], torch.tensor(math.inf))
    far = one.to(torch.bfloat16) + 1
    found = path._distance([(one, 3), (one.to(torch.bfloat16), 30)], [(other, 3), (far, 30)])
    assert found == {
        "max_ulp": path.compare_elements(one.to(torch.bfloat16), far).max_ulp,  # type: ignore[union-attr]
        "max_absolute": 1.0,
        "relative": 1.0 / 4.0,
        "num_differing": 1 + 3,
        "num_compared": 6,
        "num_elements": 33,
    }
    assert path._distance([(one, 3)], [(other, 3)])["max_ulp"] == 3
    assert path._distance([(one, 3)], [(one * math.nan, 3)])["max_ulp"] is None


def test_output_sampler_keeps_evenly_spaced_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreplica.diagnosis.tracing.output_sampler._MOST_ELEMENTS", 10)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    inputs = torch.randn(7, 3)
    with OpTracer(model=model) as tracer:
        expected = model(inputs)
    number = next(i for i, row in enumerate(tracer.records) if "relu" in row.name)
    with OutputSampler(None, [number], model) as sampler:
        model(inputs)
    assert not sampler.records
    ((sample, count),) = sampler.samples[number]
    assert count == 35
    assert sample.numpy().tobytes() == expected.flatten()[::4].detach().numpy().tobytes()


def test_path_compares_replica_with_itself() -> None:
    job = run_job("--config=configs/cases/racy_sum.yaml")
    verdict, found = job.report["verdict"], job.report["divergence"]["path"]
    assert verdict["cause"] == "nondeterministic-operator", job.output
    one, other = found["replicas"]
    assert one == other
    assert found["operators"][0]["operator"] == verdict["operator"] == "cases.racy_sum.default"
    assert max(row["max_ulp"] for row in found["operators"]) > 0


def test_path_is_empty_without_operator() -> None:
    replayer = train(with_momentum).replayer(load)
    assert measure_path(Decision("transient-fault", [0], []), [[]], [], replayer, indices_of(3), Channel()) == {}


def test_path_leads_from_operator_to_loss() -> None:
    job = run_job(*SMALL, "--overrides.1.determinism.onednn=false")
    verdict, found = job.report["verdict"], job.report["divergence"]
    operators = found["path"]["operators"]
    assert found["path"]["replicas"] == [0, 1], job.output
    assert operators[0]["operator"] == verdict["operator"] == "aten.convolution.default"
    assert operators[-2]["operator"] == "aten.nll_loss_forward.default"
    assert {row["phase"] for row in operators} == {"forward"}
    assert all(row["num_differing"] > 0 and row["max_ulp"] > 0 for row in operators)
    (line,) = [line for line in verdict["evidence"] if line["code"] == "output-differs"]
    assert (line["data"]["output"], line["data"]["max_ulp"]) == (0, operators[0]["max_ulp"])
    counts = f"{operators[0]['num_differing']} of {operators[0]['num_elements']} elements differ"
    assert f"{counts}, at most {operators[0]['max_ulp']} ULP apart" in line["text"]
    assert found["stage_groups"]["batch"] == [[0, 1]]
    assert found["stage_groups"]["buffers"] == [[0], [1]]


def test_verdict_has_no_path_fields() -> None:
    assert not {"path", "stage_groups"} & set(Verdict(False, "none", "").as_dict())
