"""Rendezvous of the replicas, in a store that may hold keys of earlier starts."""

import json
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_RETRY_SECONDS = 0.5


def store_for_this_start(store: dist.Store, replica_id: int, num_replicas: int, timeout: float = 600.0) -> dist.Store:
    """Return a prefix of the store that no earlier start of this job has written to.

    torchrun keeps its store over restarts. Rank 0 draws a random prefix and publishes it. A replica that reads the
    prefix of an earlier start is not in that start's list of replicas, and reads again. torchrun's restart count cannot
    serve as the prefix: it may differ between nodes.

    Args:
        store: The store that all replicas share.
        replica_id: Global rank of this process.
        num_replicas: Number of replicas.
        timeout: Longest wait for all replicas, in seconds.

    Returns:
        `store` under the prefix of this start.

    Raises:
        TimeoutError: If not all replicas arrive in time.

    Note:
        Collective: call on every rank.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout
    if replica_id == 0:
        store.set("dreplica/start", own)
        present = {str(0): own}
        for other in range(1, num_replicas):
            key = f"dreplica/{own}/hello/{other}"
            if not _wait(store, key, end - time.monotonic()):
                raise TimeoutError(f"rendezvous: replica {other} did not arrive within {timeout:g} s")
            present[str(other)] = store.get(key).decode()
        store.set(f"dreplica/{own}/present", json.dumps(present))
        return dist.PrefixStore(f"dreplica/{own}", store)
    while time.monotonic() < end:
        if _wait(store, "dreplica/start", end - time.monotonic()):
            start = store.get("dreplica/start").decode()
            store.set(f"dreplica/{start}/hello/{replica_id}", own)
            if _wait(store, f"dreplica/{start}/present", _RETRY_SECONDS):
                present = json.loads(store.get(f"dreplica/{start}/present"))
                if present.get(str(replica_id)) == own:
                    return dist.PrefixStore(f"dreplica/{start}", store)
                time.sleep(_RETRY_SECONDS / 10)  # this is an earlier start: rank 0 has not published its prefix yet
    raise TimeoutError(f"rendezvous: not all {num_replicas} replicas arrived within {timeout:g} s")


def _wait(store: dist.Store, key: str, seconds: float) -> bool:
    """Return True if the key is set within `seconds`."""
    try:
        store.wait([key], timedelta(seconds=max(seconds, 0.001)))
    except dist.DistStoreError:
        return False
    return True
