"""The examples of a page: its blocks of Python, and what the page says they print."""

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A block of Python and, if one follows, the block of text that it prints on rank 0."""

    code: str
    output: str
    """Empty without such a block; after a first line `...`, only the end of it."""

    def prints(self, output: str) -> bool:
        """Whether that is what the page says."""
        if self.output.startswith("...\n"):
            return output.endswith(self.output.removeprefix("...\n"))
        return output == self.output


def examples_of(page: Path) -> tuple[str, list[Example]]:
    """The block that all others begin with, and those."""
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    examples: list[Example] = []
    for kind, text in blocks:
        if kind == "python":
            examples.append(Example(text, ""))
        else:
            examples[-1] = Example(examples[-1].code, text)
    return examples[0].code, examples[1:]


def run(beginning: str, example: Example) -> str:
    """What it prints, after the beginning, in a namespace of its own."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(beginning + example.code, "<page>", "exec"), {"__name__": "page"})
    return printed.getvalue()
