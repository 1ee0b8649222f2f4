"""The main job, started by torchrun."""

from tests.fixtures import SMALL
from tests.harness import run_job, torchrun


def test_main_job_agrees_and_writes_the_run_folder() -> None:
    job = torchrun(*SMALL)
    assert job.returncode == 0, job.output
    report = job.report
    assert report["verdict"]["agreed"] is True
    assert report["verdict"]["cause"] == "none"
    assert report["steps_checked"] == 10
    assert report["schema"] == 2
    for epoch in report["epochs"]:
        for part in (epoch["train"], epoch["val"]):
            for metric in ("accuracy", "loss"):
                (group,) = part[metric]
                assert group["replicas"] == [0, 1]
    coverage = report["coverage"]
    assert (coverage["steps_compared"], coverage["ranks"], coverage["not_compared"]) == (10, 2, [])
    one, two = report["fingerprints"]
    assert one["weights"] == two["weights"]
    names = {path.name for path in job.folder.iterdir()}
    assert names >= {"config.yaml", "manifest.json", "metrics.jsonl", "trace.jsonl", "report.json"}
    assert [line["step"] for line in job.trace_rows if "weights" in line["digests"]] == list(range(11))


def test_one_replica_is_recorded_not_agreed() -> None:
    job = run_job(*SMALL, num_replicas=1)
    assert job.returncode == 0, job.output
    assert "RECORDED 1 replica, 10 steps" in job.stdout
    assert "AGREED" not in job.stdout
    coverage = job.report["coverage"]
    assert (coverage["steps_compared"], coverage["stages"]) == (0, [])
    assert [item["code"] for item in coverage["not_compared"]] == ["one-replica"]
