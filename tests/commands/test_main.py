"""The `dreplica` command: help, version, hints for mistyped input, and interrupts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dreplica
from dreplica.agreement.trace.run_report import ReportError
from dreplica.commands.main import main
from dreplica.errors import DreplicaError, UsageError
from tests.harness import REPOSITORY, environment


@pytest.mark.parametrize("name", ["train", "burn-in", "bench", "flags", "certify-resume"])
def test_training_command_help_lists_options_and_settings(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: dreplica {name} [--replicas N] [--config FILE]")
    assert "--replicas N" in printed.split("usage:")[1].partition("\n")[2]
    assert "--data.batch_size" in printed


def test_plain_command_refuses_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--train.epochs=2"]) == 2
    text = "error: unrecognized arguments: --train.epochs=2. See `dreplica doctor --help`.\n"
    assert capsys.readouterr().err == text


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"dreplica {dreplica.__version__}\n"


def test_no_command_prints_short_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("usage: dreplica [-h] [--version] COMMAND")
    for name in ("train", "burn-in", "cases", "compare"):
        assert f"\n    {name} " in printed


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["tarin"], "unknown command 'tarin'. Did you mean 'train'?"),
        (["burnin", "--for", "1m"], "unknown command 'burnin'. Did you mean 'burn-in'?"),
        (["xyz"], "unknown command 'xyz'. Choose one of: bench, burn-in, cases, "),
    ],
)
def test_unknown_command_error_suggests_nearest(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {hint}")


def test_unknown_option_error_suggests_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--jsn"]) == 2
    text = "error: unrecognized arguments: --jsn. Did you mean --json? See `dreplica doctor --help`.\n"
    assert capsys.readouterr().err == text


def test_mistyped_global_option_suggests_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--verson"]) == 2
    text = "error: unrecognized arguments: --verson. Did you mean --version? See `dreplica --help`.\n"
    assert capsys.readouterr().err == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["compare"], "the following arguments are required: RUN. See `dreplica compare --help`."),
        (["explain"], "the following arguments are required: CAUSE|STAGE. See `dreplica explain --help`."),
        (["train", "--replicas"], "--replicas: expected one argument. See `dreplica train --help`."),
        (["train", "--node-rank=x"], "--node-rank: expected an integer, got 'x'. See `dreplica train --help`."),
        (["doctor", "--json=3"], "--json: takes no value, got '3'. See `dreplica doctor --help`."),
        (["compare", "a", "b", "c"], "unrecognized arguments: c. See `dreplica compare --help`."),
    ],
)
def test_invalid_arguments_are_one_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {text}\n"


@pytest.mark.parametrize(("kind", "code"), [(UsageError, 2), (ReportError, 1)])
def test_main_prints_errors_without_traceback(
    kind: type[DreplicaError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_cause: str) -> int:
        raise kind("some text")

    monkeypatch.setattr("dreplica.commands.explain.explain", fail)
    assert main(["explain", "none"]) == code
    assert capsys.readouterr().err == "error: some text\n"


@pytest.mark.parametrize(
    "arguments", [["train", "--help", "optim"], ["bench", "-h", "optim.lr"], ["train", "--help=optim"]]
)
def test_help_of_section_lists_only_its_fields(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "--optim.lr VALUE" in printed
    assert "--train.epochs" not in printed
    assert "--replicas" not in printed


@pytest.mark.parametrize(
    ("section", "hint"), [("optm", "'optm'. Did you mean 'optim'?"), ("epochs", "'epochs'. Did you mean 'train'?")]
)
def test_help_of_unknown_section_suggests_nearest(section: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help", section]) == 2
    assert capsys.readouterr().err == f"error: --help: no section {hint}\n"


def test_explain_is_registered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "batch-differs"]) == 0
    assert "# batch-differs" in capsys.readouterr().out
    assert main(["explain", "batch-difers"]) == 2
    assert "unknown cause or stage 'batch-difers'. Did you mean 'batch-differs'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "storage-shared, structure-differs" in printed
    assert "Stages: build, indices, batch, buffers," in printed


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["train", "--help"], ["train", "--help", "optim"], ["compare", "--help"]]
)
def test_help_and_version_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from dreplica.commands.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=REPOSITORY, env=environment(), check=True, capture_output=True
    )


def test_closed_pipe_ends_quietly() -> None:
    command = [sys.executable, "-m", "dreplica.commands.main", "train", "--help"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment()
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(30) == 1


@pytest.mark.parametrize(
    "command", [["train"], ["cases", "racy_sum"], ["compare", "a", "b"]], ids=lambda command: command[0]
)
def test_interrupt_while_importing_prints_one_line(command: list[str]) -> None:
    code = "import dreplica.commands.main, sys; print(flush=True); sys.exit(dreplica.commands.main.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.02)  # after argparse, while torch, NumPy or rich are imported
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "error: interrupted\n"
    assert process.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_certificate_leaves_no_process(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dreplica.commands.main", "certify-resume", "--at-step=7", "--replicas=1"]
    job = [f"--keep={tmp_path / 'kept'}", "--data.num_workers=0", "--train.epochs=1000", "--data.batch_size=8"]
    process = subprocess.Popen(
        [*command, *job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment()
    )
    log = tmp_path / "kept" / "straight.log"
    while not (log.exists() and "run folder" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    try:
        assert process.communicate(timeout=60)[1] == "error: interrupted\n"
    finally:
        process.kill()
    assert process.returncode == 1
    lines = [Path(entry.path, "cmdline") for entry in os.scandir("/proc") if entry.name.isdigit()]
    assert not [path for path in lines if path.exists() and str(tmp_path).encode() in path.read_bytes()]
