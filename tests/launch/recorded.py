"""A fake `dreplica` command that records how it was called."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

_PROGRAM = """#!{python}
import json, os, sys
from pathlib import Path
path = Path({folder!r}) / f"call-{{os.getpid()}}.json"
seen = {{"grace": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT"), "cwd": os.getcwd()}}
path.with_suffix(".part").write_text(json.dumps([sys.argv[1:], seen]))
path.with_suffix(".part").rename(path)
sys.exit({code})
"""


@dataclass(frozen=True)
class Calls:
    """Calls of a `dreplica` command that exits with `code`."""

    folder: Path
    code: int = 0

    def environment(self, path: str) -> dict[str, str]:
        """Return the variables that put the command first on `path`."""
        self.folder.mkdir(exist_ok=True)
        program = self.folder / "dreplica"
        program.write_text(_PROGRAM.format(python=sys.executable, folder=str(self.folder), code=self.code))
        program.chmod(0o755)
        return {"PATH": f"{self.folder}:{path}", "VIRTUAL_ENV": sys.prefix}

    def read(self) -> list[dict[str, str]]:
        """Return the arguments and environment of each call, in the order of node ranks."""
        calls = []
        for path in self.folder.glob("call-*.json"):
            (command, *arguments), seen = json.loads(path.read_text())
            calls.append({"command": command, **dict(zip(arguments[::2], arguments[1::2], strict=True)), **seen})
        return sorted(calls, key=lambda call: int(call["--node-rank"]))

    def read_arguments(self) -> list[str]:
        """Return the arguments of the only call."""
        (path,) = self.folder.glob("call-*.json")
        arguments: list[str] = json.loads(path.read_text())[0]
        return arguments
