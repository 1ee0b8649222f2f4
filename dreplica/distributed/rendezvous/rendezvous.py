"""Rendezvous of the replicas, in a store that may hold keys of earlier starts.

Each rank adds itself to one list in the store. Rank 0 reads it, names who is missing, and publishes one answer, which
all others wait for: a complete list, or the error. A rank needs the same few requests however many ranks there are.
"""

import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from dreplica.distributed.failure import Failure
from dreplica.distributed.rank_names import name_ranks
from dreplica.distributed.rendezvous.store import Endpoint, NotArrived, open_store
from dreplica.distributed.rendezvous.wait import Wait, WaitTimeout
from dreplica.errors import DreplicaError, SharedUsageError

_FIRST_NAP = 0.01
"""Seconds until the second look at the store. Each next pause is twice as long, up to `_longest_nap`."""
_QUIET_SECONDS = 40.0
"""Seconds until ranks other than 0 report that they wait for its answer: rank 0 itself reports whom it waits for."""
_ANSWER_SECONDS = 5.0
"""Seconds that other ranks wait longer than rank 0, which tells them who is missing."""
_READERS_SECONDS = 5.0
_START = "dreplica/start"


@dataclass(frozen=True)
class _Entry:
    """A process that has arrived."""

    rank: int
    size: int
    token: str
    place: str


def rendezvous(endpoint: Endpoint, rank: int, size: int, timeout: float, serves: bool) -> dist.Store:
    """Connect to the store and wait until all processes have arrived.

    Args:
        endpoint: Address of the store.
        rank: Rank of this process.
        size: Number of processes.
        timeout: Longest wait for the others, in seconds.
        serves: Whether this process serves the store.

    Returns:
        A prefix of the store that no earlier start has written to. It keeps the store's server alive.

    Raises:
        UsageError: The address cannot be used, or the processes do not belong together (`SharedUsageError`).
        NotArrived: Processes did not arrive in time.

    Note:
        Collective: call on every rank.
    """
    wait = Wait(timeout)

    def join() -> dist.Store:
        # Apart for nodes: torchrun lets the ranks rendezvous in the store of its nodes.
        store = dist.PrefixStore(f"{endpoint.unit}s", open_store(endpoint, serves, wait))
        return store_for_this_start(store, rank, size, wait, endpoint.unit, serves)

    try:
        return wait.run(join)
    except WaitTimeout:
        text = f"{endpoint.unit} 0 at {endpoint} does not respond within {timeout:g} s (world.timeout)"
        raise NotArrived(text, ranks=[0], seconds=timeout, endpoint=str(endpoint)) from None


def store_for_this_start(
    store: dist.Store, rank: int, size: int, wait: Wait, unit: str = "rank", serves: bool = False
) -> dist.Store:
    """Return a prefix of the store that no earlier start of this job has written to, once all have arrived.

    torchrun keeps its store over restarts. Rank 0 draws a random prefix and publishes it. A replica that reads the
    prefix of an earlier start is not in that start's answer, and reads again. torchrun's restart count cannot serve as
    the prefix: it may differ between nodes.

    Args:
        store: The store that all processes share.
        rank: Rank of this process.
        size: Number of processes.
        wait: The wait for the others.
        unit: What rendezvous, for messages: `rank` or `node`.
        serves: Whether this process serves the store, so that the others must have read an error before it ends.

    Raises:
        SharedUsageError: Two processes have the same rank, or another number of processes.
        NotArrived: Not all processes arrived in time.

    Note:
        Collective: call on every rank.
    """
    try:
        prefix = _lead(store, size, wait, unit, serves) if rank == 0 else _follow(store, rank, size, wait, unit)
    except dist.DistError as error:  # of the store: the process that serves it has ended
        line = str(error).partition("\n")[0]
        text = f"{unit} 0 has ended, while {unit} {rank} waited for {wait.who} ({line}). See its output."
        raise NotArrived(text, ranks=[0], reason=line) from error
    return dist.PrefixStore(prefix, store)


def _longest_nap(size: int) -> float:
    """Return the longest pause between two looks at the store, so that a thousand ranks do not keep it busy."""
    return min(0.5, 0.05 + 0.0005 * size)


# ---- Rank 0


def _lead(store: dist.Store, size: int, wait: Wait, unit: str, serves: bool) -> str:
    """Return a new prefix once all others have arrived, and publish who has."""
    own = uuid.uuid4().hex
    prefix = f"dreplica/{own}"
    entries: list[_Entry] = []
    store.set(f"{prefix}/roll", "")
    store.set(_START, own)
    wait.start("")
    nap, longest_nap = _FIRST_NAP, _longest_nap(size)
    try:
        while True:
            entries = _read(store.get(f"{prefix}/roll"))
            _check(entries, size, unit)
            missing = sorted(set(range(1, size)) - {entry.rank for entry in entries})
            if not missing:
                break
            wait.who = f"{name_ranks(missing, unit)} ({len(missing)} of {size})"
            if wait.is_over:
                raise _missing(missing, size, wait, unit)
            time.sleep(nap)
            nap = min(2 * nap, longest_nap)
    except DreplicaError as error:
        row = {"failure": Failure.from_exception(error).as_dict(), "arrived": [entry.token for entry in entries]}
        store.set(f"{prefix}/answer", json.dumps(row))
        if serves:
            _wait_for_readers(store, prefix, len(entries))
        raise
    store.set(f"{prefix}/answer", json.dumps({"tokens": {entry.rank: entry.token for entry in entries}}))
    return prefix


