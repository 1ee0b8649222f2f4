"""`imagefolder`: a folder per class, with training and validation images apart or to be split."""

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from dreplica.data.augment import make_augmentation
from dreplica.data.config import DataConfig
from dreplica.data.images import ImageFiles, Images
from dreplica.data.sample_weights import make_weights
from dreplica.data.samples import DataSets, digest_files
from dreplica.data.split import split_indices
from dreplica.errors import UsageError

_SIZE = 224
_LIKE_VALIDATION = {"valid", "validation", "test"}


def load_image_folder(config: DataConfig, augment_seed: int) -> DataSets:
    """The images of `data.root`; folders and files whose name begins with a dot are not looked at.

    Classes are numbered by their names in order. The digest is over relative paths, labels and sizes of the files, not
    over what they hold, which would take as long as an epoch: files that differ in a byte show at the step that trains
    on them. Raises UsageError for a folder that cannot be trained on.
    """
    if config.root is None:
        raise UsageError("data.root: null, but imagefolder needs a folder. Name it: --data.root FOLDER.")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        found = "is no folder" if root.exists() else "is not there"
        raise UsageError(f"data.root: {str(root)!r} {found} (from {Path.cwd()}). Name the folder of the images.")
    folders = _folders(root)
    size = config.image_size or _SIZE
    augmentation = make_augmentation(config, size)
    if {"train", "val"} <= set(folders):
        classes = _classes(root / "train")
        files, labels = _list(root, "train", classes)
        val_files, val_labels = _list(root, "val", _known(root, classes))
        source, val_source = ImageFiles(root, files, labels), ImageFiles(root, val_files, val_labels)
        train_positions, val_positions = list(range(len(files))), list(range(len(val_files)))
    else:
        if "train" in folders and set(folders) - {"train"} <= _LIKE_VALIDATION:
            raise UsageError(
                f"data.root: {str(root)!r} holds {', '.join(folders)}, which are no classes. "
                "Name the folder of the validation images val, or name the folder of the classes as data.root."
            )
        files, labels = _list(root, "", classes := _classes(root))
        source = val_source = ImageFiles(root, files, labels)
        train_indices, val_indices = split_indices(len(files), config.val_fraction, config.split_seed)
        train_positions, val_positions = train_indices.tolist(), val_indices.tolist()
    train = Images(source, train_positions, size, augmentation, augment_seed)
    val = Images(val_source, val_positions, size)
    return DataSets(
        train,
        val,
        len(classes),
        digest_files(train, val),
        make_weights(
            config,
            [source.labels[position] for position in train_positions],
            [source.files[position] for position in train_positions],
            {*source.files, *val_source.files},
        ),
    )


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _classes(root: Path) -> dict[str, int]:
    classes = {name: number for number, name in enumerate(_folders(root))}
    if len(classes) < 2:
        found = f"only one class, {next(iter(classes))!r}" if classes else "no folder"
        raise UsageError(
            f"data.root: {str(root)!r} holds {found}; there is nothing to tell apart. "
            "Put the images of each class into a folder of its own, in there."
        )
    return classes


def _known(root: Path, classes: dict[str, int]) -> dict[str, int]:
    """Those classes that `val/` has. Raises UsageError for one that `train/` lacks."""
    names = _folders(root / "val")
    for name in names:
        if name not in classes:
            raise UsageError(
                f"data.root: {str(root / 'val' / name)!r} is a class that {str(root / 'train')!r} lacks. "
                "Put its training images there, or remove it."
            )
    if not names:
        raise UsageError(
            f"data.root: {str(root / 'val')!r} holds no folder: there is nothing to validate on. Put a folder per "
            f"class in there, or name {str(root / 'train')!r} as data.root to split off data.val_fraction of it."
        )
    return {name: classes[name] for name in names}


def _list(root: Path, part: str, classes: dict[str, int]) -> tuple[list[str], list[int]]:
    """The images of `root/part`, by path relative to `root`, with their labels, in order."""
    pairs = make_dataset(root / part, classes, IMG_EXTENSIONS, allow_empty=True)
    pairs = [(path, label) for path, label in pairs if not os.path.basename(path).startswith(".")]
    numbers = {label for _, label in pairs}
    empty = [name for name, number in classes.items() if number not in numbers]
    if empty:
        raise UsageError(
            f"data.root: there is no image in {str(root / part / empty[0])!r}. Put some there, or remove the folder. "
            f"Images are files that end in {', '.join(IMG_EXTENSIONS)}."
        )
    return [Path(path).relative_to(root).as_posix() for path, _ in pairs], [label for _, label in pairs]
