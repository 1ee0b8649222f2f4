"""Parsers and options that several commands share."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from dreplica.config.messages import COMMAND_LINE, closest, config_error, empty_config, invalid_value
from dreplica.distributed.launch.environment import MAX_PORT, detect_launch, is_port
from dreplica.errors import UsageError

if TYPE_CHECKING:
    from dreplica.distributed.launch.launcher import Nodes

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
Handler = Callable[[argparse.Namespace, Sequence[str]], int]
"""Function that runs a command: takes the parsed options and the remaining settings, returns the exit code."""

_NODE_OPTIONS = ("--nodes", "--node-rank", "--head")


class Parser(argparse.ArgumentParser):
    """Parser that raises `UsageError` for arguments that it cannot use, instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        """Raise the error of a command line that this parser cannot use."""
        text = re.sub(r"^argument (\S+?): ", r"\1: ", message)
        text = re.sub(r": invalid int value: (?=')", ": expected an integer, got ", text)
        text = re.sub(r": ignored explicit argument (?=')", ": takes no value, got ", text)
        text += "" if text.endswith(("?", ".")) else "."
        raise UsageError(f"{text} See `{self.prog} --help`.", code="invalid-arguments", command=self.prog)


def add_command(commands: Commands, name: str, text: str, handler: Handler) -> argparse.ArgumentParser:
    """Add a command that takes no settings of a run.

    Args:
        commands: The parsers to add it to.
        name: Name of the command.
        text: Help text.
        handler: Function that runs it.
    """
    return _add(commands, name, text, handler, takes_settings=False)


def add_training_command(
    commands: Commands, name: str, text: str, handler: Handler, replicas: str = "2"
) -> argparse.ArgumentParser:
    """Add a command that trains replicas and takes `--config FILE` and `--section.key VALUE`.

    Args:
        commands: The parsers to add it to.
        name: Name of the command.
        text: Help text.
        handler: Function that runs it.
        replicas: Default number of replicas, as text.
    """
    command = _add(commands, name, text, handler, takes_settings=True)
    text = "show this help and every config field, or only those of one section, such as optim"
    command.add_argument("-h", "--help", nargs="?", const="", metavar="SECTION", help=text)
    text = f"number of replicas (default: {replicas})"
    command.add_argument("--replicas", type=positive_int, default=2, metavar="N", help=text)
    return command


def _add(commands: Commands, name: str, text: str, handler: Handler, takes_settings: bool) -> argparse.ArgumentParser:
    description = f"{text[0].upper()}{text[1:]}."
    command = commands.add_parser(
        name, help=text, description=description, add_help=not takes_settings, allow_abbrev=False
    )
    command.set_defaults(handler=handler, takes_settings=takes_settings)
    return command


def add_node_options(command: argparse.ArgumentParser) -> None:
    """Add the options of a command that can run on several nodes."""
    command.add_argument("--nodes", type=positive_int, default=None, metavar="N", help="number of nodes (default: 1)")
    command.add_argument("--node-rank", type=int, default=None, metavar="K", help="rank of this node, from 0")
    text = "address of node 0 at which the nodes rendezvous"
    command.add_argument("--head", default=None, metavar="HOST:PORT", help=text)


