"""Printing never ends a run: neither a closed pipe nor a limited encoding does."""

import subprocess
import sys

PRINT = """
from dreplica.report.record.terminal import Screen
screen = Screen()
for number in range(20000):
    screen.print(f"line {number} \\u2026 \\u2713")
import sys
sys.stderr.write("continued")
"""


def test_closed_pipe_does_not_end_the_run() -> None:
    process = subprocess.Popen([sys.executable, "-c", PRINT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("line 0")
    process.stdout.close()
    assert process.stderr.read() == "continued"
    assert process.wait() == 0


def test_unencodable_characters_are_replaced() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PRINT], capture_output=True, env={"PYTHONIOENCODING": "ascii"}, check=True
    )
    assert result.stdout.startswith(b"line 0 ? ?\n")
    assert result.stderr == b"continued"
