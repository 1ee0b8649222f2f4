"""Count what the style guide asks of docstrings, names and words.

Usage: `python -m tests.style [--root DIR] [--list] [PATH ...]`. Counts cover the paths, by default `dreplica`, `tests`,
`docs` and the Markdown files at the top level of `--root`. With `--list` each place is printed.

Two rules are ruff's own: D401 (imperative mood of a docstring's first line) and D417 (a missing argument).
"""

import argparse
import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FRAGMENTS = frozenset((Path(__file__).parent / "style_fragments.txt").read_text(encoding="utf-8").split())
"""First words of a docstring that is a fragment rather than a sentence."""

VERBS = frozenset((Path(__file__).parent / "style_verbs.txt").read_text(encoding="utf-8").split())
"""Verbs that begin an imperative sentence: a docstring with any other first word does not count as one."""

PHRASES = {
    "parted": r"\b(parted|part (ways|at)|parts? (replicas|from each other)|replicas part\b|parting)",
    "comes to": r"\b(comes?|came|coming) (to|out)\b(?! (an end|a stop))",
    "goes on": r"\b(goes?|going|went|gone) on\b",
    "told": r"\b(is|are|be|being|was|were|been) told\b|\btells? (of|apart)\b",
    "put back": r"\b(puts?|putting) (it |them |all |state |the state )?back\b",
    "has to say": r"\b(has|have|had) to say\b",
    "of its own": r"\bof (its|their|one's|his|your) own\b",
    "given up": r"\b(gives?|given|gave) up\b",
    "lock-step word": r"\block-step word\b",
    "stands": r"\b(stands?|stood|standing)\b(?!-?(alone|ard))",
    "all the same": r"\ball the same\b|\bfor good\b",
    "how many-th": r"\bhow many-th\b",
    "struck": r"\bstruck\b",
    "mend": r"\bmend(s|ed|ing)?\b",
    "room": r"\brooms?\b",
    "but for": r"\bbut for\b|\blikewise\b",
    "whoever": r"\b(whoever|whatever|somebody|nobody|anybody|everybody)\b",
    "will not do": r"\bwill not do\b",
    "as it is": r"\bas (it|they|he) (is|was|has|are|were|have)\b(?! \w+ed\b)",
    "by itself": r"\bby (itself|themselves|oneself)\b",
    "beside": r"\bbeside\b",
    "roll call": r"\broll[ _-]?call\b|\btakes? the roll\b",
    "joining": r"\b(meeting point|where (they|replicas) meet)\b",
    "brings about": r"\b(brings?|brought) (it |them )?about\b",
    "not to be": r"\bis not to be (trusted|had)\b",
}
"""Phrases that the style guide replaces, by name."""

TEST_NAME_LENGTH = 60
MODULE_LINES = 320


@dataclass
class Counts:
    """Counts of one tree, and the places behind them."""

    numbers: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)

    def add(self, what: str, place: str) -> None:
        """Count one finding."""
        self.numbers[what] += 1
        self.places.append(f"{place}: {what}")


