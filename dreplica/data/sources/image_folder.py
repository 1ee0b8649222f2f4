"""`imagefolder`: a folder per class, with separate validation images or split by `data.val_fraction`."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from dreplica.config.schema import DataConfig
from dreplica.data.images.augment import make_augmentation
from dreplica.data.images.images import ImageFiles, Images
from dreplica.data.samples import DataSets, digest_files
from dreplica.data.sources.image_settings import check_no_source_settings
from dreplica.data.sources.sample_weights import make_weights
from dreplica.data.sources.split import split_indices
from dreplica.distributed.process_group import env_rank
from dreplica.errors import UsageError

log = logging.getLogger(__name__)

_SIZE = 224
_TRAINING_NAMES = {"train", "training"}
_VALIDATION_NAMES = {"val", "valid", "validation", "dev", "eval", "test", "testing"}
_SYSTEM_FILES = {"thumbs.db", "desktop.ini"}
"""Names of files that file managers leave in folders of images."""


def load_image_folder(config: DataConfig, augment_seed: int) -> DataSets:
    """Load the images of `data.root`: a folder per class, or `train/` and `val/` with a folder per class in each.

    Folders and files whose name begins with a dot are ignored at any depth. Files with another suffix than an image's
    are ignored with a warning. Classes are numbered in the order of their names.

    The digest is over relative paths, labels and sizes of the files, not over their content, which would take as long
    as an epoch. A file that differs in a byte is found at the step that trains on it.

    Args:
        config: The section `data`.
        augment_seed: `seed.augment`.

    Raises:
        UsageError: If the folder cannot be trained on.
    """
    if config.root is None:
        raise _root_error("null, but imagefolder needs a folder. Name it: --data.root FOLDER.", "no-root")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise _root_error(
            f"{str(root)!r} {found}. Relative paths start at {Path.cwd()}. Name the folder of the images.",
            "no-folder",
        )
    folders = _folders(root)
    size = config.image_size or _SIZE
    augmentation = make_augmentation(config, size)
    if {"train", "val"} <= set(folders):
        classes = _classes(root / "train")
        files, labels = _list(root, "train", classes)
        val_files, val_labels = _list(root, "val", _validation_classes(root, classes))
        source, val_source = ImageFiles(root, files, labels), ImageFiles(root, val_files, val_labels)
        train_positions, val_positions = list(range(len(files))), list(range(len(val_files)))
        check_no_source_settings(config, f"{str(root)!r} has the validation images in val/")
    else:
        names = {name.lower() for name in folders}
        if names & _TRAINING_NAMES and names <= _TRAINING_NAMES | _VALIDATION_NAMES:
            raise _root_error(
                f"{str(root)!r} holds {', '.join(folders)}, which are not class folders. Rename the folder of the "
                "training images to train and that of the validation images to val, or set data.root to the folder "
                "that holds the class folders.",
                "not-class-folders",
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
    return _root_error(
        f"{error.filename!r} cannot be read ({error.strerror}). Check its permissions.", "folder-unreadable"
    )


def _root_error(problem: str, code: str) -> UsageError:
    return UsageError(f"data.root: {problem}", code=code, key="data.root")


def _classes(root: Path) -> dict[str, int]:
    classes = {name: number for number, name in enumerate(_folders(root))}
    if len(classes) < 2:
        found = f"only one class folder, {next(iter(classes))!r}" if classes else "no class folder"
        raise _root_error(
            f"{str(root)!r} holds {found}, but at least 2 classes are needed. Put the images of each class into a "
            "separate folder in it.",
            "too-few-classes",
        )
    return classes


def _validation_classes(root: Path, classes: dict[str, int]) -> dict[str, int]:
    """Return the classes of `val/`, after checking that `train/` has each of them."""
    names = _folders(root / "val")
    for name in names:
        if name not in classes:
            raise _root_error(
                f"{str(root / 'val' / name)!r} is a class that {str(root / 'train')!r} lacks. "
                "Put its training images there, or remove it.",
                "class-without-training-images",
            )
    if not names:
        raise _root_error(
            f"{str(root / 'val')!r} holds no class folder, so there are no validation images. Put a folder per class "
            f"into it, or set data.root to {str(root / 'train')!r} to split off data.val_fraction of it.",
            "no-validation-images",
        )
    return {name: classes[name] for name in names}


def _list(root: Path, part: str, classes: dict[str, int]) -> tuple[list[str], list[int]]:
    """Return the images of `root/part` in order: paths relative to `root`, and labels."""
    files: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    for name, label in classes.items():
        found = list(_files(root / part / name))
        images = [path for path in found if has_file_allowed_extension(path, IMG_EXTENSIONS)]
        if not images:
            raise _root_error(
                f"there is no image in {str(root / part / name)!r}. Put images there, or remove the folder. "
                f"Images are files that end in {', '.join(IMG_EXTENSIONS)}.",
                "empty-class",
            )
        files += [Path(path).relative_to(root).as_posix() for path in images]
        labels += [label] * len(images)
        others += [path for path in found if not has_file_allowed_extension(path, (*IMG_EXTENSIONS, *_SYSTEM_FILES))]
    if others and env_rank() == 0:
        log.warning(
            "data.root: ignored %d files whose names do not end in %s: %s%s",
            len(others),
            ", ".join(IMG_EXTENSIONS),
            ", ".join(others[:3]),
            ", ..." if len(others) > 3 else "",
        )
    return files, labels


def _files(folder: Path) -> Iterator[str]:
    """Yield all files below `folder` in order, except hidden ones.

    Links are followed, except those to a folder that contains them.
    """

    def fail(error: OSError) -> None:
        raise _unreadable(error)

    for path, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        here = Path(os.path.realpath(path))
        enclosing = {here, *here.parents}
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and Path(os.path.realpath(os.path.join(path, name))) not in enclosing
        )
        yield from (os.path.join(path, name) for name in sorted(names) if not name.startswith("."))
