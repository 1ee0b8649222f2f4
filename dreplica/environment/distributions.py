"""The installed distributions and their versions. Reading them imports none, torch included."""

import importlib.metadata
import json
import re
from collections.abc import Iterator

_LIBRARIES = re.compile(
    r"distributions\.(torch|torchvision|numpy|scipy|nvidia-.*|cuda-.*|mkl.*|intel-.*|onednn.*|openblas.*|tbb"
    r"|(pytorch-)?triton.*|flash-attn.*|xformers|transformer-engine.*|apex|torchao|torch-.*)"
)
"""Distributions with kernels that torch may run."""


def installed_distributions() -> dict[str, str | None]:
    """Return the version of each installed distribution, by normalized name, in alphabetical order.

    A distribution installed from a repository has its commit after
    the version, and one that is installed editable is marked, since its files may change without a new version. Of two
    with one name, the first on `sys.path` counts, which is the one that is imported.
    """
    found: dict[str, str | None] = {}
    for distribution in importlib.metadata.distributions():
        name, version = _name_and_version(distribution)
        if name is not None:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version)
    return dict(sorted(found.items()))


def runs_kernels(field: str) -> bool:
    """Return True if a manifest field is the version of a distribution with kernels that torch may run."""
    return _LIBRARIES.fullmatch(field) is not None


def _name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str | None, str | None]:
    """Return what the metadata of a distribution says. An interrupted installation may leave it without a name."""
    try:
        headers = dict(_headers(distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""))
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    except (OSError, ValueError):  # also UnicodeDecodeError
        return None, None
    version = headers.get("version")
    if not isinstance(origin, dict) or version is None:
        return headers.get("name"), version
    commit = (origin.get("vcs_info") or {}).get("commit_id")
    if isinstance(commit, str):
        version += f" (commit {commit[:12]})"
    if (origin.get("dir_info") or {}).get("editable"):
        version += " (editable)"
    return headers.get("name"), version


def _headers(metadata: str) -> Iterator[tuple[str, str]]:
    """Yield the headers of core metadata that have one line. The description after them can be long."""
    for line in metadata.splitlines():
        if not line.strip():
            return
        key, colon, value = line.partition(":")
        if colon and not line[0].isspace() and value.strip():
            yield key.strip().lower(), value.strip()
