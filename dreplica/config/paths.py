"""Locations of the package and of the files that ship with it."""

from pathlib import Path

PACKAGE_ROOT = Path(__file__).parents[1]
"""Folder of the `dreplica` package."""

IMPORT_ROOT = PACKAGE_ROOT.parent
"""Folder that must be on `sys.path` for `import dreplica` to find this package."""


def shipped_path(name: str, in_checkout: str) -> Path:
    """Return a file, or a folder of files, that ships with dreplica.

    Args:
        name: Its name in an installed package, in which the wheel puts it.
        in_checkout: Its path in a checkout of the repository.
    """
    packaged = PACKAGE_ROOT / name
    return packaged if packaged.exists() else IMPORT_ROOT / in_checkout


CONFIGS_FOLDER = shipped_path("configs", "configs")
"""Folder of the configs that ship with dreplica. The cases are in `cases/`."""

CAUSES_FOLDER = shipped_path("causes", "docs/causes")
"""Folder with a page for each cause, `<cause>.md`."""

STAGES_PAGE = shipped_path("two_runs_differ.md", "docs/two_runs_differ.md")
"""Page with a section for each stage in which two runs may first differ."""


def packaged_configs() -> dict[str, Path]:
    """Return the configs that ship with dreplica by name: `digits`, `cases/clean`."""
    paths = sorted([*CONFIGS_FOLDER.glob("*.yaml"), *CONFIGS_FOLDER.glob("cases/*.yaml")])
    return {path.relative_to(CONFIGS_FOLDER).with_suffix("").as_posix(): path for path in paths}


def find_config(name: str) -> Path | None:
    """Return the config file that `--config` names, or None if there is none.

    A path in the current folder comes first, then a config that ships with dreplica: `configs/digits.yaml`,
    `digits.yaml` and `digits` all find the same one.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return path
    packaged = packaged_configs().get(packaged_name(name))
    return packaged or (path if path.exists() else None)


def packaged_name(name: str) -> str:
    """Return the name that a packaged config would have: `digits` for `configs/digits.yaml`."""
    return name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
