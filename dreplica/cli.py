"""The `dreplica` command."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dreplica.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from dreplica.launcher import Nodes

_SETTINGS = "[--config FILE] [--section.key VALUE ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a `dreplica` command and returns its exit code."""
    parser = argparse.ArgumentParser("dreplica", description="Train replicas in lock-step and compare every bit.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _add_command(commands, "train", "train replicas: torchrun without typing it")
    train.set_defaults(module="dreplica.worker")
    _add_nodes(train)

    text = "train a job again and again for a chosen time, and name the cards that compute wrongly"
    burn_in = _add_command(commands, "burn-in", text, "all GPUs of the machine, but at least 2")
    burn_in.add_argument("--for", dest="duration", metavar="TIME", help="how long: 90s, 30m, 8h")
    burn_in.add_argument("--json", action="store_true", help="print what was found as JSON instead of tables")
    burn_in.set_defaults(module="dreplica.burn_in.worker", replicas=None)
    _add_nodes(burn_in)

    bench = _add_command(commands, "bench", "measure what the trainer and its checks cost on a config")
    bench.add_argument("--rounds", type=_positive, default=12, help="alternating rounds (default: 12)")
    bench.add_argument(
        "--steps",
        type=_positive,
        default=None,
        help="timed steps of each loop in a round (default: 4, or as many as fit into an epoch)",
    )
    bench.set_defaults(module="dreplica.bench")

    text = "which determinism flags a job needs, and what each costs: the smallest set with which it agrees"
    flags = _add_command(commands, "flags", text)
    flags.add_argument("--steps", type=_positive, default=20, help="steps that each start trains (default: 20)")
    flags.add_argument("--rounds", type=_positive, default=2, help="starts in each setting (default: 2)")
    flags.add_argument("--json", action="store_true", help="print what is found as JSON")
    flags.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the traces and the output of all starts there")
    flags.add_argument(
        "--timeout",
        type=_positive,
        default=1800,
        help="seconds until a start that does not end is ended (default: 1800)",
    )

    text = "run the known causes of disagreement and check what is found"
    cases = _add_plain_command(commands, "cases", text, _cases)
    cases.add_argument("names", nargs="*", metavar="NAME", help="files in configs/cases, without .yaml (default: all)")
    cases.add_argument("--json", action="store_true", help="print results as JSON instead of a table")
    cases.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the run folders there")
    cases.add_argument("--timeout", type=_positive, default=120, help="seconds until a case is ended (default: 120)")

    text = "prove that an interrupted run comes to what an uninterrupted one does, or name what was not restored"
    certify = _add_command(commands, "certify-resume", text)
    certify.add_argument("--at-step", type=_positive, metavar="K", help="interrupt after this step")
    certify.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the run folders there")

    text = "make report.html of what a run has recorded, also while it runs, or after it has crashed"
    report = _add_plain_command(commands, "report", text, _report)
    report.add_argument("run", type=Path, metavar="RUN", help="the run's folder")

    text = "compare two recorded runs: the first step, stage and tensor that differ, or the proof that none does"
    compare = _add_plain_command(commands, "compare", text, _compare)
    compare.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="a run folder, or a trace.jsonl")
    compare.add_argument("--json", action="store_true", help="print what is found as JSON")
    compare.add_argument(
        "--prefix", action="store_true", help="exit with 0, too, if one run ends sooner and is the same up to there"
    )

    text = "look for what on this machine would break determinism; exit code 0 if strict mode would hold, 1 if not"
    doctor = _add_plain_command(commands, "doctor", text, _doctor)
    doctor.add_argument("--json", action="store_true", help="print what was found as JSON")

    argv = sys.argv[1:] if argv is None else argv
    known, settings = parser.parse_known_args(argv)
    if known.function is not None:
        if settings:
            commands.choices[known.command].error(f"unrecognized arguments: {' '.join(settings)}")
        return _told(lambda: known.function(known))
    if known.help:
        from dreplica.config import format_help

        print(f"usage: dreplica {known.command} [--replicas N] {_SETTINGS}\n")
        print(commands.choices[known.command].format_help().split("\n\n", 1)[1])
        print(format_help("dreplica"))
        return ExitCode.AGREED
    if known.command == "certify-resume":
        if known.at_step is None:
            certify.error("--at-step K is needed: the step after which to interrupt, best in mid-epoch")
        from dreplica.certify import certify_resume

        return certify_resume(settings, known.replicas, known.at_step, known.keep)
    if known.command == "flags":
        from dreplica.flags.command import find_flags

        options = known.steps, known.rounds, known.json, known.keep, known.timeout
        return _told(lambda: find_flags(settings, known.replicas, *options))
    if known.command == "bench":
        steps = [] if known.steps is None else [f"--steps={known.steps}"]
        settings = [f"--rounds={known.rounds}", *steps, *settings]
    if known.command == "burn-in":
        return _told(lambda: _burn_in(known, settings))

    from dreplica.launcher import launch  # it configures torchrun's logging when imported

    return _told(lambda: launch(known.module, settings, known.replicas, _nodes(known)))