def _read(roll: bytes) -> list[_Entry]:
    """Return the processes that have arrived."""
    rows = (line.split(" ", 3) for line in roll.decode(errors="replace").splitlines())
    return [_Entry(int(row[0]), int(row[1]), row[2], row[3]) for row in rows]


def _check(entries: list[_Entry], size: int, unit: str) -> None:
    """Raise `SharedUsageError` if the processes that have arrived do not belong together."""
    seen: dict[int, _Entry] = {}
    number = "WORLD_SIZE" if unit == "rank" else "--nodes"
    name = "RANK" if unit == "rank" else "--node-rank"
    for entry in entries:
        if entry.size != size:
            text = (
                f"{number} is {size} on {unit} 0 and {entry.size} on {unit} {entry.rank} ({entry.place}). "
                "Set it to the same number everywhere."
            )
            raise SharedUsageError(text, code="sizes-differ", rank=entry.rank, sizes=[size, entry.size])
        if entry.rank in seen:
            places = [seen[entry.rank].place, entry.place]
            text = f"two processes have {unit} {entry.rank}: {' and '.join(places)}. Set another {name} for each."
            raise SharedUsageError(text, code="rank-taken", rank=entry.rank, places=places)
        seen[entry.rank] = entry


def _missing(missing: list[int], size: int, wait: Wait, unit: str) -> NotArrived:
    of_all = f" (of {size})" if size > 2 else ""
    text = (
        f"{name_ranks(missing, unit)}{of_all} did not arrive within {wait.timeout:g} s (world.timeout). "
        f"See {'its' if len(missing) == 1 else 'their'} output. If starting takes longer, set a longer world.timeout."
    )
    return NotArrived(text, ranks=missing, seconds=wait.timeout, size=size)


def _wait_for_readers(store: dist.Store, prefix: str, number: int) -> None:
    """Wait until the other processes have read an error, some seconds at most."""
    end = time.monotonic() + _READERS_SECONDS
    while store.add(f"{prefix}/read", 0) < number and time.monotonic() < end:
        time.sleep(_FIRST_NAP)


# ---- Other ranks


def _follow(store: dist.Store, rank: int, size: int, wait: Wait, unit: str) -> str:
    """Take part in the newest start whose answer names this process. Return its prefix."""
    own, joined = uuid.uuid4().hex[:8], ""
    place = f"process {os.getpid()} on {socket.gethostname()}"
    nap, longest_nap = _FIRST_NAP, _longest_nap(size)
    wait.start(f"{unit} 0")
    # Checked again and again: a request that waits would print a line of c10d's own whenever its time is over.
    while True:
        start = store.get(_START).decode() if joined or store.check([_START]) else ""
        prefix = f"dreplica/{start}"
        if start != joined:
            joined, nap = start, _FIRST_NAP
            store.append(f"{prefix}/roll", f"{rank} {size} {own} {place}\n")  # type: ignore[attr-defined]  # no stub
            wait.start(f"{unit} 0, which waits for all {size} {unit}s", _QUIET_SECONDS, _ANSWER_SECONDS)
        if joined and store.check([f"{prefix}/answer"]):
            answer = json.loads(store.get(f"{prefix}/answer"))
            if answer.get("tokens", {}).get(str(rank)) == own:
                return prefix
            if own in answer.get("arrived", ()):
                _raise(answer["failure"], store, prefix)
            # An earlier start: rank 0 has not published its prefix yet.
            wait.who = f"{unit} 0 (another process has joined as {unit} {rank}, in this start or an earlier one)"
        if wait.is_over:
            text = f"no answer from {unit} 0 within {wait.timeout:g} s (world.timeout): waited for {wait.who}"
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            reports = store.add(f"dreplica/reported/{joined}/{restart}", 1) == 1
            raise NotArrived(text, ranks=[0], reports=reports, seconds=wait.timeout)
        time.sleep(min(nap, max(wait.seconds_left, _FIRST_NAP)))
        nap = min(2 * nap, longest_nap)


def _raise(row: dict[str, Any], store: dist.Store, prefix: str) -> None:
    """Raise the error that rank 0 has published."""
    failure = Failure.from_dict(row)
    store.add(f"{prefix}/read", 1)
    if failure.kind == NotArrived.__name__:
        raise NotArrived(failure.message, reports=False, **failure.fields)
    raise SharedUsageError(failure.message, code=failure.code, **failure.fields)
