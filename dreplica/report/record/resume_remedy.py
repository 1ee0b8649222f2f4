"""How to continue a run that lost a replica."""

import os
import shlex
from dataclasses import replace
from pathlib import Path

from dreplica.agreement.verdict.remedy import Remedy
from dreplica.distributed.launch.command_line import launch_command, with_option
from dreplica.training.checkpoint.file_format import list_checkpoints


def resume_remedy(folder: Path, resume: str) -> Remedy:
    """Return the remedy that resumes a run, with the command to paste if the launcher is known.

    Args:
        folder: The run folder.
        resume: The value of `run.resume`.
    """
    where = " on each node" if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1 else ""
    command = launch_command()
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        remedy = Remedy.of("start-over", where=where)
    else:
        step = int(checkpoints[0].name.rpartition("_")[2])
        remedy = Remedy.of("resume" if resume == "auto" else "resume-with-auto", step=step, where=where)
        if resume != "auto" and command is not None:
            command = with_option(command, "--run.resume", "auto")
    return remedy if command is None else replace(remedy, command=shlex.join(command))
