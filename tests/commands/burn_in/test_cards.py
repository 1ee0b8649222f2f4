"""The account of a burn-in: findings per device."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dreplica.agreement.verdict.causes import CAUSES
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.commands.burn_in.cards import HARDWARE, OPEN, VARYING, Account, Card, PassDone, ask_health, kind_of
from dreplica.commands.burn_in.record import Record
from dreplica.commands.burn_in.table import PassLines, conclusions, print_account
from dreplica.distributed.failure import Failure
from dreplica.distributed.liveness.lost import Lost
from dreplica.errors import ExitCode
from tests.commands.burn_in.test_job_config import config

UUIDS = ["6e5ac3b1-0", "77ff6cbd-1", "9aa5c7d2-2"]


def manifest(replica: int) -> dict[str, Any]:
    device = {"type": "cuda", "index": replica, "name": "NVIDIA H200", "uuid": UUIDS[replica], "driver": "550.54"}
    return {"host": "node7", "cpu": {"model": "EPYC"}, "device": device}


def done(
    number: int, cause: str = "none", suspects: tuple[int, ...] = (), classes: tuple[tuple[int, ...], ...] = ()
) -> PassDone:
    verdict = Verdict(
        cause == "none", cause, f"{cause}: diverged", suspects=list(suspects), groups=[list(ids) for ids in classes]
    )
    return PassDone(number, {"model": number}, cause == "none", 10, 87, 5, 0.5, "ab" * 16, verdict)


def account(*passes: PassDone, num_replicas: int = 3) -> Account:
    found = Account([manifest(replica_id) for replica_id in range(num_replicas)], kept=2)
    for item in passes:
        found.add(item)
    return found


def states(found: Account) -> list[str]:
    return [card.state for card in found.cards]


def shown(found: Account) -> str:
    return "\n".join(conclusions(found))


def test_card_named_once_is_suspect() -> None:
    ones = [done(number) for number in range(1, 9)]
    found = account(*ones, done(9, "transient-fault", (1,)))
    assert states(found) == ["clean", "suspect", "clean"]
    assert found.suspects == [1]
    assert [(card.named, card.passes, card.steps, card.comparisons) for card in found.cards] == [
        (0, 9, 90, 783),
        (1, 9, 90, 783),
        (0, 9, 90, 783),
    ]
    assert (
        "SUSPECT replica 1: host node7, cuda:1, NVIDIA H200, UUID 77ff6cbd-1: named in 1 of 9 passes: transient-fault 1"
        in shown(found)
    )


def test_remedy_prefers_persistent_fault() -> None:
    verdicts = [done(1, "transient-fault", (1,)), done(2, "transient-fault", (1,)), done(3, "persistent-fault", (1,))]
    text = shown(account(*verdicts))
    assert "named in 3 of 3 passes: transient-fault 2, persistent-fault 1" in text
    assert f"  remedy: {CAUSES['persistent-fault'].remedy[0]}" in text


def test_cards_without_majority_are_in_doubt() -> None:
    found = account(done(1, "persistent-fault", (), ((0,), (1,))), num_replicas=2)
    assert states(found) == ["in doubt", "in doubt"]
    assert found.suspects == []
    text = shown(found)
    assert "UNDECIDED in 1 pass: replica 0 against replica 1" in text
    assert all(uuid in text for uuid in UUIDS[:2])
    assert "third card" in text
    found.add(done(2, "persistent-fault", (0,), ((0,), (1,))))  # this time the arithmetic decided
    assert states(found) == ["suspect", "in doubt"]


@pytest.mark.parametrize("cause", sorted(set(CAUSES) - {"none", "replica-lost", *HARDWARE, *OPEN}))
def test_software_cause_accuses_no_card(cause: str) -> None:
    found = account(done(1, cause, (0, 1)), done(2, cause))
    assert states(found) == ["clean", "clean", "clean"]
    assert (found.suspects, found.num_found, found.undecided) == ([], 2, {})
    assert f"SOFTWARE, no device accused: {cause} 2; first in pass 1: {cause}: diverged" in shown(found)


@pytest.mark.parametrize("cause", VARYING)
def test_cause_varying_on_one_card_is_open(cause: str) -> None:
    found = account(done(1, cause, (0, 1, 2)), done(2, cause, (1,)), done(3, cause, (0, 1, 2)))
    assert states(found) == ["clean", "in doubt", "clean"]
    assert [(card.named, card.in_doubt) for card in found.cards] == [(0, 0), (0, 1), (0, 0)]
    assert f"OPEN, device or not: {cause} 3; first in pass 1" in shown(found)
    assert states(account(done(1, cause, (0,)), num_replicas=2)) == ["in doubt", "clean"]


@pytest.mark.parametrize("cause", OPEN)
def test_open_cause_leaves_cards_in_doubt(cause: str) -> None:
    found = account(done(1), done(2, cause, (2,)))
    assert states(found) == ["clean", "clean", "in doubt"]
    assert found.suspects == []
    assert f"OPEN, device or not: {cause} 1; first in pass 2" in shown(found)
    assert states(account(done(1, cause))) == ["in doubt"] * 3


def test_lost_replica_is_named_but_no_finding() -> None:
    found = account(done(1), done(2, "replica-lost", (2,)))
    found.lose([Lost(2, "raised", failure=Failure("RuntimeError", "uncorrectable ECC error"))])
    assert (found.num_found, found.passes, states(found)) == (0, 2, ["clean", "clean", "lost"])
    assert "LOST replica 2: host node7, cuda:2" in shown(found)
    assert "uncorrectable ECC error" in shown(found)


def test_card_without_comparison_is_not_checked() -> None:
    assert states(account()) == ["not checked"] * 3


def test_findings_are_counted_and_few_kept() -> None:
    found = account(*(done(number, "transient-fault", (1,)) for number in range(1, 50)))
    assert (found.num_found, found.cards[1].named, [item.number for item in found.found]) == (49, 49, [1, 2])
    for number, cause in ((50, "structure-differs"), (51, "batch-differs"), (52, "unexplained")):
        found.add(done(number, cause))
    assert "structure-differs 1; first in pass 50" in shown(found)
    assert "batch-differs 1, unexplained 1; first in pass 51" in shown(found)


def test_warnings_of_passes_are_counted() -> None:
    loss = "epoch 1: training loss [nan, nan] is not finite"
    found = account(*(replace(done(number), warnings=[loss]) for number in (1, 2)))
    assert shown(found) == f"warning, in 2 passes: {loss}"
    found.add(replace(done(3), warnings=["second", "third", loss]))
    assert found.warnings == {loss: 3, "second": 1}, "two are kept"


def test_shared_card_is_noted() -> None:
    cpu = {"host": "a", "cpu": {"model": "EPYC"}, "device": {"type": "cpu", "name": "cpu"}}
    found = Account([cpu, cpu, cpu | {"host": "b"}], kept=1)
    assert found.cards[0] == Card(0, "a", "cpu", "EPYC", None, None)
    assert shown(found) == "note: replicas 0, 1 share cpu of a: its faults can affect all of them"


def test_new_memory_errors_are_reported() -> None:
    found = account(done(1))
    found.cards[1].health = [{"ecc_uncorrected": 0, "ecc_corrected": 3}, {"ecc_uncorrected": 2, "ecc_corrected": 3}]
    found.cards[2].health = [{"ecc_uncorrected": None}, {"ecc_uncorrected": None}]
    assert shown(found) == (
        "ECC replica 1: host node7, cuda:1, NVIDIA H200, UUID 77ff6cbd-1: 2 more uncorrected memory errors than before"
    )


@pytest.mark.process
def test_ask_health_selects_card_by_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["GPU-aa, 0, 1650, 00000000:1B:00.0, 40, 0, 0", "GPU-bb, 1, [N/A], 00000000:1C:00.0, 41, 7, [N/A]"]
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert ask_health("bb") == {
        "nvidia_smi_index": 1,
        "serial": None,
        "pci_bus_id": "00000000:1C:00.0",
        "temperature": 41,
        "ecc_corrected": 7,
        "ecc_uncorrected": None,
    }
    assert ask_health("cc") is None
    assert ask_health(None) is None
    program.write_text("#!/bin/sh\nexit 9\n")
    assert ask_health("bb") is None


def test_kind_of_covers_known_causes() -> None:
    assert {kind_of(done(1, cause).verdict, 3) for cause in HARDWARE} == {"hardware"}
    assert set(HARDWARE) | set(OPEN) | set(VARYING) <= set(CAUSES)


def test_tables_and_last_line(tmp_path: Path) -> None:
    found = account(done(1), done(2, "transient-fault", (1,)))
    record = Record(tmp_path, config(), 1800)
    summary = record.summary(found, "time", ExitCode.DIVERGED)
    text = io.StringIO()
    print_account(Console(file=text, width=80), found, summary)
    lines = text.getvalue().splitlines()
    words = dict(word.split("=") for word in lines[-1].removeprefix("BURN-IN ").split())
    assert words.pop("seconds") == str(summary["burn_in"]["seconds"])
    assert words == {
        "found": "1", "suspects": "1", "passes": "2", "steps": "20", "comparisons": "174", "ended": "time", "exit": "3",
    }  # fmt: skip
    assert lines[-2].endswith("of 30m: the time is over")
    assert any("suspect" in line and "│ 1 " in line for line in lines)
    assert json.loads(json.dumps(summary)) == summary
    settings = summary["passes_found"][0]["again"]
    assert settings == f"--config {tmp_path / 'config.yaml'} --seed.model 2"
    assert record.again(found.found[0], found.cards) == f"dreplica train --replicas 3 {settings}"
    found.cards[2].host = "node8"
    assert record.again(found.found[0], found.cards[1:]).startswith("dreplica train --nodes 2 --node-rank ")


def test_pass_lines_show_all_findings() -> None:
    text = io.StringIO()
    lines = PassLines(Console(file=text, width=200), 60, enabled=True)
    for number in range(1, 6):
        lines.show(done(number), "again")
    lines.show(done(6, "transient-fault", (1,)), "dreplica train --seed.model 6")
    PassLines(Console(file=text), 60, enabled=False).show(done(7, "transient-fault", (1,)), "again")
    starts = [line.split("  ")[0] for line in text.getvalue().splitlines()]
    assert starts == ["pass 1", "pass 6", "", ""]
    assert "again: dreplica train --seed.model 6" in text.getvalue()
    assert "report: not kept" in text.getvalue()
