"""`imagefolder`: a folder per class, with training and validation images apart or to be split."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from dreplica.config.schema import DataConfig
from dreplica.data.images.augment import make_augmentation
from dreplica.data.images.images import ImageFiles, Images
from dreplica.data.samples import DataSets, digest_files, split_indices
from dreplica.data.sources.sample_weights import make_weights
from dreplica.distributed.process_group import env_rank
from dreplica.errors import UsageError

log = logging.getLogger(__name__)

_SIZE = 224
_LIKE_TRAINING = {"train", "training"}
_LIKE_VALIDATION = {"val", "valid", "validation", "dev", "eval", "test", "testing"}
_OF_SYSTEMS = {"thumbs.db", "desktop.ini"}
"""Files that file managers leave in folders of images."""


def load_image_folder(config: DataConfig, augment_seed: int) -> DataSets:
    """The images of `data.root`; folders and files whose name begins with a dot are not looked at, at any depth, and
    files that have another ending than an image's are told.

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
        names = {name.lower() for name in folders}
        if names & _LIKE_TRAINING and names <= _LIKE_TRAINING | _LIKE_VALIDATION:
            raise UsageError(
                f"data.root: {str(root)!r} holds {', '.join(folders)}, which are no classes. Name the folder of the "
                "training images train and that of the validation images val, or name the folder of the classes as "
                "data.root."
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
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise _unreadable(error) from None


def _unreadable(error: OSError) -> UsageError:
    return UsageError(f"data.root: {error.filename!r} cannot be read ({error.strerror}). See to its permissions.")


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
    files: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for name, label in classes.items():
        found = list(_files(root / part / name))
        images = [path for path in found if has_file_allowed_extension(path, IMG_EXTENSIONS)]
        if not images:
            raise UsageError(
                f"data.root: there is no image in {str(root / part / name)!r}. Put some there, or remove the folder. "
                f"Images are files that end in {', '.join(IMG_EXTENSIONS)}."
            )
        files += [Path(path).relative_to(root).as_posix() for path in images]
        labels += [label] * len(images)
        others += [path for path in found if not has_file_allowed_extension(path, (*IMG_EXTENSIONS, *_OF_SYSTEMS))]
    if others and env_rank() == 0:
        log.warning(
            "data.root: %d files are left out, since their names do not end in %s: %s%s",
            len(others),
            ", ".join(IMG_EXTENSIONS),
            ", ".join(others[:3]),
            ", ..." if len(others) > 3 else "",
        )
    return files, labels


def _files(folder: Path) -> Iterator[str]:
    """All files beneath `folder`, in order; links are followed, but to no folder that they are in; nothing hidden."""

    def fail(error: OSError) -> None:
        raise _unreadable(error)

    for path, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(os.path.realpath(path))
        around = {here, *here.parents}
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and Path(os.path.realpath(os.path.join(path, name))) not in around
        )
        yield from (os.path.join(path, name) for name in sorted(names) if not name.startswith("."))
