"""What identifies the script that is running: its arguments, its content, and the commit of its repository."""

import contextlib
import os
import re
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from dreplica.config.paths import PACKAGE_ROOT
from dreplica.environment.masking import mask_arguments

_LONGEST_ARGUMENT = 1000
_MOST_CHARACTERS = 10_000
_NOTEBOOKS = {"ipykernel_launcher.py", "colab_kernel_launcher.py"}

_SECONDS = 2.0
"""Limit for all commands of git together."""
_LARGEST_DIFF = 2**26
_CHUNK = 2**16
_SETTINGS = ("core.fsmonitor=false", "core.quotePath=true", "protocol.allow=never", "diff.autoRefreshIndex=false")
_STATUS = ("status", "--porcelain", "--untracked-files=no", "--no-renames")
_DIFF = (
    *("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--no-relative"),
    *("--full-index", "--submodule=diff", "--src-prefix=a/", "--dst-prefix=b/", "--unified=3"),
    *("--inter-hunk-context=0", "--diff-algorithm=myers"),
)
"""Changes to tracked files. Every option that a user's config may set is given, so that equal changes give equal text.

A changed binary file is represented by its hash, thanks to `--full-index`.
"""
_OF_ANOTHER_REPOSITORY = re.compile(
    "GIT_(DIR|WORK_TREE|INDEX_FILE|COMMON_DIR|OBJECT_DIRECTORY|ALTERNATE_OBJECT_DIRECTORIES|NAMESPACE|PREFIX"
    "|EXTERNAL_DIFF|TRACE.*)"
)


def script_arguments() -> list[str]:
    """Return `sys.argv` with secrets masked, and shortened if it is very long."""
    given = [str(argument) for argument in getattr(sys, "argv", None) or ()]
    if given and Path(given[0]).name in _NOTEBOOKS:
        del given[1:]  # the connection file of the kernel, whose name is random
    masked = [argument.encode("utf-8", "backslashreplace").decode() for argument in mask_arguments(given)]
    kept: list[str] = []
    length = 0
    for argument in masked:
        length += len(argument)
        if length > _MOST_CHARACTERS and kept:
            rest = masked[len(kept) :]
            kept.append(f"... and {len(rest)} more (digest {_digest(chr(0).join(rest).encode())[:12]})")
            break
        kept.append(argument if len(argument) <= _LONGEST_ARGUMENT else _shortened(argument, len(given[len(kept)])))
    return kept


def script_digest() -> str | None:
    """Return a digest of the script's file, as 32 hexadecimal digits, or None if the code is not in a file."""
    path = _script_file()
    try:
        return None if path is None else _digest(path.read_bytes())
    except OSError:
        return None


def script_commit() -> dict[str, Any] | None:
    """Return the commit of the script's repository, as `commit_of` does.

    Code that is in no file (a notebook, `python -c`) and the trainer use the working directory's repository.
    """
    path = _script_file()
    try:
        folder = Path.cwd() if path is None or path.is_relative_to(PACKAGE_ROOT) else path.parent
    except OSError:  # the working directory was deleted
        return None
    return commit_of(folder)


def commit_of(folder: Path) -> dict[str, Any] | None:
    """Return the commit that is checked out in the repository of a folder.

    Nothing is written, asked or downloaded, and the call takes at most about two seconds. Untracked files do not make a
    working tree dirty.

    Args:
        folder: Any folder of the working tree.

    Returns:
        `sha`; `dirty`, True if tracked files differ from the commit, or None if git did not say so in time; `diff`, a
        digest of the changes, or None without changes and if git did not list them in time. None without git or outside
        of a repository, and if git refuses the repository (`safe.directory`).
    """
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "--no-optional-locks", "--no-pager", "-C", str(folder)]
    for setting in _SETTINGS:
        command += ["-c", setting]
    end = time.monotonic() + _SECONDS
    head = _output([*command, "rev-parse", "--verify", "--quiet", "HEAD"], end) or b""
    sha = head.decode("ascii", "replace").strip()
    if not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", sha):
        return None
    # Unlike `git diff`, `git status` takes no lock to refresh the index, and is fast where the diff is large.
    status = _output([*command, *_STATUS], end)
    if not status:
        return {"sha": sha, "dirty": None if status is None else False, "diff": None}
    diff = _output([*command, *_DIFF], end)
    return {"sha": sha, "dirty": True, "diff": None if diff is None else _digest(diff)}


def _output(command: Sequence[str], end: float) -> bytes | None:
    """Run a command and return its output.

    None if it fails, writes too much, or has not ended at `end` (`time.monotonic`). All of its processes are ended.
    """
    environment = {name: value for name, value in os.environ.items() if not _OF_ANOTHER_REPOSITORY.fullmatch(name)}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    except OSError:
        return None
    assert process.stdout is not None
    with process.stdout as stream:
        read = _read(stream.fileno(), end)
    try:
        if read is None:
            return None
        return read if process.wait(max(end - time.monotonic(), 0.1)) == 0 else None
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _read(descriptor: int, end: float) -> bytes | None:
    found = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(found) <= _LARGEST_DIFF and selector.select(max(end - time.monotonic(), 0)):
            chunk = os.read(descriptor, _CHUNK)
            if not chunk:
                return bytes(found)
            found += chunk
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started, without waiting for one that cannot be ended."""
    if process.poll() is not None:
        return
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.2)


def _script_file() -> Path | None:
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    try:
        return None if path is None else Path(path).resolve()
    except OSError:
        return None


def _shortened(argument: str, length: int) -> str:
    return f"{argument[:_LONGEST_ARGUMENT]}... ({length} characters, digest {_digest(argument.encode())[:12]})"


def _digest(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)