def _told(action: Callable[[], int]) -> int:
    """The action's exit code; a UsageError is printed."""
    try:
        return action()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.UNUSABLE


def _add_plain_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    text: str,
    function: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    """One that takes no settings of a run."""
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(function=function)
    return command


def _burn_in(known: argparse.Namespace, settings: Sequence[str]) -> int:
    from dreplica.burn_in.duration import parse_duration

    if known.duration is None:
        raise UsageError("--for: it is needed: how long to go on. For instance --for 30m.")
    parse_duration(known.duration)
    nodes = _nodes(known)

    import torch

    from dreplica.launcher import launch

    num_gpus = torch.cuda.device_count()
    num_replicas = known.replicas or (num_gpus if nodes is not None and num_gpus else max(num_gpus, 2))
    options = [f"--for={known.duration}", *(["--json"] if known.json else [])]
    return launch(known.module, [*options, *settings], num_replicas, nodes)


def _cases(known: argparse.Namespace) -> int:
    from dreplica.cases.runner import run_cases

    return run_cases(known.names, known.json, known.keep, known.timeout)


def _compare(known: argparse.Namespace) -> int:
    from dreplica.compare import compare_runs

    return compare_runs(known.runs[0], known.runs[1], known.json, known.prefix)


def _doctor(known: argparse.Namespace) -> int:
    from dreplica.doctor.examine import run_doctor

    return run_doctor(known.json)


def _report(known: argparse.Namespace) -> int:
    from dreplica.report.html import write_report

    try:
        print(write_report(known.run))
    except OSError as error:
        print(f"error: the report cannot be written: {error}", file=sys.stderr)
        return ExitCode.FAILED
    return ExitCode.AGREED


def _add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str, replicas: str = "2"
) -> argparse.ArgumentParser:
    """One that takes settings of a run. `replicas`: in words, how many there are by default."""
    command = commands.add_parser(name, help=text, description=text, add_help=False, allow_abbrev=False)
    command.set_defaults(function=None)
    command.add_argument("-h", "--help", action="store_true", help="show this help, and every config field")
    help_text = f"how many replicas (default: {replicas})"
    command.add_argument("--replicas", type=_positive, default=2, metavar="N", help=help_text)
    return command


def _add_nodes(command: argparse.ArgumentParser) -> None:
    """Options of one that may be spread over machines."""
    command.add_argument("--nodes", type=_positive, default=1, metavar="N", help="how many machines (default: 1)")
    command.add_argument("--node-rank", type=int, default=None, metavar="K", help="which of them this is, from 0")
    command.add_argument("--head", default=None, metavar="HOST:PORT", help="where they meet: an address of machine 0")


def _nodes(known: argparse.Namespace) -> "Nodes | None":
    """Raises UsageError."""
    from dreplica.launcher import Nodes

    if getattr(known, "nodes", 1) == 1:
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
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} will not do: expected a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
