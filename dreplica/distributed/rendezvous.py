"""How the replicas of one start find each other in a store that may hold what earlier starts have left."""

import json
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

_LOOK_AGAIN_SECONDS = 0.5


def store_for_this_start(store: dist.Store, replica_id: int, num_replicas: int, timeout: float = 600.0) -> dist.Store:
    """A part of `store` that no earlier start of this job has written to: torchrun keeps its store over restarts.

    Rank 0 draws its name; who reads an older one finds itself missing from the list of those whom that start has, and
    looks again. (torchrun's count of restarts would not do as a name: it may differ between nodes.)

    Raises TimeoutError if not all replicas have come within `timeout` seconds.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout
    if replica_id == 0:
        store.set("dreplica/start", own)
        present = {str(0): own}
        for other in range(1, num_replicas):
            key = f"dreplica/{own}/hello/{other}"
            if not _wait(store, key, end - time.monotonic()):
                raise TimeoutError(f"replica {other} has not joined within {timeout:g} s")
            present[str(other)] = store.get(key).decode()
        store.set(f"dreplica/{own}/present", json.dumps(present))
        return dist.PrefixStore(f"dreplica/{own}", store)
    while time.monotonic() < end:
        if _wait(store, "dreplica/start", end - time.monotonic()):
            start = store.get("dreplica/start").decode()
            store.set(f"dreplica/{start}/hello/{replica_id}", own)
            if _wait(store, f"dreplica/{start}/present", _LOOK_AGAIN_SECONDS):
                present = json.loads(store.get(f"dreplica/{start}/present"))
                if present.get(str(replica_id)) == own:
                    return dist.PrefixStore(f"dreplica/{start}", store)
                time.sleep(_LOOK_AGAIN_SECONDS / 10)  # an earlier start: rank 0 is yet to come
    raise TimeoutError(f"the {num_replicas} replicas have not all joined within {timeout:g} s")


def _wait(store: dist.Store, key: str, seconds: float) -> bool:
    """Whether the key is there within so many seconds."""
    try:
        store.wait([key], timedelta(seconds=max(seconds, 0.001)))
    except dist.DistStoreError:
        return False
    return True
