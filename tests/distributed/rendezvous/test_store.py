"""The store of a rendezvous: ports in use, unknown hosts, servers that are not there."""

import socket
import threading

import pytest
import torch.distributed as dist

from dreplica.distributed.rendezvous import store as module
from dreplica.distributed.rendezvous.store import Endpoint, NotArrived, open_store
from dreplica.distributed.rendezvous.wait import Wait
from dreplica.errors import UsageError
from tests.harness import free_port


def test_open_store_serves_and_connects(capfd: pytest.CaptureFixture[str]) -> None:
    endpoint = Endpoint("localhost", free_port())
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(open_store(endpoint, False, Wait(20)).get("key")))
    reader.start()  # before the server: it tries again in silence
    reader.join(0.5)
    served = open_store(endpoint, True, Wait(20))
    served.set("key", "value")
    reader.join(20)
    assert found == [b"value"]
    assert capfd.readouterr().err == ""


def test_open_store_serves_torchrun_too() -> None:
    endpoint = Endpoint("localhost", free_port())
    served = open_store(endpoint, True, Wait(20))
    served.set("key", "value")
    assert dist.TCPStore("localhost", endpoint.port, 1, True, multi_tenant=True).get("key") == b"value"


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
def test_open_store_refuses_a_port_in_use(host: str) -> None:
    with socket.create_server((host, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError) as caught:
            open_store(Endpoint("localhost", port), True, Wait(20))
    assert caught.value.code == "port-in-use"
    assert str(caught.value) == (
        f"MASTER_PORT: port {port} is in use on this host. Choose another port, or end the process that uses it."
    )


def test_open_store_refuses_a_port_that_is_not_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> socket.socket:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    with pytest.raises(UsageError, match=r"^--head: cannot listen on port 80 \(Permission denied\)\. Choose "):
        open_store(Endpoint("localhost", 80, "node", "--head", "--head"), True, Wait(20))


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 100, "host name", "999.1.1.1"])
@pytest.mark.parametrize("serves", [True, False])
def test_open_store_refuses_an_unknown_host(host: str, serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RESOLVE_SECONDS", 0.0)
    with pytest.raises(UsageError) as caught:
        open_store(Endpoint(host, free_port()), serves, Wait(20))
    assert caught.value.code == "unknown-host"
    assert str(caught.value).startswith(f"MASTER_ADDR: unknown host {host!r} (")
    assert "Set it to an address of rank 0's host that every rank reaches." in str(caught.value)


def test_open_store_names_rank_0_if_it_is_missing() -> None:
    endpoint = Endpoint("localhost", free_port())
    with pytest.raises(NotArrived) as caught:
        open_store(endpoint, False, Wait(0.3))
    assert caught.value.ranks == [0]
    assert str(caught.value).startswith(
        f"rank 0 did not arrive at {endpoint} within 0.3 s (world.timeout): Connection re"
    )


def test_endpoint_text_has_brackets_for_ipv6() -> None:
    assert str(Endpoint("::1", 29500)) == "[::1]:29500"
    assert str(Endpoint("node0", 29500)) == "node0:29500"
