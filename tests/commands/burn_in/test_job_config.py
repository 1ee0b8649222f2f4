"""The config of a pass, and jobs that are rejected."""

from pathlib import Path

import pytest

from dreplica.commands.burn_in.job_config import check_job, job_of, pass_of, pass_seeds
from dreplica.config.load import load_config
from dreplica.config.schema import RunConfig, SeedConfig
from dreplica.errors import UsageError
from tests.fixtures import SMALL, merged


def config(*arguments: str) -> RunConfig:
    return load_config(merged(*SMALL, *arguments), num_replicas=2)


def test_job_compares_all_and_saves_nothing() -> None:
    given = config("--agreement.every=10", "--agreement.on_divergence=continue", "--run.stop_after=3", "--optim.lr=0.5")
    job = job_of(given)
    assert (job.agreement.every, job.agreement.expect, job.agreement.on_divergence) == (1, "identical", "stop")
    assert (job.checkpoint.every_epochs, job.checkpoint.every_steps, job.run.stop_after) == (None, None, None)
    changed = {name for name in RunConfig.model_fields if getattr(job, name) != getattr(given, name)}
    assert changed == {"agreement", "checkpoint", "run"}


def test_pass_config_can_be_loaded(tmp_path: Path) -> None:
    job = job_of(config("--overrides={1: {optim: {lr: 0.5}}}", "--data.augment=tests.fixtures:as_it_is"))
    (tmp_path / "config.yaml").write_text(job.to_yaml())
    third = pass_of(job, 3, tmp_path)
    seeds = [f"--seed.{key}={value}" for key, value in third.seed.model_dump().items()]
    read = load_config([f"--config={tmp_path / 'config.yaml'}", *seeds], num_replicas=2)
    assert read.model_copy(update={"run": third.run}) == third
    assert third.run.name == "pass_000003"


def test_passes_have_distinct_seeds() -> None:
    seeds = [pass_seeds(SeedConfig(model=7, data=1), number) for number in range(1, 200)]
    for key in ("model", "data", "augment"):
        assert len({row[key] for row in seeds}) == len(seeds)
    assert pass_seeds(SeedConfig(model=7, data=1), 5) == seeds[4]
    for other in (SeedConfig(model=8, data=1), SeedConfig(model=7, data=2), SeedConfig(model=7, data=1, augment=1)):
        assert set(pass_seeds(other, 5).values()).isdisjoint(seeds[4].values())
    assert all(SeedConfig(**row) for row in seeds)  # within what a seed may be


@pytest.mark.parametrize(
    ("arguments", "num_replicas", "words"),
    [
        ((), 1, "--replicas: 1 .* 2 or, to single out one device, 3"),
        (("--seed.model=distinct",), 2, "seed.model: distinct .*--seed.model 42"),
        (("--seed.model=null",), 2, "seed.model: null .*--seed.model 42"),
        (("--seed.model=[1, 1]",), 2, r"seed.model: \[1, 1\] .*--seed.model 42"),
        (("--seed.data=null",), 2, "seed.data: null .*--seed.data 0"),
        (("--determinism.mode=off",), 2, "determinism.mode: off .*--determinism.mode strict"),
        (("--determinism.mode=warn",), 2, "determinism.mode: warn .*--determinism.mode strict"),
        (("--determinism.cudnn_benchmark=true",), 2, "cudnn_benchmark: true .*cudnn_benchmark false"),
        (("--determinism.cudnn_deterministic=false",), 2, "cudnn_deterministic: false .*cudnn_deterministic true"),
    ],
)
def test_check_job_rejects_unsuitable_jobs(arguments: tuple[str, ...], num_replicas: int, words: str) -> None:
    given = config(*arguments)
    with pytest.raises(UsageError, match=words):
        check_job(given, given, num_replicas)


def test_check_job_checks_overrides() -> None:
    given = config("--overrides.1.determinism.mode=off")
    check_job(given, given.for_replica(0), 2)
    with pytest.raises(UsageError, match=r"determinism\.mode: off"):
        check_job(given, given.for_replica(1), 2)
