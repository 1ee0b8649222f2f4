"""Workers in the background."""

from pathlib import Path

from dreplica.distributed.launch.background import run_in_background


def test_workers_are_terminated_at_the_timeout(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("earlier\n")
    ended = run_in_background("http.server", ["0"], 1, log, timeout=1)
    assert ended.code is None
    assert "earlier" not in ended.output
