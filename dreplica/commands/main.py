"""The `dreplica` command.

Handlers import what they run, so that `--help`, `--version` and `compare` need neither torch nor seconds.
"""

import argparse
import os
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from dreplica import __version__
from dreplica.commands.options import (
    Commands,
    Parser,
    add_command,
    add_node_options,
    add_training_command,
    check_settings,
    check_single_launch,
    path_argument,
    positive_int,
    read_nodes,
    suggest_option,
)
from dreplica.config.messages import config_error, nearest
from dreplica.config.paths import CAUSES_FOLDER
from dreplica.errors import DreplicaError, ExitCode, UsageError
from dreplica.state.fingerprint.stage import STAGES

_INTERRUPTED = "error: interrupted"
_SETTINGS = "[--config FILE] [--section.key VALUE ...]"
_DESCRIPTION = "Prove that training reproduces bit for bit, and name the cause when it does not."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a `dreplica` command and return its exit code."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C often follows, and nothing is left to stop
        print(_INTERRUPTED, file=sys.stderr)
        return ExitCode.FAILED


def _run(argv: list[str]) -> int:
    parser = Parser("dreplica", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"dreplica {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_training_commands(commands)
    _add_plain_commands(commands)
    if not argv:
        parser.print_help(sys.stderr)
        return ExitCode.UNUSABLE
    try:
        if not argv[0].startswith("-") and argv[0] not in commands.choices:
            hint = nearest(argv[0], commands.choices)
            raise UsageError(f"unknown command {argv[0]!r}. {hint}", code="unknown-command", value=argv[0])
        known, settings = parser.parse_known_args(argv)
        if known.command is None:
            _refuse(parser, settings)
        code = _run_command(commands.choices[known.command], known, settings)
        sys.stdout.flush()
        return code
    except DreplicaError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.UNUSABLE if isinstance(error, UsageError) else ExitCode.FAILED
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED


def _run_command(command: argparse.ArgumentParser, known: argparse.Namespace, settings: Sequence[str]) -> int:
    if not known.takes_settings:
        if settings:
            _refuse(command, settings)
    elif known.help is not None:
        return _print_help(command, known.help)
    else:
        check_settings(settings, command)
        check_single_launch(command, getattr(known, "nodes", None))
    return known.handler(known, settings)


def _refuse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> NoReturn:
    """Raise an error about arguments that do not exist, with hints for mistyped options."""
    hints = [hint for token in arguments if (hint := suggest_option(token, parser))]
    parser.error(". ".join([f"unrecognized arguments: {' '.join(arguments)}", *hints]))


def _print_help(command: argparse.ArgumentParser, section: str) -> ExitCode:
    with _importing():
        from dreplica.config.help import format_help

    if section:
        print(format_help(command.prog, section))
        return ExitCode.AGREED
    command.usage = f"{command.prog} [--replicas N] {_SETTINGS}"
    print(command.format_help())
    print(format_help(None))
    return ExitCode.AGREED


# ---- Commands that train replicas and take the settings of a run


def _add_training_commands(commands: Commands) -> None:
    train = add_training_command(commands, "train", "train replicas and compare them at every step", _train)
    add_node_options(train)

    text = "train the same job repeatedly for a given time, and name the GPUs that compute wrong results"
    burn_in = add_training_command(commands, "burn-in", text, _burn_in, "all GPUs of the node, at least 2")
    burn_in.add_argument("--for", dest="duration", metavar="TIME", help="duration, such as 90s, 30m or 8h (required)")
    burn_in.add_argument("--json", action="store_true", help="print the results as JSON")
    burn_in.set_defaults(replicas=None)
    add_node_options(burn_in)

    bench = add_training_command(commands, "bench", "measure the overhead of the trainer and its checks", _bench)
    bench.add_argument("--rounds", type=positive_int, default=12, help="number of alternating rounds (default: 12)")
    text = "timed steps of each loop per round (default: 4, or as many as an epoch has)"
    bench.add_argument("--steps", type=positive_int, default=None, help=text)

    text = "find the smallest set of determinism flags with which a job reproduces, and the cost of each flag"
    flags = add_training_command(commands, "flags", text, _flags)
    flags.add_argument("--steps", type=positive_int, default=20, help="training steps per start (default: 20)")
    flags.add_argument("--rounds", type=positive_int, default=2, help="starts per setting (default: 2)")
    flags.add_argument("--json", action="store_true", help="print the results as JSON")
    flags.add_argument(
        "--keep", type=path_argument, metavar="FOLDER", help="keep the traces and output of all starts here"
    )
    text = "seconds after which a start is killed (default: 1800)"
    flags.add_argument("--timeout", type=positive_int, default=1800, help=text)

    text = "prove that an interrupted and resumed run equals an uninterrupted one, or name what was not restored"
    certify = add_training_command(commands, "certify-resume", text, _certify)
    certify.add_argument("--at-step", type=positive_int, metavar="K", help="interrupt after this step (required)")
    certify.add_argument("--keep", type=path_argument, metavar="FOLDER", help="keep the run folders here")


def _train(known: argparse.Namespace, settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.distributed.launch.launcher import launch  # configures torchrun's logging when imported

    return launch("dreplica.worker", settings, known.replicas, read_nodes(known, settings))


def _burn_in(known: argparse.Namespace, settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.commands.burn_in.job_config import parse_duration

    if known.duration is None:
        raise config_error("missing-value", "--for", "a duration is required", "For example: --for 30m.")
    parse_duration(known.duration)
    nodes = read_nodes(known, settings)

    with _importing():
        import torch

        from dreplica.distributed.launch.launcher import launch

    num_gpus = torch.cuda.device_count()
    num_replicas = known.replicas or (num_gpus if nodes is not None and num_gpus else max(num_gpus, 2))
    options = [f"--for={known.duration}", *(["--json"] if known.json else [])]
    return launch("dreplica.commands.burn_in", [*options, *settings], num_replicas, nodes)


def _bench(known: argparse.Namespace, settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.distributed.launch.launcher import launch

    steps = [] if known.steps is None else [f"--steps={known.steps}"]
    return launch("dreplica.commands.bench", [f"--rounds={known.rounds}", *steps, *settings], known.replicas)


def _flags(known: argparse.Namespace, settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.commands.flags.command import find_flags

    return find_flags(settings, known.replicas, known.steps, known.rounds, known.json, known.keep, known.timeout)


def _certify(known: argparse.Namespace, settings: Sequence[str]) -> int:
    if known.at_step is None:
        fix = "Pass the step after which to interrupt, best one within an epoch."
        raise config_error("missing-value", "--at-step", "a step is required", fix)
    with _importing():
        from dreplica.commands.certify_resume import certify_resume

    return certify_resume(settings, known.replicas, known.at_step, known.keep)


# ---- Commands without settings


def _add_plain_commands(commands: Commands) -> None:
    cases = add_command(commands, "cases", "run configs with known causes, and check that each is named", _cases)
    text = "cases to run, such as clean or flipped_weight (default: all)"
    cases.add_argument("names", nargs="*", metavar="NAME", help=text)
    cases.add_argument("--json", action="store_true", help="print the results as JSON")
    cases.add_argument("--keep", type=path_argument, metavar="FOLDER", help="keep the run folders here")
    text = "seconds after which a case is killed (default: 120)"
    cases.add_argument("--timeout", type=positive_int, default=120, help=text)

    text = "compare two recorded runs, and name the first step, stage and tensor that differ"
    compare = add_command(commands, "compare", text, _compare)
    compare.add_argument("runs", nargs=2, type=path_argument, metavar="RUN", help="run folder, or trace.jsonl")
    compare.add_argument("--json", action="store_true", help="print the results as JSON")
    text = "exit with 0 if one run is shorter and equal to the beginning of the other"
    compare.add_argument("--prefix", action="store_true", help=text)

    text = "write report.html from what a run has recorded, also while it runs or after it crashed"
    report = add_command(commands, "report", text, _report)
    report.add_argument("run", type=path_argument, metavar="RUN", help="run folder")

    text = "explain a cause that a verdict names, or a stage in which two runs first differ, and how to fix it"
    explain = add_command(commands, "explain", text, _explain)
    text = "name of the cause, such as batch-differs, or of the stage, such as batch"
    explain.add_argument("name", metavar="CAUSE|STAGE", help=text)
    causes = ", ".join(sorted(path.stem for path in CAUSES_FOLDER.glob("*.md")))
    lists = (f"Causes: {causes}.", f"Stages: {', '.join(('build', *STAGES))}.")
    explain.epilog = "\n\n".join(textwrap.fill(text, break_on_hyphens=False) for text in lists)
    explain.formatter_class = argparse.RawDescriptionHelpFormatter

    text = "look for settings of this machine that break determinism (exit code 1 if there is one)"
    doctor = add_command(commands, "doctor", text, _doctor)
    doctor.add_argument("--json", action="store_true", help="print the results as JSON")


def _cases(known: argparse.Namespace, _settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.commands.cases.runner import run_cases

    return run_cases(known.names, known.json, known.keep, known.timeout)


def _compare(known: argparse.Namespace, _settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.commands.compare import compare_runs

    return compare_runs(known.runs[0], known.runs[1], known.json, known.prefix)


def _report(known: argparse.Namespace, _settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.agreement.trace.run_report import ReportError, RunReport
        from dreplica.report.html.render import write_report

    try:
        print(write_report(known.run))
        RunReport.read_valid_parts(known.run)
    except OSError as error:
        print(f"error: cannot write the report: {error}", file=sys.stderr)
        return ExitCode.FAILED
    except ReportError as error:
        if error.code != "no-report":
            print(f"error: {error}. The page shows the other files of {str(known.run)!r}.", file=sys.stderr)
            return ExitCode.UNUSABLE
    return ExitCode.AGREED


def _explain(known: argparse.Namespace, _settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.commands.explain import explain

    return explain(known.name)


def _doctor(known: argparse.Namespace, _settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.commands.doctor.examine import run_doctor

    return run_doctor(known.json)


@contextmanager
def _importing() -> Iterator[None]:
    """End the process at once on Ctrl-C inside the block: within an import, KeyboardInterrupt may be swallowed."""

    def leave(_number: int, _frame: FrameType | None) -> NoReturn:
        os.write(sys.stderr.fileno(), f"{_INTERRUPTED}\n".encode())
        os._exit(ExitCode.FAILED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