def python_files(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the Python files at or below `paths`."""
    for path in paths:
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path] * (path.suffix == ".py")


def is_public(path: Path, stack: Sequence[str], name: str) -> bool:
    """Return True for a function that code outside its module may call."""
    private = any(part.startswith("_") and part != "__init__" for part in (*stack, name))
    return not private and "dreplica" in path.parts and "tests" not in path.parts


def _name(decorator: ast.expr) -> str:
    node = decorator.func if isinstance(decorator, ast.Call) else decorator
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def functions(tree: ast.Module) -> Iterator[tuple[list[str], ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield each function with the names of the classes and functions around it."""

    def visit(node: ast.AST, stack: list[str]) -> Iterator[tuple[list[str], ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            inner = stack
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield stack, child
                inner = [*stack, child.name, "_local"]
            elif isinstance(child, ast.ClassDef):
                inner = [*stack, child.name]
            yield from visit(child, inner)

    yield from visit(tree, [])


def count_docstrings(path: Path, counts: Counts) -> None:
    """Count docstrings of functions by their form."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # The parameters of `__init__` may be described in the docstring of its class.
    of_class = {
        item: ast.get_docstring(node) or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.FunctionDef) and item.name == "__init__"
    }
    for stack, function in functions(tree):
        place = f"{path}:{function.lineno}"
        if function.name.startswith("test_"):
            counts.numbers["tests"] += 1
            if len(function.name) > TEST_NAME_LENGTH:
                counts.add("test names over 60 characters", place)
            continue
        if "tests" in path.parts:
            continue
        doc = ast.get_docstring(function)
        public = is_public(path, stack, function.name)
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        names = [argument.arg for argument in arguments if argument.arg not in {"self", "cls"}]
        if public and len(names) >= 3:
            counts.numbers["public functions of 3 or more parameters"] += 1
            if "Args:" not in (doc or of_class.get(function, "")):
                counts.add("public functions of 3 or more parameters without Args", place)
        if not doc:
            continue
        if any(_name(decorator) in {"property", "cached_property"} for decorator in function.decorator_list):
            counts.numbers["property docstrings"] += 1  # a noun phrase is right there
            continue
        counts.numbers["function docstrings"] += 1
        counts.numbers["public function docstrings"] += public
        word = doc.split()[0].rstrip(".,:")
        if word in FRAGMENTS:
            counts.add("function docstrings that are fragments", place)
        if word not in VERBS:
            counts.add("function docstrings without an imperative verb", place)
            counts.numbers["public function docstrings without an imperative verb"] += public
        first = doc.split("\n")[0]
        if ";" in first:
            counts.add("first lines with a semicolon", place)


def count_ruff(paths: Sequence[Path], counts: Counts) -> None:
    """Count the findings of ruff's D401 and D417 in the package."""
    targets = [str(path) for path in paths if "tests" not in path.parts and (path.is_dir() or path.suffix == ".py")]
    if not targets:
        return
    options = ["--isolated", "--preview", "--select=D401,D417", "--output-format=json", "--exit-zero"]
    convention = ["--config", "lint.pydocstyle.convention='google'"]
    command = [sys.executable, "-m", "ruff", "check", *options, *convention, *targets]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for finding in json.loads(done.stdout):
        path, row = Path(finding["filename"]), finding["location"]["row"]
        if "tests" in path.parts:
            continue
        name = {"D401": "D401: not imperative", "D417": "D417: arguments not described"}[finding["code"]]
        counts.add(name, f"{path}:{row}")


def count_phrases(paths: Sequence[Path], counts: Counts) -> None:
    """Count the phrases that the style guide replaces."""
    patterns = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in PHRASES.items()}
    for root in paths:
        files = [root] if root.is_file() else sorted(root.rglob("*"))
        for path in files:
            if path.suffix not in {".py", ".md", ".j2", ".js", ".yaml", ".toml", ".sh", ".sbatch", ".bash", ".txt", ""}:
                continue
            if not path.is_file() or path.name in {"style.py", "LICENSE"} or "__pycache__" in path.parts:
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                for name, pattern in patterns.items():
                    for _ in pattern.finditer(line):
                        counts.add(f"phrase: {name}", f"{path}:{number}")


def count(paths: Sequence[Path]) -> Counts:
    """Count everything at or below `paths`."""
    counts = Counts()
    for path in python_files(paths):
        count_docstrings(path, counts)
        if "tests" not in path.parts and path.read_text(encoding="utf-8").count("\n") > MODULE_LINES:
            counts.add(f"modules over {MODULE_LINES} lines", str(path))
    count_ruff(paths, counts)
    count_phrases(paths, counts)
    counts.numbers["phrases in all"] = sum(n for name, n in counts.numbers.items() if name.startswith("phrase: "))
    return counts


def imperative_share(counts: Counts, public: bool = False) -> float:
    """Return the share of function docstrings that begin with an imperative verb."""
    prefix = "public " if public else ""
    total = counts.numbers[f"{prefix}function docstrings"]
    return 1 - counts.numbers[f"{prefix}function docstrings without an imperative verb"] / total if total else 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders (default: the whole tree)")
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: this folder)")
    parser.add_argument("--list", action="store_true", help="print each place")
    known = parser.parse_args(argv)
    default = [known.root / name for name in ("dreplica", "tests", "docs", "configs", "launch")]
    paths = known.paths or [*default, *sorted(known.root.glob("*.md"))]
    counts = count(paths)
    if known.list:
        print(*counts.places, sep="\n")
    for name, number in sorted(counts.numbers.items()):
        print(f"{number:6}  {name}")
    print(f"{imperative_share(counts):6.0%}  of function docstrings begin with an imperative verb")
    print(f"{imperative_share(counts, public=True):6.0%}  of public function docstrings begin with an imperative verb")
    return 0


if __name__ == "__main__":
    sys.exit(main())
