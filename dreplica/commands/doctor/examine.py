"""All checks of `dreplica doctor`: first before CUDA starts, then with CUDA, then in two processes.

The processes are started directly, not by the launcher: torchrun sets OMP_NUM_THREADS and terminates all workers when
one fails, but the doctor measures the default number of threads and needs the output of every process.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from dreplica.commands.doctor.check import Check
from dreplica.commands.doctor.gpus import check_gpus
from dreplica.commands.doctor.judge import first_difference, judge_devices, judge_flags, judge_joining, judge_probes
from dreplica.commands.doctor.machine import check_machine, check_threads
from dreplica.commands.doctor.settings import check_hashes, check_settings
from dreplica.commands.doctor.trial import MARK
from dreplica.config.schema import WorldConfig
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.environment.device import bind_device
from dreplica.environment.manifest import collect_manifest
from dreplica.errors import ExitCode

_PROCESSES = 2
_SECONDS = 180.0
_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red", "unknown": "blue"}


@dataclass(frozen=True)
class Examination:
    """The results of all checks."""

    checks: Sequence[Check]
    manifest: Mapping[str, Any]
    """The manifest that a replica on this machine exchanges before the first step, with flags as the environment sets
    them. Compare the manifests of two machines to see how they differ."""

    @property
    def strict_holds(self) -> bool:
        """True if strict mode holds here, which means that no check is `bad`."""
        return all(check.status != "bad" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON values."""
        return {
            "schema": 1,
            "strict_holds": self.strict_holds,
            "checks": [check.as_dict() for check in self.checks],
            "manifest": dict(self.manifest),
        }


def run_doctor(as_json: bool = False) -> ExitCode:
    """Check this machine and print the results, as JSON if `as_json` is set.

    Returns:
        `AGREED` (0) if strict mode holds, `FAILED` (1) if not.
    """
    found = examine()
    if as_json:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        _print(found, Console(highlight=False, soft_wrap=True))
    return ExitCode.AGREED if found.strict_holds else ExitCode.FAILED


def examine(timeout: float = _SECONDS) -> Examination:
    """Run all checks, which takes about ten seconds. The processes are killed after `timeout` seconds."""
    gpu, cuda_started = torch.cuda.is_available(), torch.cuda.is_initialized()
    alone = World(0, 1, Channel(), None, socket.gethostname())
    manifest = collect_manifest(alone, bind_device(WorldConfig()), seed=None, data_digest="")
    settings = check_settings(manifest, gpu, cuda_started)
    machine = check_machine()
    trials, problem = _run_trials(timeout)
    if problem:
        why = "Without these processes strict mode cannot be checked."
        return Examination([*settings, *machine, *check_gpus(), Check("self-test", "bad", problem, why)], manifest)
    tried, joined = zip(*trials, strict=True)
    on_one_thread = tried[0]["devices"]["cpu"]["runs"][0]
    threads = check_threads(first_difference(on_one_thread, tried[0].get("threads", on_one_thread)))
    checks = [
        *settings,
        check_hashes([row["hash"] for row in tried]),
        *(threads if check.name == threads.name else check for check in machine),
        *check_gpus(),
        judge_flags([row["flags"] for row in tried]),
        *judge_devices([row["devices"] for row in tried]),
        *judge_probes(tried[0]["probes"]),
        judge_joining(joined),
    ]
    return Examination(checks, manifest)


def _run_trials(timeout: float) -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], str]:
    """Start the processes. Return what each printed, and the problem if one failed before that."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dreplica.commands.doctor.trial"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | _rank_environment(rank, store.port),
        )
        for rank in range(_PROCESSES)
    ]
    end = time.monotonic() + timeout
    found, problem = [], ""
    for process in processes:
        try:
            printed, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            printed, errors = process.communicate()
            errors += f"\nno end within {timeout:.0f} s"
        last = (errors.strip() or f"exit code {process.returncode}, without output").splitlines()[-1]
        match [json.loads(line.removeprefix(MARK)) for line in printed.splitlines() if line.startswith(MARK)]:
            case [trial, joined]:
                found.append((trial, joined))
            case [trial]:
                found.append((trial, {"error": last}))
            case _:
                problem = problem or f"a process failed: {last}"
    return found, problem


def _rank_environment(rank: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(_PROCESSES),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(_PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(True),  # this process serves the store, and outlives rank 0
    }


def _print(found: Examination, console: Console) -> None:
    width = max(len(check.name) for check in found.checks)
    for check in found.checks:
        colour = _COLOURS[check.status]
        console.print(f"[{colour}]{check.status:7}[/]  {check.name:{width}}  {escape(check.seen)}")
        if check.status in {"warn", "bad"}:
            console.print(f"         {check.why}", markup=False)
            for line in check.remedy:
                console.print(f"         remedy: {line}", markup=False)
    counts = {status: sum(check.status == status for check in found.checks) for status in _COLOURS}
    counted = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    verdict = "holds" if found.strict_holds else "does not hold"
    console.print(f"[bold]strict mode {verdict} on this machine[/]: {counted}")
