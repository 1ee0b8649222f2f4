"""The examples of the page on sharded training, run on 4 processes: they print what the page shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import REPOSITORY, environment

PAGE = (REPOSITORY / "docs" / "sharded_training.md").read_text(encoding="utf-8")
SCRIPTS = {
    text.split("\n")[0].removeprefix("# "): text for text in re.findall(r"```python\n(# .*?)```", PAGE, re.DOTALL)
}
OUTPUTS = dict(re.findall(r"```text\n\$ torchrun --standalone --nproc_per_node=4 (\S+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.mark.process
@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_example_prints_what_the_page_shows(name: str, tmp_path: Path) -> None:
    script = tmp_path / name
    script.write_text(SCRIPTS[name], encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), check=False)
    printed = re.sub(r"^\[rank0\]: ", "", done.stdout + done.stderr, flags=re.MULTILINE)
    assert OUTPUTS[name] in printed, printed
    assert (done.returncode == 0) == ("AGREED" in OUTPUTS[name])


def test_every_script_has_an_output() -> None:
    assert len(SCRIPTS) == 3
    assert SCRIPTS.keys() == OUTPUTS.keys()
