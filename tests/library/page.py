"""The examples of a page: its blocks of Python and their documented output."""

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A block of Python, with the block of text that it prints on rank 0, if one follows."""

    code: str
    output: str
    """The documented output. Empty if there is none; only its end if the first line is `...`."""

    def prints(self, output: str) -> bool:
        """Return True if `output` is the documented output."""
        if self.output.startswith("...\n"):
            return output.endswith(self.output.removeprefix("...\n"))
        return output == self.output


def examples_of(page: Path) -> tuple[str, list[Example]]:
    """Return the block that all examples begin with, and the examples."""
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    examples: list[Example] = []
    for kind, text in blocks:
        if kind == "python":
            examples.append(Example(text, ""))
        else:
            examples[-1] = Example(examples[-1].code, text)
    return examples[0].code, examples[1:]


def run(beginning: str, example: Example) -> str:
    """Run an example after the beginning, in a new namespace, and return what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(beginning + example.code, "<page>", "exec"), {"__name__": "page"})
    return printed.getvalue()
