"""Locations of the package and of the files that ship with it."""

from pathlib import Path

PACKAGE_ROOT = Path(__file__).parents[1]
"""The folder of the `dreplica` package."""

IMPORT_ROOT = PACKAGE_ROOT.parent
"""The folder that must be on `sys.path` for `import dreplica` to find this package."""

CONFIGS_FOLDER = IMPORT_ROOT / "configs"
"""The configs that ship with dreplica."""
