"""Rendezvous in a store that an earlier start has written to."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from dreplica.distributed.rendezvous import store_for_this_start


def start(port: int, num_replicas: int) -> list[bytes]:
    """Rendezvous in threads, and return what each replica reads of a key that rank 0 wrote."""

    def join(replica_id: int) -> bytes:
        store = store_for_this_start(
            dist.TCPStore("127.0.0.1", port, is_master=False), replica_id, num_replicas, timeout=20
        )
        if replica_id == 0:
            assert not store.check(["key"])
            store.set("key", "new")
        return store.get("key")

    with ThreadPoolExecutor(num_replicas) as pool:
        return list(pool.map(join, range(num_replicas)))


def test_rendezvous_ignores_an_earlier_start() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in range(2):
        assert start(store.port, 3) == [b"new"] * 3


def test_rendezvous_times_out_and_names_the_replica() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(TimeoutError, match=r"^rendezvous: replica 1 did not arrive within 0\.2 s$"):
        store_for_this_start(store, 0, 2, timeout=0.2)
