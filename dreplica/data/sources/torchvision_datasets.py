"""torchvision's classification data sets, by name."""

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
from dreplica.data.samples import IMAGENET_MEAN, IMAGENET_STD, DataSets, split_indices
from dreplica.data.sources.sample_weights import make_weights
from dreplica.distributed.once_per_node import once_per_node
from dreplica.errors import UsageError

log = logging.getLogger(__name__)

_ROOT = "data"
_GREY = ((0.5,) * 3, (0.5,) * 3)


@dataclass(frozen=True)
class _Set:
    """One data set; `val` None: it is one set, to be split."""

    num_classes: int
    train: Mapping[str, Any] = field(default_factory=lambda: {"split": "train"})
    val: Mapping[str, Any] | None = field(default_factory=lambda: {"split": "test"})
    size: int = 224
    """Of images that are all of one size, that; otherwise what photographs are usually brought to."""
    normalization: tuple[tuple[float, ...], tuple[float, ...]] = (IMAGENET_MEAN, IMAGENET_STD)
    downloads: bool = True
    """Whether torchvision can fetch it."""


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
"""Those that give (image, class from 0), with the usual training and validation parts."""


def load_torchvision_set(config: DataConfig, augment_seed: int) -> DataSets:
    """The set that `data.name` names, downloaded once per node if it is not in `data.root`. Raises UsageError."""
    known = SETS[config.name]
    root = Path(_ROOT if config.root is None else config.root).expanduser()
    parts = [part for part in (known.train, known.val) if part is not None]
    sources = _open_or_download(config.name, root, parts)
    labels = [_labels(source) for source in sources]
    if known.val is None:
        train, val = split_indices(len(sources[0]), config.val_fraction, config.split_seed)
        positions = [train.tolist(), val.tolist()]
    else:
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
    """The parts. Only the process that holds the lock looks at what is there before all of it is: some sets take the
    folder for the whole of it while it is still being unpacked."""
    make = getattr(torchvision.datasets, name)
    marker, begun = root / f".{name}.complete", root / f".{name}.begun"

    def see_to_it() -> None:
        _refuse_part_of_a_set(name, begun)
        for part in parts:
            try:
                make(root, **part)
            except (RuntimeError, FileNotFoundError) as error:  # "Dataset not found"; USPS only opens its file
                if not SETS[name].downloads:
                    raise UsageError(f"data.root: {_first_line(error)}. torchvision cannot download it.") from None
                _download(name, root, part, begun)
        marker.touch()

    remedy = f"Delete {str(marker)!r}, so that it is looked for and downloaded again."
    try:
        once_per_node(marker, see_to_it)
    except OSError as error:  # nobody can unpack anything there then
        remedy = f"The folder cannot be written to ({error.strerror}): put it there, or name another."
    try:
        return [make(root, **part) for part in parts]
    except (RuntimeError, FileNotFoundError) as error:
        raise UsageError(f"data.root: {name} is not in {str(root)!r} or is damaged ({error}). {remedy}") from None


def _download(name: str, root: Path, part: Mapping[str, Any], begun: Path) -> None:
    """One part. torchvision takes many a set's folder for the whole of it: so a part of it must not be taken for it.

    `begun`: the file that lists what was there before, until it is all there. Raises UsageError.
    """
    log.info("downloading %s to %s", name, root)
    before = set(os.listdir(root))
    begun.write_text("\n".join(before), encoding="utf-8", errors="surrogateescape")
    try:
        getattr(torchvision.datasets, name)(root, **part, download=True)
    except Exception as error:  # of the network, an archive, a package that it takes
        raise UsageError(_how_to_get(name, root, error)) from None
    begun.unlink()


def _refuse_part_of_a_set(name: str, begun: Path) -> None:
    """Raises UsageError if an earlier process failed, or was killed, while it unpacked the set."""
    if not begun.exists():
        return
    before = set(begun.read_text(encoding="utf-8", errors="surrogateescape").split("\n"))
    folders = _new_folders(begun.parent, before)
    if folders:
        raise UsageError(
            f"data.root: the download of {name} to {str(begun.parent)!r} was interrupted. Delete what may be a part of "
            f"it, {', '.join(str(folder) for folder in folders)}, and {str(begun)!r}; if it is whole, the latter alone."
        )


def _new_folders(root: Path, before: Collection[str]) -> list[Path]:
    """Not deleted by us: another process may have put its own set there."""
    added = [path for path in sorted(root.iterdir()) if path.name not in before]
    return [path for path in added if any(inner.is_file() for inner in path.rglob("*"))]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].removesuffix(".")


def _how_to_get(name: str, root: Path, error: Exception) -> str:
    return (
        f"data.name: {name} is not in {str(root.absolute())!r} (data.root) and cannot be downloaded "
        f'({_first_line(error)}). {_archives(name, root)}On a machine that can, run python -c "import torchvision; '
        f"torchvision.datasets.{name}('{root.name}', download=True)\" and put what is then in its folder "
        f"{root.name!r} into {str(root.absolute())!r}."
    )


def _archives(name: str, root: Path) -> str:
    """Where the set is one or a few archives of known addresses: which, and where they go."""
    dataset = getattr(torchvision.datasets, name)
    if hasattr(dataset, "resources"):
        addresses, folder = [f"{dataset.mirrors[0]}{file}" for file, _ in dataset.resources], root / name / "raw"
    elif isinstance(getattr(dataset, "url", None), str):
        addresses, folder = [dataset.url], root
    else:
        return ""
    return f"Put {', '.join(addresses)} into {str(folder.absolute())!r}. Or: "


def _labels(source: Any) -> list[int] | None:
    """The labels of all samples, under whichever name this set keeps them."""
    for name in ("targets", "labels", "_labels", "y"):
        values = getattr(source, name, None)
        if values is not None and len(values) == len(source):
            return [int(value) for value in values]
    pairs = getattr(source, "_samples", None)
    return None if pairs is None else [int(label) for _, label in pairs]


def _digest(name: str, sources: list[Any], labels: list[list[int] | None]) -> str:
    """Over the pixels of those sets that are held in memory; otherwise over the number of samples and their labels."""
    hashed = xxhash.xxh3_128(name.encode())
    for source, known in zip(sources, labels, strict=True):
        hashed.update(f"{len(source)} {known}".encode())
        data = getattr(source, "data", None)
        if data is not None:
            hashed.update(numpy.ascontiguousarray(data).data)
    return hashed.hexdigest()
