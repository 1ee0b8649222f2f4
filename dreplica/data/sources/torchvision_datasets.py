"""torchvision's classification data sets by name, downloaded once per node."""

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torchvision
import xxhash

from dreplica.config.schema import DataConfig
from dreplica.data.images.augment import make_augmentation
from dreplica.data.images.images import Images
from dreplica.data.samples import IMAGENET_MEAN, IMAGENET_STD, DataSets
from dreplica.data.sources.image_settings import check_no_source_settings
from dreplica.data.sources.sample_weights import make_weights
from dreplica.data.sources.split import split_indices
from dreplica.distributed.once_per_node import once_per_node
from dreplica.errors import UsageError

log = logging.getLogger(__name__)

_ROOT = "data"
_GREY = ((0.5,) * 3, (0.5,) * 3)


@dataclass(frozen=True)
class _Set:
    """A data set of torchvision."""

    num_classes: int
    """Number of classes."""
    train: Mapping[str, Any] = field(default_factory=lambda: {"split": "train"})
    """Arguments of torchvision's class for the training set."""
    val: Mapping[str, Any] | None = field(default_factory=lambda: {"split": "test"})
    """Arguments for the validation set. None: there is one set, to be split."""
    size: int = 224
    """Height and width of the images, or the usual size for photographs of different sizes."""
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = (IMAGENET_MEAN, IMAGENET_STD)
    """Mean and standard deviation per channel."""
    downloads: bool = True
    """True if torchvision can download it."""


_BY_FLAG: dict[str, Any] = {"train": {"train": True}, "val": {"train": False}}
_WHOLE: dict[str, Any] = {"train": {}, "val": None}
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_MNIST = ((0.1307,) * 3, (0.3081,) * 3)
_FASHION = ((0.2860,) * 3, (0.3530,) * 3)

SETS: Mapping[str, _Set] = {
    "CIFAR10": _Set(10, **_BY_FLAG, size=32, normalization=_CIFAR10),
    "CIFAR100": _Set(100, **_BY_FLAG, size=32, normalization=_CIFAR100),
    "MNIST": _Set(10, **_BY_FLAG, size=28, normalization=_MNIST),
    "FashionMNIST": _Set(10, **_BY_FLAG, size=28, normalization=_FASHION),
    "KMNIST": _Set(10, **_BY_FLAG, size=28, normalization=_GREY),
    "QMNIST": _Set(10, **_BY_FLAG, size=28, normalization=_MNIST),
    "EMNIST": _Set(
        47,
        train={"split": "balanced", "train": True},
        val={"split": "balanced", "train": False},
        size=28,
        normalization=_GREY,
    ),
    "USPS": _Set(10, **_BY_FLAG, size=16, normalization=_GREY),
    "SVHN": _Set(10, size=32, normalization=_GREY),
    "SEMEION": _Set(10, **_WHOLE, size=16, normalization=_GREY),
    "STL10": _Set(10, size=96),
    "Caltech101": _Set(101, **_WHOLE),
    "Caltech256": _Set(257, **_WHOLE),
    "Country211": _Set(211, val={"split": "valid"}),
    "DTD": _Set(47, val={"split": "val"}),
    "EuroSAT": _Set(10, **_WHOLE, size=64),
    "FER2013": _Set(7, val=None, size=48, normalization=_GREY, downloads=False),
    "FGVCAircraft": _Set(100, val={"split": "val"}),
    "Flowers102": _Set(102, val={"split": "val"}),
    "Food101": _Set(101),
    "GTSRB": _Set(43),
    "INaturalist": _Set(10000, train={"version": "2021_train"}, val={"version": "2021_valid"}),
    "ImageNet": _Set(1000, val={"split": "val"}, downloads=False),
    "Imagenette": _Set(10, val={"split": "val"}),
    "Omniglot": _Set(964, **_WHOLE, size=105, normalization=_GREY),
    "PCAM": _Set(2, val={"split": "val"}, size=96),
    "OxfordIIITPet": _Set(37, train={"split": "trainval"}),
    "Places365": _Set(365, train={"split": "train-standard", "small": True}, val={"split": "val", "small": True}),
    "RenderedSST2": _Set(2, val={"split": "val"}),
    "SUN397": _Set(397, **_WHOLE),
    "StanfordCars": _Set(196),
}
"""The sets whose samples are (image, class from 0), with their usual training and validation parts."""


def load_torchvision_set(config: DataConfig, augment_seed: int) -> DataSets:
    """Load the set that `data.name` names, downloading it once per node if it is not in `data.root`.

    Args:
        config: The section `data`.
        augment_seed: `seed.augment`.

    Raises:
        UsageError: If the set is missing and cannot be downloaded, or its files are damaged.
    """
    known = SETS[config.name]
    root = Path(_ROOT if config.root is None else config.root).expanduser()
    parts = [part for part in (known.train, known.val) if part is not None]
    sources = _open_or_download(config.name, root, parts)
    labels = [_labels(source) for source in sources]
    if known.val is None:
        train, val = split_indices(len(sources[0]), config.val_fraction, config.split_seed)
        positions = [train.tolist(), val.tolist()]
    else:
        check_no_source_settings(config, f"data.name is {config.name!r}, which has a validation set")
        positions = [list(range(len(source))) for source in sources]
    size = config.image_size or known.size
    augmentation = make_augmentation(config, size)
    train_labels = None if labels[0] is None else [labels[0][position] for position in positions[0]]
    return DataSets(
        Images(sources[0], positions[0], size, augmentation, augment_seed, known.normalization),
        Images(sources[-1], positions[-1], size, normalization=known.normalization),
        known.num_classes,
        _digest(config.name, sources, labels),
        make_weights(config, train_labels),
    )


