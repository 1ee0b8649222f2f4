"""Weights that torchvision publishes: looked up by name, kept in torch.hub's cache, downloaded once per node."""

import hashlib
import http.client
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision

from dreplica.config.messages import nearest
from dreplica.distributed.once_per_node import once_per_node
from dreplica.errors import UsageError

log = logging.getLogger(__name__)

WEIGHTS_SUFFIXES = (".pth", ".pt", ".safetensors")
_STALL_TIMEOUT = 30.0
"""Seconds without data after which a download fails."""


def is_file(weights: str) -> bool:
    """Return True if `model.weights` is a path, False if it is a name of torchvision's."""
    return weights.endswith(WEIGHTS_SUFFIXES) or os.sep in weights


def find_published(model_name: str, weights: str) -> Any | None:
    """Return the member of the model's torchvision WeightsEnum that `weights` names.

    A path counts, too, if its file name is that of a published file.

    Returns:
        The member, or None for a path to any other file.

    Raises:
        UsageError: If torchvision has no weights of that name for this model.
    """
    enum = torchvision.models.get_model_weights(model_name)
    if is_file(weights):
        return next((member for member in enum if _file_name(member) == Path(weights).name), None)
    name = weights.removeprefix(f"{enum.__name__}.")
    if name not in enum.__members__:
        raise UsageError(
            f"model.weights: torchvision has no weights {weights!r} for {model_name}. "
            f"{nearest(name, enum.__members__)} Or name a file ({', '.join(WEIGHTS_SUFFIXES)}).",
            code="unknown-weights",
            key="model.weights",
            value=weights,
        )
    return enum[name]


def builder_arguments(model_name: str, published: Any | None) -> dict[str, Any]:
    """Return the arguments with which the model's builder computes what these weights were trained with."""
    if published is None:
        return {}
    if model_name in {"googlenet", "inception_v3"}:
        return {"transform_input": True}
    # The length of a ViT's position embedding depends on the number of patches of the image.
    return {"image_size": published.meta["min_size"][0]} if model_name.startswith("vit_") else {}


def fetch(published: Any) -> Path:
    """Return the weights file in torch.hub's cache, downloading it once per node if it is missing.

    Raises:
        UsageError: If it is missing and cannot be downloaded.
    """
    path = cache_path(published)
    try:
        once_per_node(path, partial(_download, published, path))
    except (OSError, NotImplementedError) as error:
        raise _not_available(published, path, error) from None
    return path


def cache_path(published: Any) -> Path:
    """Return the path where torchvision looks for the weights on this node, whether or not the file exists."""
    return Path(torch.hub.get_dir(), "checkpoints", _file_name(published))


def check_hash(path: Path, published: Any) -> None:
    """Log a warning if a file in torch.hub's cache is not the published one. (torch.hub checks downloads only.)"""
    expected = _hash_prefix(published)
    if expected is None or not path.is_file():
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        log.warning(
            "model.weights: %s is not the file that torchvision publishes under that name: its SHA-256 begins with %s, "
            "not %s",
            path,
            found[: len(expected)],
            expected,
        )


def _file_name(published: Any) -> str:
    return os.path.basename(urlparse(published.url).path)


def _download(published: Any, path: Path) -> None:
    """Download to a temporary name, renamed once the hash is right, so that a partial file is never used."""
    log.info("fetching %s to %s", published.url, path)
    try:
        with _socket_timeout(_STALL_TIMEOUT):
            torch.hub.download_url_to_file(published.url, str(path), _hash_prefix(published), sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: the hash is wrong
        raise _not_available(published, path, error) from None


def _not_available(published: Any, path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"model.weights: {published} is not on this machine and cannot be downloaded ({type(error).__name__}: {error})."
        f" Download {published.url} on a machine with network access, and copy it on every node to {path} "
        "(TORCH_HOME moves that folder), or copy it anywhere and set model.weights to its path.",
        code="weights-not-available",
        key="model.weights",
        url=published.url,
        path=str(path),
    )


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Limit how long a socket waits for data. By default torch.hub, and all replicas of the node, wait forever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _hash_prefix(published: Any) -> str | None:
    """Return the first digits of the file's SHA-256, which torchvision puts into its name."""
    found = torch.hub.HASH_REGEX.search(_file_name(published))
    return found.group(1) if found else None
