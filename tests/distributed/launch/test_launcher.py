"""The launcher's own output."""

import socket
from pathlib import Path

import pytest

from dreplica.commands.main import main
from dreplica.distributed.launch.background import run_in_background
from dreplica.distributed.launch.launcher import Nodes
from dreplica.distributed.rendezvous import store
from dreplica.errors import ExitCode
from tests.harness import free_port


def test_launcher_names_a_killed_worker(tmp_path: Path) -> None:
    ended = run_in_background("tests.launch.dying", [], 1, tmp_path / "log", timeout=60)
    assert (ended.code, ended.output) == (ExitCode.FAILED, "replica 0 was terminated by SIGKILL\n")


def start(node_rank: int, head: str, *settings: str) -> int:
    return main(["train", "--nodes=3", f"--node-rank={node_rank}", f"--head={head}", *settings])


def test_launcher_names_missing_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert start(0, f"localhost:{free_port()}", "--world.timeout=0.5") == ExitCode.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: nodes 1, 2 (of 3) did not arrive within 0.5 s (world.timeout). See their output.")


def test_launcher_names_the_head_if_it_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    head = f"localhost:{free_port()}"
    assert start(1, head, "--world.timeout=0.5") == ExitCode.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: node 0 did not arrive at {head} within 0.5 s (world.timeout): Connection refused.")


def test_launcher_refuses_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        assert start(0, f"localhost:{port}") == ExitCode.UNUSABLE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --head: port {port} is in use on this host. Choose another port")


@pytest.mark.parametrize("node_rank", [0, 1])
def test_launcher_refuses_an_unknown_host(
    node_rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "_RESOLVE_SECONDS", 0.0)
    assert start(node_rank, f"no-such-host.invalid:{free_port()}") == ExitCode.UNUSABLE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --head: unknown host 'no-such-host.invalid' (")


@pytest.mark.parametrize(
    ("head", "host", "port"), [("node0:29500", "node0", 29500), ("[::1]:80", "::1", 80), ("10.0.0.1:1", "10.0.0.1", 1)]
)
def test_nodes_endpoint_splits_the_head(head: str, host: str, port: int) -> None:
    endpoint = Nodes(2, 0, head).endpoint
    assert (endpoint.host, endpoint.port, str(endpoint)) == (host, port, head)
