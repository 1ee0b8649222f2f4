"""README's loop prints what README says, when it is run as README says."""

import re
import subprocess
import sys
from pathlib import Path

from tests.harness import REPOSITORY, environment

_BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_readme_loop_diverges_as_shown(tmp_path: Path) -> None:
    blocks = _BLOCK.findall((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    position = next(i for i, (kind, text) in enumerate(blocks) if kind == "python" and text.startswith("# loop.py"))
    (tmp_path / "loop.py").write_text(blocks[position][1], encoding="utf-8")
    kind, shown = blocks[position + 1]
    assert kind == "text"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "loop.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    for line in shown.splitlines():
        assert line in done.stderr.splitlines(), done.stderr
