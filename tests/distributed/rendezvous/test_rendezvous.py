"""Rendezvous in a store that an earlier start has written to."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from dreplica.distributed.rendezvous import rendezvous as module
from dreplica.distributed.rendezvous.rendezvous import rendezvous, store_for_this_start
from dreplica.distributed.rendezvous.store import Endpoint, NotArrived, open_store
from dreplica.distributed.rendezvous.wait import Wait
from dreplica.errors import SharedUsageError
from tests.harness import free_port


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(store: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", store.port, is_master=False)


def take_part(store: dist.TCPStore, places: list[tuple[int, int]], timeout: float = 20.0, **options: Any) -> list[Any]:
    """Rendezvous in one thread for each (rank, size), and return the prefix of each or the error that it raised."""

    def join(place: tuple[int, int]) -> Any:
        try:
            return store_for_this_start(client(store), *place, Wait(timeout), **options)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(join, places))


def test_rendezvous_ignores_an_earlier_start(store: dist.TCPStore) -> None:
    for _ in range(2):
        first, *others = take_part(store, [(rank, 3) for rank in range(3)])
        assert not first.check(["key"])
        first.set("key", "new")
        assert [other.get("key") for other in others] == [b"new"] * 2


def test_rendezvous_ignores_an_earlier_failure(store: dist.TCPStore) -> None:
    """A start that failed leaves its error in the store."""
    (failed,) = take_part(store, [(0, 3)], timeout=0.2)
    assert type(failed) is NotArrived
    others = ThreadPoolExecutor(1).submit(take_part, store, [(1, 3), (2, 3)])
    time.sleep(0.5)  # they have read the error by now
    (first,) = take_part(store, [(0, 3)])
    first.set("key", "new")
    assert [other.get("key") for other in others.result()] == [b"new"] * 2


def test_rendezvous_times_out_and_names_the_ranks(store: dist.TCPStore) -> None:
    """Rank 0 names who is missing, and the others learn it from rank 0."""
    zero, two = take_part(store, [(0, 4), (2, 4)], timeout=1)
    for error in (zero, two):
        assert type(error) is NotArrived
        assert str(error).startswith("ranks 1, 3 (of 4) did not arrive within 1 s (world.timeout).")
        assert error.fields == {"ranks": [1, 3], "seconds": 1.0, "size": 4}
    assert (zero.reports, two.reports) == (True, False)


def test_rendezvous_names_rank_0_if_it_is_missing(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the others reports it, and again after torchrun has restarted them."""
    for restart in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        errors = take_part(store, [(1, 3), (2, 3)], timeout=0.3)
        assert [error.ranks for error in errors] == [[0], [0]]
        assert sorted(error.reports for error in errors) == [False, True]
    assert str(errors[0]) == "no answer from rank 0 within 0.3 s (world.timeout): waited for rank 0"


def test_rendezvous_refuses_a_rank_given_twice(store: dist.TCPStore) -> None:
    errors = take_part(store, [(0, 3), (1, 3), (1, 3)])
    assert {type(error) for error in errors} == {SharedUsageError}
    assert {error.code for error in errors} == {"rank-taken"}
    assert str(errors[0]).startswith("two processes have rank 1: process ")
    assert str(errors[0]).endswith(" Set another RANK for each.")


def test_rendezvous_says_that_a_rank_has_joined_before(store: dist.TCPStore) -> None:
    take_part(store, [(0, 2), (1, 2)])
    (error,) = take_part(store, [(1, 2)], timeout=0.3)
    assert str(error).endswith("rank 0 (another process has joined as rank 1, in this start or an earlier one)")


def test_rendezvous_ends_with_the_store() -> None:
    """As where rank 0, which serves it, has ended."""
    endpoint = Endpoint("localhost", free_port())
    served: list[dist.Store] = [open_store(endpoint, True, Wait(20))]
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(rendezvous, endpoint, 1, 2, 20.0, serves=False)
        time.sleep(0.5)
        served.clear()
        with pytest.raises(NotArrived, match=r"^rank 0 has ended, while rank 1 waited for rank 0 \(") as caught:
            one.result()
    assert caught.value.ranks == [0]


