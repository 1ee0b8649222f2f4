"""The layers of tests."""

import subprocess

import pytest

from tests.harness import run_job, run_replicas
from tests.layers import layer_of


def body(_world: object) -> None:
    pass


def in_a_helper() -> None:
    subprocess.run(["true"], check=True)


class Helper:
    def start(self) -> None:
        run_job()


@pytest.fixture
def job_folder() -> str:
    return str(run_job())


def plain() -> None:
    assert 1 + 1 == 2


def on_replicas() -> None:
    run_replicas(body, 2)


def on_a_process() -> None:
    in_a_helper()


def in_a_closure() -> None:
    def start() -> None:
        run_job()

    start()


def of_a_class() -> None:
    Helper().start()


@pytest.mark.parametrize(
    ("functions", "layer"),
    [
        ([plain], "unit"),
        ([on_replicas], "process"),
        ([on_a_process], "process"),
        ([in_a_closure], "job"),
        ([of_a_class], "job"),
        ([plain, job_folder], "job"),
        ([plain, on_a_process], "process"),
    ],
)
def test_layer_follows_what_is_called(functions: list[object], layer: str) -> None:
    assert layer_of(functions) == layer  # type: ignore[arg-type]
