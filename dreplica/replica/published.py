"""The weights that torchvision publishes: by name, in its cache, fetched once per node."""

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
_STALLED_SECONDS = 30.0


def is_file(weights: str) -> bool:
    """Whether `model.weights` is a path rather than a name of torchvision's."""
    return weights.endswith(WEIGHTS_SUFFIXES) or os.sep in weights


def find_published(model_name: str, weights: str) -> Any | None:
    """The member of torchvision's WeightsEnum for this model that `weights` names, also by its file's own name.

    None for any other file. Raises UsageError for a name that torchvision does not have for this model.
    """
    enum = torchvision.models.get_model_weights(model_name)
    if is_file(weights):
        return next((member for member in enum if _file_name(member) == Path(weights).name), None)
    name = weights.removeprefix(f"{enum.__name__}.")
    if name not in enum.__members__:
        raise UsageError(
            f"model.weights: torchvision has no weights {weights!r} for {model_name}. "
            f"{nearest(name, enum.__members__)} Or name a file ({', '.join(WEIGHTS_SUFFIXES)})."
        )
    return enum[name]


def arguments_for(model_name: str, published: Any | None) -> dict[str, Any]:
    """What the model's builder must be given for these weights to compute what they did in training."""
    if published is None:
        return {}
    if model_name in {"googlenet", "inception_v3"}:
        return {"transform_input": True}
    # The position embedding is as long as the image has patches.
    return {"image_size": published.meta["min_size"][0]} if model_name.startswith("vit_") else {}


def fetch(published: Any) -> Path:
    """The file where torchvision looks for it, fetched once per node if it is not there."""
    path = cached(published)
    try:
        once_per_node(path, partial(_download, published, path))
    except (OSError, NotImplementedError) as error:
        raise UsageError(_not_cached(published, path, error)) from None
    return path


def cached(published: Any) -> Path:
    """Where torchvision looks for the file on this node; it need not be there."""
    return Path(torch.hub.get_dir(), "checkpoints", _file_name(published))


def check_hash(path: Path, published: Any) -> None:
    """Warns if a file in torchvision's place, put there by hand, is not torchvision's; torch.hub does not look."""
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
    """Under a temporary name, renamed when the hash is right: a part of a file never counts as the file."""
    log.info("fetching %s to %s", published.url, path)
    try:
        with _giving_up_when_stalled():
            torch.hub.download_url_to_file(published.url, str(path), _hash_prefix(published), sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: the hash is wrong
        raise UsageError(_not_cached(published, path, error)) from None


def _not_cached(published: Any, path: Path, error: Exception) -> str:
    return (
        f"model.weights: {published} is not on this machine and cannot be fetched ({type(error).__name__}: {error}). "
        f"Fetch {published.url} where there is a network, and put it on every node at {path} "
        "(TORCH_HOME moves that folder), or anywhere and give its path as model.weights."
    )


@contextmanager
def _giving_up_when_stalled() -> Iterator[None]:
    """torch.hub waits forever for a server that does not answer, and so would all replicas of the node."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALLED_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _hash_prefix(published: Any) -> str | None:
    """The first digits of the file's SHA-256, which torchvision has in its name."""
    found = torch.hub.HASH_REGEX.search(_file_name(published))
    return found.group(1) if found else None
