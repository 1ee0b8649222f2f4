"""The order of packages: imports point downwards, and there is no cycle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreplica.config.paths import PACKAGE_ROOT

LAYERS = (
    {"errors"},
    {"config", "distributed"},
    {"environment", "state"},
    {"agreement", "data", "replica"},
    {"training"},
    {"diagnosis"},
    {"report"},
    {"run"},
    {"worker"},
    {"commands"},
)
"""Packages and modules at the root, from the bottom. A lower one never imports a higher one."""

ROOT_MODULES = {"__init__.py", "errors.py", "lightning.py", "transformers.py", "worker.py"}
PUBLIC_MODULES = {"dreplica", "dreplica.lightning", "dreplica.transformers"}
"""Public entry points: they may import any package, and no package imports them."""


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of each import of dreplica, type-only ones and strings that name a module included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports are not used here"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and _is_dotted_name(node.value):
            yield node.lineno, node.value


def _is_dotted_name(value: object) -> bool:
    parts = value.split(".") if isinstance(value, str) else []
    return len(parts) > 1 and parts[0] == "dreplica" and all(part.isidentifier() for part in parts)


def import_graph(root: Path) -> dict[str, dict[str, int]]:
    """Map each module below `root` to the modules it imports, with the line of the first import."""
    paths = {module_name(path, root): path for path in sorted(root.rglob("*.py"))}
    graph: dict[str, dict[str, int]] = {}
    for name, path in paths.items():
        imports: dict[str, int] = {}
        for line, target in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
            while target and target not in paths:
                target = target.rpartition(".")[0]
            if target and target != name:
                imports.setdefault(target, line)
        graph[name] = imports
    return graph


def upward_imports(graph: dict[str, dict[str, int]]) -> list[str]:
    """Describe each import of a higher layer by a lower one, and of a public module by any package."""
    layer_of = {name: index for index, names in enumerate(LAYERS) for name in names}
    wrong = []
    for module, imports in graph.items():
        if module in PUBLIC_MODULES:
            continue
        own = module.split(".")[1]
        for target, line in imports.items():
            if target in PUBLIC_MODULES - {"dreplica"}:
                wrong.append(f"{module}:{line} imports the public module {target}")
            elif target != "dreplica" and layer_of[target.split(".")[1]] > layer_of[own]:
                wrong.append(f"{module}:{line} imports {target}: {own} is below {target.split('.')[1]}")
    return wrong


def packages_graph(graph: dict[str, dict[str, int]]) -> dict[str, set[str]]:
    """Reduce a graph of modules to one of the packages and modules at the root."""
    packages: dict[str, set[str]] = {}
    for module, imports in graph.items():
        if module in PUBLIC_MODULES:
            continue
        own = module.split(".")[1]
        targets = {target.split(".")[1] for target in imports if target != "dreplica"}
        packages.setdefault(own, set()).update(targets - {own})
    return packages


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return one cycle as a path whose first and last names are equal, or an empty list."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if cycle := visit(target, [*path, name]):
                return cycle
        done.add(name)
        return []

    for name in sorted(graph):
        if cycle := visit(name, []):
            return cycle
    return []


@pytest.fixture(scope="module")
def graph() -> dict[str, dict[str, int]]:
    return import_graph(PACKAGE_ROOT)


def test_imports_point_downwards(graph: dict[str, dict[str, int]]) -> None:
    assert upward_imports(graph) == []


def test_imports_have_no_cycle(graph: dict[str, dict[str, int]]) -> None:
    modules = {name: set(imports) - {"dreplica"} for name, imports in graph.items() if name not in PUBLIC_MODULES}
    assert find_cycle(modules) == []
    assert find_cycle(packages_graph(graph)) == []


def test_root_holds_only_packages_and_entry_points() -> None:
    assert {path.name for path in PACKAGE_ROOT.glob("*.py")} == ROOT_MODULES
    packages = {path.parent.name for path in PACKAGE_ROOT.glob("*/__init__.py")}
    assert packages | {"errors", "worker"} == set().union(*LAYERS)


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("config/load.py", "import dreplica.training.loop", "imports dreplica.training.loop: config is below training"),
        ("state/rng.py", "from dreplica.agreement import protocol", "state is below agreement"),
        ("worker.py", 'import_module("dreplica.commands.main")', "worker is below commands"),
        (
            "agreement/protocol.py",
            "if TYPE_CHECKING:\n    from dreplica.training.step import training_step",
            "agreement is below training",
        ),
        ("report/__init__.py", "import dreplica.lightning", "imports the public module dreplica.lightning"),
    ],
)
def test_planted_upward_import_is_found(tmp_path: Path, file: str, line: str, expected: str) -> None:
    root = copy_of_package(tmp_path)
    with (root / file).open("a", encoding="utf-8") as module:
        module.write(f"\n{line}\n")
    assert expected in "\n".join(upward_imports(import_graph(root)))


def test_planted_cycle_is_found(tmp_path: Path) -> None:
    root = copy_of_package(tmp_path)
    assert not find_cycle(packages_graph(import_graph(root)))
    for file, target in (
        ("environment/device.py", "dreplica.state.rng"),
        ("state/rng.py", "dreplica.environment.device"),
    ):
        with (root / file).open("a", encoding="utf-8") as module:
            module.write(f"\nimport {target}\n")
    assert find_cycle(packages_graph(import_graph(root)))


def copy_of_package(folder: Path) -> Path:
    root = folder / "dreplica"
    for path in PACKAGE_ROOT.rglob("*.py"):
        copied = root / path.relative_to(PACKAGE_ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    return root