@pytest.mark.parametrize("places", [[(0, 2), (1, 4)], [(0, 4), (3, 2)], [(0, 2), (7, 8)]])
def test_rendezvous_refuses_another_size(places: list[tuple[int, int]], store: dist.TCPStore) -> None:
    errors = take_part(store, places)
    assert {error.code for error in errors} == {"sizes-differ"}
    (_, size), (rank, other) = places
    assert str(errors[1]).startswith(f"WORLD_SIZE is {size} on rank 0 and {other} on rank {rank} (process ")


def test_rendezvous_names_nodes(store: dist.TCPStore) -> None:
    (error,) = take_part(store, [(0, 2)], timeout=0.2, unit="node")
    assert str(error).startswith("node 1 did not arrive within 0.2 s (world.timeout). See its output.")


class Counted:
    """A store that counts the requests of each rank, and waits by polling."""

    def __init__(self, store: dist.Store, counts: dict[str, int]) -> None:
        self._store, self._counts = store, counts

    def __getattr__(self, name: str) -> Any:
        def request(*args: Any) -> Any:
            self._counts[name] = self._counts.get(name, 0) + 1
            return getattr(self._store, name)(*args)

        return request


@pytest.mark.parametrize("size", [4, 64])
def test_rendezvous_requests_do_not_grow_with_ranks(
    size: int, store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[dict[str, int]] = [{} for _ in range(size)]
    prefixes = []
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, _: prefix)

    def join(rank: int) -> None:
        prefixes.append(store_for_this_start(Counted(client(store), counts[rank]), rank, size, Wait(60)))  # type: ignore[arg-type]

    began = time.monotonic()
    others = [threading.Thread(target=join, args=(rank,)) for rank in range(1, size)]
    for thread in others:
        thread.start()
    while not all(counts[1:]):
        time.sleep(0.05)
    join(0)
    for thread in others:
        thread.join()
    assert len(set(prefixes)) == 1
    assert counts[0].pop("set") == 3
    looks = 10 + (time.monotonic() - began) / 0.05
    for count in counts:
        assert count.pop("get") <= looks
        assert count.pop("check", 0) <= 2 * looks
    assert counts == [{}, *[{"append": 1}] * (size - 1)]


def test_rendezvous_answer_is_one_small_message(store: dist.TCPStore) -> None:
    """The answer grows by a few bytes for each rank."""
    first, *_ = take_part(store, [(rank, 16) for rank in range(16)])
    assert len(first.get("answer")) < 25 * 16
    assert len(json.loads(first.get("answer"))["tokens"]) == 15


def test_rendezvous_reports_whom_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    start = Wait.start
    monkeypatch.setattr(Wait, "start", lambda self, who, after=5.0, extra=0.0: start(self, who, after / 20, extra))
    endpoint = Endpoint("localhost", free_port())
    with ThreadPoolExecutor(3) as pool:
        one = pool.submit(rendezvous, endpoint, 1, 8, 3.0, serves=False)
        time.sleep(1)
        zero = pool.submit(rendezvous, endpoint, 0, 8, 1.5, serves=True)
        for future in (zero, one):
            with pytest.raises(NotArrived) as caught:
                future.result()
            assert caught.value.ranks == [2, 3, 4, 5, 6, 7]
    texts = [record.getMessage() for record in caplog.records]
    seconds = r"\d s of at most {} s \(world\.timeout\)"  # a busy machine may report later, and less often
    early = re.escape(f"waiting for rank 0 at {endpoint} (Connection refused): ") + seconds.format(3)
    late = re.escape("waiting for ranks 2-7 (6 of 8): ") + seconds.format(r"1\.5")
    assert any(re.fullmatch(early, text) for text in texts)
    assert 1 <= len([text for text in texts if re.fullmatch(late, text)]) <= 3  # after 0.25, 0.5 and 1 s
    assert capfd.readouterr().err == ""  # no lines of c10d


def test_rendezvous_survives_a_blocked_store(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to a process that is suspended never returns."""
    monkeypatch.setattr("dreplica.distributed.rendezvous.wait._GRACE_SECONDS", 0.1)
    free = threading.Event()
    monkeypatch.setattr(module, "store_for_this_start", lambda *_: free.wait(30))
    with pytest.raises(NotArrived, match=r"^rank 0 at localhost:\d+ does not respond within 0\.3 s") as caught:
        rendezvous(Endpoint("localhost", store.port), 1, 2, 0.3, serves=False)
    free.set()
    assert caught.value.ranks == [0]
