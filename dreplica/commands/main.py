"""The `dreplica` command."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from dreplica.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from dreplica.distributed.launch.launcher import Nodes

_INTERRUPTED = "error: interrupted"
_SETTINGS = "[--config FILE] [--section.key VALUE ...]"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Function = Callable[[argparse.Namespace, Sequence[str]], int]
"""Of what was parsed and the settings that were left; returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a `dreplica` command and returns its exit code."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one Ctrl-C often follows another, and nothing is left to stop
        print(_INTERRUPTED, file=sys.stderr)
        return ExitCode.FAILED


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser("dreplica", description="Train replicas in lock-step and compare every bit.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_training_commands(commands)
    _add_plain_commands(commands)
    known, settings = parser.parse_known_args(argv)
    command = commands.choices[known.command]
    try:
        if not known.takes_settings and settings:
            command.error(f"unrecognized arguments: {' '.join(settings)}")
        code = _print_help(command) if known.takes_settings and known.help else known.function(known, settings)
        sys.stdout.flush()
        return code
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.UNUSABLE
    except BrokenPipeError:  # whoever reads has enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED


# ---- Commands that train, and take the settings of a run


def _add_training_commands(commands: Commands) -> None:
    train = _add_training(commands, "train", "train replicas: torchrun without typing it", _train)
    _add_nodes(train)

    text = "train a job again and again for a chosen time, and name the cards that compute wrongly"
    burn_in = _add_training(commands, "burn-in", text, _burn_in, "all GPUs of the machine, but at least 2")
    burn_in.add_argument("--for", dest="duration", metavar="TIME", help="how long: 90s, 30m, 8h")
    burn_in.add_argument("--json", action="store_true", help="print what was found as JSON instead of tables")
    burn_in.set_defaults(replicas=None)
    _add_nodes(burn_in)

    bench = _add_training(commands, "bench", "measure what the trainer and its checks cost on a config", _bench)
    bench.add_argument("--rounds", type=_positive, default=12, help="alternating rounds (default: 12)")
    text = "timed steps of each loop in a round (default: 4, or as many as fit into an epoch)"
    bench.add_argument("--steps", type=_positive, default=None, help=text)

    text = "which determinism flags a job needs, and what each costs: the smallest set with which it agrees"
    flags = _add_training(commands, "flags", text, _flags)
    flags.add_argument("--steps", type=_positive, default=20, help="steps that each start trains (default: 20)")
    flags.add_argument("--rounds", type=_positive, default=2, help="starts in each setting (default: 2)")
    flags.add_argument("--json", action="store_true", help="print what is found as JSON")
    flags.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the traces and the output of all starts there")
    text = "seconds until a start that does not end is ended (default: 1800)"
    flags.add_argument("--timeout", type=_positive, default=1800, help=text)

    text = "prove that an interrupted run comes to what an uninterrupted one does, or name what was not restored"
    certify = _add_training(commands, "certify-resume", text, _certify)
    certify.add_argument("--at-step", type=_positive, metavar="K", help="interrupt after this step")
    certify.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the run folders there")


def _train(known: argparse.Namespace, settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.distributed.launch.launcher import launch  # it configures torchrun's logging when imported

    return launch("dreplica.worker", settings, known.replicas, _nodes(known))


def _burn_in(known: argparse.Namespace, settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.commands.burn_in.job_config import parse_duration

    if known.duration is None:
        raise UsageError("--for: it is needed: how long to go on. For instance --for 30m.")
    parse_duration(known.duration)
    nodes = _nodes(known)

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
        raise UsageError("--at-step: it is needed: the step after which to interrupt, best in mid-epoch.")
    with _importing():
        from dreplica.commands.certify_resume import certify_resume

    return certify_resume(settings, known.replicas, known.at_step, known.keep)


# ---- Commands that do not


def _add_plain_commands(commands: Commands) -> None:
    text = "run the known causes of disagreement and check what is found"
    cases = _add_command(commands, "cases", text, _cases)
    cases.add_argument("names", nargs="*", metavar="NAME", help="files in configs/cases, without .yaml (default: all)")
    cases.add_argument("--json", action="store_true", help="print results as JSON instead of a table")
    cases.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the run folders there")
    cases.add_argument("--timeout", type=_positive, default=120, help="seconds until a case is ended (default: 120)")

    text = "make report.html of what a run has recorded, also while it runs, or after it has crashed"
    report = _add_command(commands, "report", text, _report)
    report.add_argument("run", type=Path, metavar="RUN", help="the run's folder")

    text = "compare two recorded runs: the first step, stage and tensor that differ, or the proof that none does"
    compare = _add_command(commands, "compare", text, _compare)
    compare.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="a run folder, or a trace.jsonl")
    compare.add_argument("--json", action="store_true", help="print what is found as JSON")
    text = "exit with 0, too, if one run ends sooner and is the same up to there"
    compare.add_argument("--prefix", action="store_true", help=text)

    text = "look for what on this machine would break determinism; exit code 0 if strict mode would hold, 1 if not"
    doctor = _add_command(commands, "doctor", text, _doctor)
    doctor.add_argument("--json", action="store_true", help="print what was found as JSON")


def _cases(known: argparse.Namespace, _settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.commands.cases.runner import run_cases

    return run_cases(known.names, known.json, known.keep, known.timeout)


def _compare(known: argparse.Namespace, _settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.commands.compare import compare_runs

    return compare_runs(known.runs[0], known.runs[1], known.json, known.prefix)


def _doctor(known: argparse.Namespace, _settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.commands.doctor.examine import run_doctor

    return run_doctor(known.json)


def _report(known: argparse.Namespace, _settings: Sequence[str]) -> int:
    with _importing():
        from dreplica.report.html.render import write_report

    try:
        print(write_report(known.run))
    except OSError as error:
        print(f"error: the report cannot be written: {error}", file=sys.stderr)
        return ExitCode.FAILED
    return ExitCode.AGREED


# ---- What they have in common


@contextmanager
def _importing() -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once: half-way in an import, an exception may turn into any other, or none."""

    def leave(_number: int, _frame: FrameType | None) -> NoReturn:
        os.write(sys.stderr.fileno(), f"{_INTERRUPTED}\n".encode())
        os._exit(ExitCode.FAILED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _add_command(
    commands: Commands, name: str, text: str, function: Function, takes_settings: bool = False
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, add_help=not takes_settings, allow_abbrev=False)
    command.set_defaults(function=function, takes_settings=takes_settings)
    return command


def _add_training(
    commands: Commands, name: str, text: str, function: Function, replicas: str = "2"
) -> argparse.ArgumentParser:
    """`replicas`: in words, how many there are by default."""
    command = _add_command(commands, name, text, function, takes_settings=True)
    command.add_argument("-h", "--help", action="store_true", help="show this help, and every config field")
    text = f"how many replicas (default: {replicas})"
    command.add_argument("--replicas", type=_positive, default=2, metavar="N", help=text)
    return command


def _print_help(command: argparse.ArgumentParser) -> ExitCode:
    with _importing():
        from dreplica.config.help import format_help

    print(f"usage: {command.prog} [--replicas N] {_SETTINGS}\n")
    print(command.format_help().split("\n\n", 1)[1])
    print(format_help("dreplica"))
    return ExitCode.AGREED


def _add_nodes(command: argparse.ArgumentParser) -> None:
    """Options of one that may be spread over machines."""
    command.add_argument("--nodes", type=_positive, default=1, metavar="N", help="how many machines (default: 1)")
    command.add_argument("--node-rank", type=int, default=None, metavar="K", help="which of them this is, from 0")
    command.add_argument("--head", default=None, metavar="HOST:PORT", help="where they meet: an address of machine 0")


def _nodes(known: argparse.Namespace) -> "Nodes | None":
    """Raises UsageError."""
    from dreplica.distributed.launch.launcher import Nodes

    if known.nodes == 1:
        return None
    example = f"--nodes {known.nodes} --node-rank 0 --head node0:29500"
    if known.node_rank is None or not 0 <= known.node_rank < known.nodes:
        raise UsageError(
            f"--node-rank: {known.node_rank} will not do: expected 0 to {known.nodes - 1}, another on each of "
            f"the {known.nodes} machines. For instance {example}."
        )
    host, _, port = (known.head or "").rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(
            f"--head: {known.head} will not do: expected HOST:PORT, an address of machine 0 that all machines reach. "
            f"For instance {example}."
        )
    return Nodes(known.nodes, known.node_rank, known.head)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} will not do: expected a positive whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
