"""What identifies a script: arguments, content and commit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dreplica.environment import script
from dreplica.environment.script import commit_of, script_arguments, script_commit, script_digest

pytestmark = pytest.mark.process


def git(folder: Path, *arguments: str, check: bool = True) -> str:
    identity = {f"GIT_{role}_{key}": "a@b.c" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=check, capture_output=True, text=True, env=os.environ | identity).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "inner").mkdir(parents=True)
    git(folder, "init", "-q")
    (folder / "inner" / "train.py").write_text("print(1)\n" * 50)
    (folder / "weights.bin").write_bytes(bytes(100))
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def fake_git(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_clean_commit_has_its_hash(repository: Path) -> None:
    sha = git(repository, "rev-parse", "HEAD").strip()
    assert commit_of(repository / "inner") == {"sha": sha, "dirty": False, "diff": None}


def test_equal_changes_have_equal_digests(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    git(tmp_path, "clone", "-q", str(repository), str(tmp_path / "other" / "clone"))
    found = []
    for folder in (repository, tmp_path / "other" / "clone"):
        git(folder, "config", "diff.mnemonicPrefix", str(folder == repository).lower())
        git(folder, "config", "diff.context", "0" if folder == repository else "9")
        git(folder, "config", "color.ui", "always")
        (folder / "inner" / "train.py").write_text("print(1)\n" * 20 + "print(2)\n" + "print(1)\n" * 29)
        found.append(commit_of(folder / "inner"))
    assert found[0] == found[1]
    assert found[0] is not None
    assert found[0]["dirty"]
    assert len(found[0]["diff"]) == 32


def test_each_change_has_its_digest(repository: Path) -> None:
    digests = {None: commit_of(repository)}
    (repository / "weights.bin").write_bytes(bytes(99) + b"\1")
    digests["binary"] = commit_of(repository)
    (repository / "weights.bin").write_bytes(bytes(99) + b"\2")
    digests["other binary"] = commit_of(repository)
    git(repository, "add", ".")
    digests["staged"] = commit_of(repository)
    assert digests["staged"] == digests["other binary"]
    assert len({str(value) for value in digests.values()}) == 3


def test_untracked_and_touched_files_are_clean(repository: Path) -> None:
    (repository / "runs").mkdir()
    (repository / "runs" / "log.txt").write_text("x")
    os.utime(repository / "inner" / "train.py", (1, 1))
    index = (repository / ".git" / "index").read_bytes()
    found = commit_of(repository)
    assert found is not None
    assert found["dirty"] is False
    assert (repository / ".git" / "index").read_bytes() == index
    (repository / "weights.bin").write_bytes(bytes(7))
    found = commit_of(repository)
    assert (repository / ".git" / "index").read_bytes() == index
    git(repository, "update-index", "--refresh", "-q", "--", "inner/train.py", check=False)
    assert commit_of(repository) == found


def test_no_repository_has_no_commit(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commit_of(tmp_path) is None
    assert commit_of(tmp_path / "missing") is None
    git(tmp_path, "init", "-q", "empty")
    assert commit_of(tmp_path / "empty") is None
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    assert commit_of(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(repository) is None


def test_repository_of_another_owner_has_no_commit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert commit_of(repository) is None


def test_commit_without_a_home(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CONFIG_HOME", "USER"):
        monkeypatch.delenv(name, raising=False)
    assert commit_of(repository) is not None


def test_hanging_git_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_git(tmp_path / "bin", monkeypatch, f"sleep 60 & echo $! >> {tmp_path}/pids; echo $$ >> {tmp_path}/pids; wait")
    start = time.monotonic()
    assert commit_of(tmp_path) is None
    assert time.monotonic() - start < 4
    for pid in (tmp_path / "pids").read_text().split():
        assert _has_ended(int(pid))


def _has_ended(pid: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # ended, and not collected yet by the process that adopted it
            return True
        time.sleep(0.1)
    return False


def test_slow_or_huge_diff_is_unknown(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sha = git(repository, "rev-parse", "HEAD").strip()
    fake_git(tmp_path / "bin", monkeypatch, f'case "$*" in *rev-parse*) echo {sha};; *) yes;; esac')
    monkeypatch.setattr(script, "_LARGEST_DIFF", 2**20)
    assert commit_of(repository) == {"sha": sha, "dirty": None, "diff": None}
    (tmp_path / "bin" / "git").write_text(
        f'#!/bin/sh\ncase "$*" in *rev-parse*) echo {sha};; *status*) echo M x;; *) yes;; esac'
    )
    assert commit_of(repository) == {"sha": sha, "dirty": True, "diff": None}


@pytest.mark.parametrize("body", ["echo no commit", "exit 3", "kill -9 $$", "echo"])
def test_odd_git_has_no_commit(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_git(tmp_path / "bin", monkeypatch, body)
    assert commit_of(tmp_path) is None


def test_git_never_asks(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (repository / "hook").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (repository / "hook").chmod(0o755)
    for key in ("core.fsmonitor", "diff.external", "core.pager"):
        git(repository, "config", key, str(repository / "hook"))
    (repository / "inner" / "train.py").write_text("print(3)\n")
    found = commit_of(repository)
    assert found is not None
    assert found["dirty"]
    assert not (tmp_path / "ran").exists()


def run_script(*arguments: str, cwd: Path, **variables: str) -> list[str]:
    """Run a file, `-c` or `-m` and return what it prints, line by line."""
    environment = os.environ | {"PYTHONPATH": f"{script.PACKAGE_ROOT.parent}{os.pathsep}{cwd}"} | variables
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


PRINT = (
    "from dreplica.environment.script import *\n"
    "print(script_arguments()); print((script_commit() or {}).get('sha')); print(script_digest())\n"
)


def test_script_is_found_however_it_is_started(repository: Path, tmp_path: Path) -> None:
    package = repository / "pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(PRINT)
    sha = git(repository, "rev-parse", "HEAD").strip()
    (tmp_path / "outside").mkdir()
    by_path = run_script(str(package / "__main__.py"), "--token", "abcd", cwd=tmp_path / "outside")
    by_module = run_script("-m", "pkg", "--token=abcd", cwd=repository)
    assert by_path[0] == str([str(package / "__main__.py"), "--token", "***"])
    assert by_module[0] == str([str(package / "__main__.py"), "--token=***"])
    assert by_path[1] == by_module[1] == sha
    assert by_path[2] == by_module[2] != "None"
    by_text = run_script("-c", PRINT, "a", cwd=repository)
    assert by_text == ["['-c', 'a']", sha, "None"]
    outside = run_script("-c", PRINT, cwd=tmp_path / "outside")
    assert outside == ["['-c']", "None", "None"]


def test_script_in_a_read_only_folder(repository: Path) -> None:
    for folder in (repository, repository / ".git"):
        folder.chmod(0o555)
    try:
        assert commit_of(repository) is not None
    finally:
        for folder in (repository, repository / ".git"):
            folder.chmod(0o755)


def test_deleted_working_directory_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "_script_file", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert script_commit() is None


def test_script_digest_is_that_of_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.py"
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(path), raising=False)
    assert script_digest() is None
    path.write_text("a")
    first = script_digest()
    path.write_text("b")
    assert None not in (first, script_digest())
    assert script_digest() != first


@pytest.mark.parametrize("launcher", ["ipykernel_launcher.py", "colab_kernel_launcher.py"])
def test_notebook_has_no_random_arguments(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [f"/x/{launcher}", "-f", "/x/kernel-0e1d2c.json"])
    assert script_arguments() == [f"/x/{launcher}"]


def test_odd_arguments_are_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["", os.fsdecode(b"\xff"), Path("x"), 3])
    assert script_arguments() == ["", r"\udcff", "x", "3"]
    monkeypatch.delattr(sys, "argv")
    assert script_arguments() == []


def test_long_arguments_are_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [f"shard-{i:05}.tar" for i in range(10_000)]
    found = []
    for last in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["train.py", "x" * 5000, *files, last])
        found.append(script_arguments())
    assert sum(map(len, found[0])) < 13_000
    assert found[0][1].startswith("x" * 1000 + "... (5000 characters, digest ")
    assert found[0][:-1] == found[1][:-1]
    assert found[0][-1] != found[1][-1]


def test_ignored_child_signal_is_no_error(repository: Path) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert commit_of(repository) is not None
    finally:
        signal.signal(signal.SIGCHLD, before)
