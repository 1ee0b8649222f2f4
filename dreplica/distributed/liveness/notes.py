"""What replicas note for each other in a rendezvous store, in a constant number of requests per replica."""

import json
import time
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

ASK = "ask"
"""A call to all replicas for their heartbeat."""
ALARM = "alarm"
"""A call to all replicas for their heartbeat since one of them may be lost."""


class Notes:
    """Calls, rows and results in a store.

    Calls are numbered. Each replica polls the key of the next call and answers it with one row, which it appends to
    the rows of the others. One replica reads all rows at once and publishes the result.

    Args:
        store: The store that all replicas share.
    """

    def __init__(self, store: dist.Store) -> None:
        self._store: dist.Store | None = store
        # A FileStore cannot append.
        self._appends = bool(getattr(store, "has_extended_api", lambda: True)())
        self._asked_at: float | None = None

    @property
    def pending_seconds(self) -> float:
        """Seconds since the request in flight was sent, or 0 if there is none."""
        asked_at = self._asked_at
        return 0.0 if asked_at is None else time.monotonic() - asked_at

    def close(self) -> None:
        """Drop the connection to the store. A store has no other way to close it."""
        self._store = None

    def call(self, number: int) -> str | None:
        """Return the kind of a call, or None if there is no such call yet."""
        key = f"call/{number}"
        return self._request("get", key).decode() if self._has(key) else None

    def make_call(self, number: int, kind: str) -> str:
        """Make a call unless there is one of this number already, and return its kind."""
        return self._request("compare_set", f"call/{number}", "", kind).decode()

    def append(self, key: str, row: Mapping[str, Any]) -> None:
        """Append a row to those of a key."""
        text = json.dumps(row)
        if self._appends:
            self._request("append", key, f"{text}\n")
        else:
            self._request("set", f"{key}/{self.count(f'{key}/count')}", text)

    def rows(self, key: str) -> list[dict[str, Any]]:
        """Return the rows of a key."""
        if self._appends:
            return [json.loads(line) for line in self._request("get", key).splitlines()] if self._has(key) else []
        if not self._has(f"{key}/count"):
            return []
        names = [f"{key}/{i + 1}" for i in range(self.count(f"{key}/count", 0))]
        return [json.loads(self._request("get", name)) for name in names if self._has(name)]

    def forget(self, key: str) -> None:
        """Remove the rows of a key."""
        if self._appends:
            self._request("delete_key", key)

    def count(self, key: str, more: int = 1) -> int:
        """Add to a counter and return its value."""
        return self._request("add", key, more)

    def publish(self, key: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """Write a value unless there is one already, and return the one that is there."""
        return json.loads(self._request("compare_set", key, "", json.dumps(value)))

    def published(self, key: str) -> dict[str, Any] | None:
        """Return a published value, or None if there is none yet."""
        return json.loads(self._request("get", key)) if self._has(key) else None

    def _has(self, key: str) -> bool:
        return self._request("check", [f"liveness/{key}"])

    def _request(self, name: str, key: str | list[str], *args: Any) -> Any:
        self._asked_at = time.monotonic()
        try:
            return getattr(self._store, name)(key if isinstance(key, list) else f"liveness/{key}", *args)
        finally:
            self._asked_at = None