def _open_or_download(name: str, root: Path, parts: list[Mapping[str, Any]]) -> list[Any]:
    """Return the parts of the set.

    Until the set is complete, only the process with the lock reads its folder, because some of torchvision's sets
    accept a folder that is still being unpacked.
    """
    make = getattr(torchvision.datasets, name)
    complete, begun = root / f".{name}.complete", root / f".{name}.begun"

    def ensure_complete() -> None:
        _check_not_interrupted(name, begun)
        for part in parts:
            try:
                make(root, **part)
            except (RuntimeError, FileNotFoundError) as error:  # "Dataset not found"; USPS only opens its file
                if not SETS[name].downloads:
                    raise UsageError(
                        f"data.root: {_first_line(error)}. torchvision cannot download this data set. Obtain it from "
                        "its owner, and put it there.",
                        code="data-not-available",
                        key="data.root",
                        name=name,
                    ) from None
                _download(name, root, part, begun)
        complete.touch()

    remedy = f"Delete {str(complete)!r}, so that it is checked and downloaded again."
    try:
        once_per_node(complete, ensure_complete)
    except OSError as error:  # then no process can be unpacking anything there either
        remedy = f"The folder is not writable ({error.strerror}). Put the data set there, or name another folder."
    try:
        return [make(root, **part) for part in parts]
    except (RuntimeError, FileNotFoundError) as error:
        raise UsageError(
            f"data.root: {name} is missing in {str(root)!r} or damaged ({error}). {remedy}",
            code="data-damaged",
            key="data.root",
            name=name,
        ) from None


def _download(name: str, root: Path, part: Mapping[str, Any], begun: Path) -> None:
    """Download one part of the set.

    torchvision accepts the folder of many sets without checking that it is complete. So the file `begun` lists what was
    in `root` before, until the download is complete.
    """
    log.info("downloading %s to %s", name, root)
    before = set(os.listdir(root))
    begun.write_text("\n".join(before), encoding="utf-8", errors="surrogateescape")
    try:
        getattr(torchvision.datasets, name)(root, **part, download=True)
    except Exception as error:  # from the network, an archive, or a missing package
        raise _not_available(name, root, error) from None
    begun.unlink()


def _check_not_interrupted(name: str, begun: Path) -> None:
    """Raise UsageError if an earlier process failed, or was killed, while it unpacked the set."""
    if not begun.exists():
        return
    before = set(begun.read_text(encoding="utf-8", errors="surrogateescape").split("\n"))
    folders = _new_folders(begun.parent, before)
    if folders:
        raise UsageError(
            f"data.root: the download of {name} to {str(begun.parent)!r} was interrupted. Delete what may be an "
            f"incomplete part of it, {', '.join(str(folder) for folder in folders)}, and {str(begun)!r}. If the data "
            "set is complete, delete only the latter.",
            code="download-interrupted",
            key="data.root",
            folders=[str(folder) for folder in folders],
            marker=str(begun),
        )


def _new_folders(root: Path, before: Collection[str]) -> list[Path]:
    """Return the folders with files that are not in `before`, for the user to delete: another process may own some."""
    added = [path for path in sorted(root.iterdir()) if path.name not in before]
    return [path for path in added if any(inner.is_file() for inner in path.rglob("*"))]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].removesuffix(".")


def _not_available(name: str, root: Path, error: Exception) -> UsageError:
    return UsageError(
        f"data.name: {name} is not in {str(root.absolute())!r} (data.root) and cannot be downloaded "
        f"({_first_line(error)}). {_archives(name, root)}On a machine with network access, run python -c "
        f"\"import torchvision; torchvision.datasets.{name}('{root.name}', download=True)\" and copy the content of "
        f"its folder {root.name!r} to {str(root.absolute())!r}.",
        code="data-not-available",
        key="data.name",
        name=name,
    )


def _archives(name: str, root: Path) -> str:
    """Return a sentence on which archives to put where, empty if their addresses are not known."""
    dataset = getattr(torchvision.datasets, name)
    if hasattr(dataset, "resources"):
        addresses, folder = [f"{dataset.mirrors[0]}{file}" for file, _ in dataset.resources], root / name / "raw"
    elif isinstance(getattr(dataset, "url", None), str):
        addresses, folder = [dataset.url], root
    else:
        return ""
    return f"Put {', '.join(addresses)} into {str(folder.absolute())!r}. Or: "


def _labels(source: Any) -> list[int] | None:
    """Return the labels of all samples, None if the set does not hold them."""
    for name in ("targets", "labels", "_labels", "y"):
        values = getattr(source, name, None)
        if values is not None and len(values) == len(source):
            return [int(value) for value in values]
    pairs = getattr(source, "_samples", None)
    return None if pairs is None else [int(label) for _, label in pairs]


def _digest(name: str, sources: list[Any], labels: list[list[int] | None]) -> str:
    """Return a digest over number and labels of the samples, and over the pixels if the set holds them in memory."""
    hashed = xxhash.xxh3_128(name.encode())
    for source, known in zip(sources, labels, strict=True):
        hashed.update(f"{len(source)} {known}".encode())
        data = getattr(source, "data", None)
        if data is not None:
            hashed.update(numpy.ascontiguousarray(data).data)
    return hashed.hexdigest()
