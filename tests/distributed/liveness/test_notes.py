"""Notes in a store, also in one that cannot append."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dreplica.distributed.liveness.notes import ALARM, ASK, Notes


def tcp_store(_: Path) -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def file_store(folder: Path) -> dist.Store:
    return dist.FileStore(str(folder / "store"), 2)


@pytest.mark.parametrize("make", [tcp_store, file_store])
def test_notes_work_in_any_store(make: Any, tmp_path: Path) -> None:
    store = make(tmp_path)
    one, two = (Notes(dist.PrefixStore("a", each)) for each in (store, store.clone()))
    assert one.call(0) is None
    assert (one.make_call(0, ASK), two.make_call(0, ALARM), two.call(0)) == (ASK, ASK, ASK)
    assert one.rows("answers/0") == []
    one.append("answers/0", {"rank": 0, "text": "a\nb"})
    two.append("answers/0", {"rank": 1})
    assert two.rows("answers/0") == [{"rank": 0, "text": "a\nb"}, {"rank": 1}]
    assert (one.count("readers"), two.count("readers"), one.count("readers", 0)) == (1, 2, 2)
    assert two.published("losses") is None
    assert one.publish("losses", {"lost": [1]}) == two.publish("losses", {"lost": [2]}) == {"lost": [1]}
    assert two.published("losses") == {"lost": [1]}
    assert one.pending_seconds == 0


def test_forgotten_rows_are_gone(tmp_path: Path) -> None:
    notes = Notes(tcp_store(tmp_path))
    notes.append("answers/0", {"rank": 0})
    notes.forget("answers/0")
    assert notes.rows("answers/0") == []


def test_pending_seconds_are_those_of_the_request_in_flight() -> None:
    seen: list[float] = []

    class Slow:
        def add(self, *_: Any) -> int:
            time.sleep(0.05)
            seen.append(notes.pending_seconds)
            return 1

    notes: Notes = Notes(Slow())  # type: ignore[arg-type]
    notes.count("readers")
    assert seen[0] >= 0.05
    assert notes.pending_seconds == 0