def read_nodes(known: argparse.Namespace, settings: Sequence[str] = ()) -> "Nodes | None":
    """Return the nodes that the options of `add_node_options` ask for, or None for one node.

    Args:
        known: The options.
        settings: The settings of the run, of which `world.timeout` limits the wait for the other nodes.

    Raises:
        UsageError: An option is missing or invalid.
    """
    from dreplica.config.load import world_timeout
    from dreplica.distributed.launch.launcher import Nodes

    if known.nodes is None:
        for option, value in (("--node-rank", known.node_rank), ("--head", known.head)):
            if value is not None:
                fix = f"For example: --nodes 2 --node-rank 0 --head node0:29500. Omit {option} to run on one node."
                raise config_error("missing-value", "--nodes", f"required with {option}", fix)
        return None
    if known.nodes == 1 and known.node_rank in (None, 0):
        return None
    last = known.nodes - 1
    example = f"For example: --nodes {known.nodes} --node-rank 0 --head node0:29500."
    if known.node_rank is None:
        fix = f"Pass a different value from 0 to {last} on each node. {example}"
        raise config_error("missing-value", "--node-rank", f"required with --nodes {known.nodes}", fix)
    if not 0 <= known.node_rank <= last:
        fix = f"Pass a different value on each node. {example}"
        expected = f"a value from 0 to {last}" if last else "0 with --nodes 1"
        raise invalid_value("--node-rank", known.node_rank, expected, fix)
    host, _, port = (known.head or "").rpartition(":")
    if known.head is None:
        fix = f"Pass an address of node 0 that all nodes reach. {example}"
        raise config_error("missing-value", "--head", f"required with --nodes {known.nodes}", fix)
    if not host or not is_port(port):
        expected = f"HOST:PORT, an address of node 0 that all nodes reach, with a port from 1 to {MAX_PORT}"
        raise invalid_value("--head", known.head, expected, example)
    return Nodes(known.nodes, known.node_rank, known.head, world_timeout(settings))


def check_single_launch(command: argparse.ArgumentParser, nodes: int | None) -> None:
    """Check that srun, mpirun or a batch system did not start this command several times without `--nodes`.

    Each command would start a separate run, all with the same name.

    Args:
        command: The command.
        nodes: The value of `--nodes`, if given.

    Raises:
        UsageError: One did.
    """
    launch = detect_launch(os.environ)
    if launch.is_alone or nodes is not None:
        return
    name = command.prog
    if "--nodes" in option_names(command):
        head = f"{launch.host or 'HOST'}:{launch.port or 29500}"
        fix = f"Add `--nodes {launch.size} --node-rank {launch.rank} --head {head}` with a different rank on each node"
    else:
        fix = "Start it once"
    text = (
        f"{launch.origin}, so that this is one of {launch.size} runs of `{name}`, independent of the others. {fix}, or "
        f"unset {launch.rank_variable}{' and WORLD_SIZE' if launch.rank_variable == 'RANK' else ''} to run it alone."
    )
    raise UsageError(text, code="several-launches", size=launch.size, launcher=launch.launcher)


def path_argument(text: str) -> Path:
    """Convert the value of an option to a path, which must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def positive_int(text: str) -> int:
    """Convert the value of an option to a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def option_names(command: argparse.ArgumentParser) -> list[str]:
    """Return the long options of a command."""
    return [option for action in command._actions for option in action.option_strings if option.startswith("--")]


def suggest_option(token: str, command: argparse.ArgumentParser) -> str:
    """Return a hint for a mistyped option, or an empty string."""
    match = closest(token.partition("=")[0], option_names(command)) if token.startswith("--") else None
    return "" if match is None else f"Did you mean {match}?"


def check_settings(settings: Sequence[str], command: argparse.ArgumentParser) -> None:
    """Check that no setting is a mistyped option of the command, as in `--replica 3`.

    An empty `--config`, or an option for several nodes where the command runs on one, is an error too. All other
    settings are checked by the processes that load the config.

    Raises:
        UsageError: One is.
    """
    for index, token in enumerate(settings):
        option, equals, value = token.partition("=")
        if not option.startswith("--") or "." in option:
            continue
        if option in _NODE_OPTIONS:
            name = command.prog.rpartition(" ")[2]
            problem, fix = f"{name} runs on one node", f"Remove {option}."
            raise config_error("unknown-option", option, problem, fix, source=COMMAND_LINE)
        if not equals:
            if option == "--config" and settings[index + 1 : index + 2] == [""]:
                raise empty_config()
            value = settings[index + 1] if index + 1 < len(settings) else ""
        elif option == "--config" and not value:
            raise empty_config()
        if value.startswith(("{", "[")) or value in {"null", "~"}:
            continue  # a whole section as YAML
        match = closest(option, option_names(command), cutoff=0.85)
        if match is not None:
            hint = f"Did you mean {match}?"
            raise config_error("unknown-option", option, "unknown option", hint, source=COMMAND_LINE)
