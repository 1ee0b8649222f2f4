"""Kill random replicas at random moments, restart the job each time, and compare its result.

    python -m tests.benchmarks.kill_campaign --kills 30

A job that saves every few steps is killed with SIGKILL, one replica or all, at a random moment or while a checkpoint is
being written; the survivors end without help; the same command resumes. After every few kills a job is left to end,
and its trace, results and final digests must be those of a job that was never interrupted. Prints what was killed when,
and from where the run resumed; the exit code is 1 if the result of any job differs.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.harness import start_workers

NUM_REPLICAS = 2
KILLS_PER_JOB = 5
JOB = (
    "--data.name=tests.fixtures:tiny_images",
    "--model.factory=tests.fixtures:tiny_model",
    "--data.batch_size=4",
    "--data.num_workers=1",
    "--train.epochs=12",
    "--optim={name: AdamW, lr: 0.01}",
    "--schedule={name: StepLR, step_size: 3}",
    "--checkpoint.every_steps=3",
)


def start(root: Path) -> list[Any]:
    """The processes of one start of the job, and the store they meet at, which must live as long as they."""
    return start_workers([[*JOB, f"--run.root={root}", "--run.name=job"]] * NUM_REPLICAS)


def kill_somewhere(root: Path, draw: random.Random) -> tuple[str, list[int]] | None:
    """Starts the job, kills, and waits for its end. Returns what was killed when; None if it had ended before."""
    left = set(_being_written(root))
    processes, _store, _outputs = start(root)
    victims = draw.choice([[0], [1], [0, 1]])
    in_mid_write = draw.random() < 0.4
    begun = time.monotonic()
    delay = draw.uniform(0.5, 3.0)
    moment = "at random"
    while any(process.is_alive() for process in processes):
        if in_mid_write and set(_being_written(root)) - left:
            moment = "in mid-write"
            break
        if time.monotonic() - begun > (10.0 if in_mid_write else delay):
            break
        time.sleep(0.0005)
    alive = all(process.is_alive() for process in processes)
    for victim in victims:
        if processes[victim].is_alive():
            os.kill(processes[victim].pid, signal.SIGKILL)
    for process in processes:
        process.terminate()  # as torchrun does with the rest
    for process in processes:
        process.join(60)
        assert not process.is_alive(), "a survivor did not end"
    return (moment, victims) if alive else None


def _being_written(root: Path) -> Iterable[Path]:
    return (root / "job" / "checkpoints").glob(".*.tmp")


def finish(root: Path) -> None:
    """Starts the job and leaves it to end."""
    processes, _store, outputs = start(root)
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    text = "".join(path.read_text() for path in sorted(outputs.iterdir()))
    assert codes == [0] * NUM_REPLICAS, f"{codes}\n{text}"


def outcome(root: Path) -> dict[str, Any]:
    """Return the results of the job."""
    folder = root / "job"
    report = json.loads((folder / "report.json").read_text())
    return {
        "trace": (folder / "trace.jsonl").read_text(),
        "epochs": report["epochs"],
        "fingerprints": report["fingerprints"],
        "verdict": report["verdict"],
    }


def differing(one: dict[str, Any], other: dict[str, Any]) -> Iterable[str]:
    """In what two outcomes differ."""
    return [key for key in one if one[key] != other[key]]


def main() -> None:
    """Parses arguments and runs the campaign."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    kills, in_mid_write, jobs, bad = 0, 0, 0, 0
    with tempfile.TemporaryDirectory(prefix="dreplica-kills-") as folder:
        finish(Path(folder) / "reference")
        expected = outcome(Path(folder) / "reference")
        while kills < arguments.kills:
            root = Path(folder) / f"job{jobs}"
            jobs += 1
            ended = False
            for _ in range(KILLS_PER_JOB):
                killed = kill_somewhere(root, draw)
                if killed is None:
                    ended = True
                    break
                kills += 1
                moment, victims = killed
                in_mid_write += moment == "in mid-write"
                lines = root / "job" / "trace.jsonl"
                done = len(lines.read_text().splitlines()) if lines.exists() else 0
                print(f"kill {kills:3}: replicas {victims} {moment}, {done} trace lines", flush=True)
            if not ended:
                finish(root)
            wrong = differing(expected, outcome(root))
            bad += bool(wrong)
            print(f"job {jobs}: {'as never interrupted' if not wrong else f'DIFFERS in {wrong}'}", flush=True)
    print(f"{kills} kills, {in_mid_write} of them while a checkpoint was being written; {jobs} jobs, {bad} differ")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
