"""Locations of the package and of the files that ship with it."""

from pathlib import Path

PACKAGE_ROOT = Path(__file__).parents[1]
"""Folder of the `dreplica` package."""

IMPORT_ROOT = PACKAGE_ROOT.parent
"""Folder that must be on `sys.path` for `import dreplica` to find this package."""


def shipped_folder(name: str, in_checkout: str) -> Path:
    """Return a folder of files that ship with dreplica.

    Args:
        name: Name of the folder in an installed package, in which the wheel puts it.
        in_checkout: Path of the folder in a checkout of the repository.
    """
    packaged = PACKAGE_ROOT / name
    return packaged if packaged.is_dir() else IMPORT_ROOT / in_checkout


CONFIGS_FOLDER = shipped_folder("configs", "configs")
"""Folder of the configs that ship with dreplica. The cases are in `cases/`."""

CAUSES_FOLDER = shipped_folder("causes", "docs/causes")
"""Folder with a page for each cause, `<cause>.md`."""
