"""The store at which processes rendezvous: served by rank 0, or by torchrun, and found by the others.

torch's own client would print a line for each attempt to connect, and name neither a port in use nor an unknown host.
"""

import errno
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dreplica.config.messages import config_error
from dreplica.distributed.rendezvous.wait import Wait
from dreplica.errors import DreplicaError, UsageError

_RESOLVE_SECONDS = 10.0
"""Seconds for which an unknown host name is looked up again: name servers learn of new pods with a delay."""
_CONNECT_SECONDS = 5.0
_REQUEST_SECONDS = 30.0
"""Shortest timeout of a request to the store, which a busy host may delay."""
_NAPS = (0.05, 1.0)


class NotArrived(DreplicaError):
    """Processes did not take part in a rendezvous. The field `ranks` has their ranks.

    Args:
        text: The message for people.
        ranks: Ranks of the processes.
        reports: True in the process that reports it, or in each one where they cannot reach each other.
        **fields: Further data that the text is made from.
    """

    default_code = "not-arrived"

    def __init__(self, text: str, *, ranks: list[int], reports: bool = True, **fields: Any) -> None:
        super().__init__(text, ranks=ranks, **fields)
        self.ranks = ranks
        self.reports = reports


@dataclass(frozen=True)
class Endpoint:
    """Where processes rendezvous: the address of the first one."""

    host: str
    """Host name or address."""
    port: int
    """Port."""
    unit: str = "rank"
    """What rendezvous there, for messages: `rank` or `node`."""
    host_key: str = "MASTER_ADDR"
    """Variable or option that has the host, for messages."""
    port_key: str = "MASTER_PORT"
    """Variable or option that has the port, for messages."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def open_store(endpoint: Endpoint, serves: bool, wait: Wait) -> dist.Store:
    """Connect to the store, and serve it in one of the processes.

    Args:
        endpoint: Address of the process that serves the store.
        serves: Whether this process does.
        wait: The wait for that process.

    Raises:
        UsageError: The host is unknown, or its port cannot be listened on.
        NotArrived: The process that serves the store did not arrive in time.
    """
    wait.start(f"{endpoint.unit} 0 at {endpoint}")
    _resolve(endpoint, wait)
    request_timeout = timedelta(seconds=max(wait.timeout, _REQUEST_SECONDS))
    if serves:
        listening = _listen(endpoint)
        return dist.TCPStore(
            "localhost",
            endpoint.port,
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,  # torchrun's static rendezvous uses the same server
            timeout=request_timeout,
            master_listen_fd=listening.detach(),
        )
    _reach(endpoint, wait)
    try:
        return dist.TCPStore(endpoint.host, endpoint.port, is_master=False, timeout=request_timeout)
    except RuntimeError as error:
        raise _absent(endpoint, wait, str(error).partition("\n")[0]) from error


def _resolve(endpoint: Endpoint, wait: Wait) -> None:
    """Look the host name up.

    Raises:
        UsageError: It is unknown.
    """
    end = time.monotonic() + min(_RESOLVE_SECONDS, wait.timeout)
    while True:
        try:
            socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > end or isinstance(error, UnicodeError):
                fix = f"Set it to an address of {endpoint.unit} 0's host that every {endpoint.unit} reaches."
                problem = f"unknown host {endpoint.host!r} ({_reason(error)})"
                raise config_error("unknown-host", endpoint.host_key, problem, fix, value=endpoint.host) from None
            wait.who = f"{endpoint.unit} 0 at {endpoint} ({_reason(error)})"
        time.sleep(_NAPS[1])


def _listen(endpoint: Endpoint) -> socket.socket:
    """Return a socket that listens on the port, on all addresses of this host.

    Raises:
        UsageError: The port is in use, or this user may not listen on it.
    """
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("", endpoint.port), family=socket.AF_INET6, dualstack_ipv6=True)
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
        return socket.create_server(("", endpoint.port))
    except OSError as error:
        raise _cannot_listen(endpoint, error) from None


def _cannot_listen(endpoint: Endpoint, error: OSError) -> UsageError:
    in_use = error.errno == errno.EADDRINUSE
    problem = f"port {endpoint.port} is in use on this host" if in_use else f"cannot listen on port {endpoint.port}"
    fix = "Choose another port, or end the process that uses it." if in_use else "Choose another port, such as 29500."
    detail = "" if in_use else f" ({_reason(error)})"
    code = "port-in-use" if in_use else "cannot-listen"
    return config_error(code, endpoint.port_key, problem + detail, fix, value=endpoint.port)


def _reach(endpoint: Endpoint, wait: Wait) -> None:
    """Wait until a process listens at the endpoint.

    Raises:
        NotArrived: None does in time.
    """
    nap, longest = _NAPS
    while True:
        try:
            timeout = min(_CONNECT_SECONDS, max(wait.seconds_left, nap))
            socket.create_connection((endpoint.host, endpoint.port), timeout).close()
            return
        except OSError as error:
            wait.who = f"{endpoint.unit} 0 at {endpoint} ({_reason(error)})"
            if wait.is_over:
                raise _absent(endpoint, wait, _reason(error)) from None
        time.sleep(min(nap, wait.seconds_left))
        nap = min(2 * nap, longest)


def _absent(endpoint: Endpoint, wait: Wait, reason: str) -> NotArrived:
    text = (
        f"{endpoint.unit} 0 did not arrive at {endpoint} within {wait.timeout:g} s (world.timeout): {reason}. "
        f"See its output, and check that {endpoint.host_key} is the address of its host."
    )
    return NotArrived(text, ranks=[0], seconds=wait.timeout, endpoint=str(endpoint), reason=reason)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer"
    return str((isinstance(error, OSError) and error.strerror) or error or type(error).__name__)
