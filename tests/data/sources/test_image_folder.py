"""Tests of image folders: the files that are found, and folders that cannot be trained on."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreplica.config.schema import DataConfig
from dreplica.data.datasets import load_data
from dreplica.data.images.images import Images
from dreplica.data.samples import DataSets
from dreplica.data.sources.split import split_indices
from dreplica.errors import UsageError
from tests.data.pictures import cut, make_folder


def load(root: Path, **values: Any) -> DataSets:
    return load_data(DataConfig.model_validate({"name": "imagefolder", "root": str(root), "image_size": 32, **values}))


def files(dataset: Any) -> list[str]:
    return [dataset.describe(index) for index in range(len(dataset))]


def test_one_folder_is_split_by_its_seed(tmp_path: Path) -> None:
    data = load(make_folder(tmp_path), val_fraction=0.25, split_seed=3)
    assert (len(data.train), len(data.val), data.num_classes) == (18, 6, 2)  # type: ignore[arg-type]
    listed = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    train, val = split_indices(24, 0.25, 3)
    assert files(data.train) == [listed[index] for index in train]
    assert files(data.val) == [listed[index] for index in val]
    for dataset in (data.train, data.val):
        for index, file in enumerate(files(dataset)):
            image, label = dataset[index]
            assert (image.shape, image.dtype) == ((3, 32, 32), torch.uint8)
            assert label == ("flower" in file)


def test_train_and_val_folders_without_hidden_files(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", 3)
    make_folder(tmp_path / "val", 2)
    shutil.rmtree(tmp_path / "val" / "china")  # a class may have no validation images
    for part in ("train", "val"):
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
        (tmp_path / part / "flower" / "._00.jpg").write_bytes(b"")
        (tmp_path / part / "flower" / "notes.txt").write_text("")
    nested = tmp_path / "train" / "china" / "more"
    nested.mkdir()
    cut("china", 9).save(nested / "a.JPG")
    (nested / ".ipynb_checkpoints").mkdir()
    shutil.copy(nested / "a.JPG", nested / ".ipynb_checkpoints" / "a-checkpoint.jpg")
    (nested / "again").symlink_to("..")  # a folder that contains it
    (tmp_path / "elsewhere").mkdir()
    cut("china", 10).save(tmp_path / "elsewhere" / "b.jpg")
    (nested / "linked").symlink_to(tmp_path / "elsewhere")
    data = load(tmp_path)
    assert data.num_classes == 2
    assert files(data.train) == [
        "train/china/00.jpg",
        "train/china/01.jpeg",
        "train/china/02.jpg",
        "train/china/more/a.JPG",
        "train/china/more/linked/b.jpg",
        *(f"train/flower/0{number}.{suffix}" for number, suffix in enumerate(("jpg", "jpeg", "jpg"))),
    ]
    assert files(data.val) == ["val/flower/00.jpg", "val/flower/01.jpeg"]
    assert [data.val[index][1] for index in range(2)] == [1, 1]


@pytest.mark.parametrize("key", ["val_fraction", "split_seed"])
def test_split_settings_beside_validation_images_are_an_error(key: str, tmp_path: Path) -> None:
    for part in ("train", "val"):
        make_folder(tmp_path / part)
    load(tmp_path)
    with pytest.raises(
        UsageError, match=rf"^data.{key}: this setting has no effect because .* has .* in val/"
    ) as caught:
        load(tmp_path, **{key: 0.5 if key == "val_fraction" else 3})
    assert caught.value.code == "ignored-setting"


def test_files_with_other_suffixes_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path, 2)
    load(root, val_fraction=0.5)
    assert caplog.messages == []
    for name in ("a.gif", "b.heic", ".DS_Store", "Thumbs.db"):
        (root / "china" / name).write_bytes(b"")
    data = load(root, val_fraction=0.5)
    (message,) = caplog.messages
    assert message.startswith("data.root: ignored 2 files whose names do not end in .jpg, ")
    assert message.endswith(f": {root}/china/a.gif, {root}/china/b.heic")
    assert len(data.train) + len(data.val) == 4  # type: ignore[arg-type]


def test_dangling_link_is_reported_when_it_is_read(tmp_path: Path) -> None:
    root = make_folder(tmp_path, 1)
    (root / "china" / "away.jpg").symlink_to(tmp_path / "away.jpg")
    (root / "china" / "self.jpg").symlink_to("self.jpg")
    data = load(root, val_fraction=0.25, split_seed=1)
    problems = {}
    for dataset in (data.train, data.val):
        for index, file in enumerate(files(dataset)):
            try:
                dataset[index]
            except UsageError as error:
                problems[file] = str(error)
    assert set(problems) == {"china/away.jpg", "china/self.jpg"}
    assert (
        "(china/away.jpg) cannot be loaded: it is a link to a file that does not exist. Replace or remove it"
        in problems["china/away.jpg"]
    )
    assert "Too many levels of symbolic links" in problems["china/self.jpg"]


def test_unreadable_folder_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scandir = make_folder(tmp_path, 2), os.scandir
    forbidden = root / "china"

    def refuse(path: Any = ".") -> Any:
        if Path(path) == forbidden:  # as for any user except root
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for forbidden in (root, root / "china"):
        with pytest.raises(UsageError, match=rf"^data.root: '{forbidden}' cannot be read \(Permission denied\)"):
            load(root)


def test_class_may_be_called_train(tmp_path: Path) -> None:
    make_folder(tmp_path, 2)
    (tmp_path / "china").rename(tmp_path / "train")
    assert load(tmp_path, val_fraction=0.5).num_classes == 2


def test_digest_is_over_paths_labels_and_sizes(tmp_path: Path) -> None:
    digest = load(make_folder(tmp_path / "a", 4)).digest
    assert load(make_folder(tmp_path / "b", 4)).digest == digest
    file = tmp_path / "b" / "china" / "00.jpg"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"?")
    assert load(tmp_path / "b").digest == digest
    file.write_bytes(content + b"?")
    assert load(tmp_path / "b").digest != digest
    file.write_bytes(content)
    file.rename(file.with_name("0.jpg"))
    assert load(tmp_path / "b").digest != digest


def only_one_class(root: Path) -> None:
    shutil.rmtree(make_folder(root) / "china")


def one_image(root: Path) -> None:
    make_folder(root, 1)
    shutil.rmtree(root / "china")
    (root / "china").mkdir()


def empty_class(root: Path) -> None:
    (make_folder(root) / "empty").mkdir()


def empty_class_in_val(root: Path) -> None:
    make_folder(root / "train", 2)
    make_folder(root / "val", 2)
    shutil.rmtree(root / "val" / "china")
    (root / "val" / "china").mkdir()


def unknown_class_in_val(root: Path) -> None:
    make_folder(root / "train", 2)
    make_folder(root / "val", 2)
    (root / "val" / "china").rename(root / "val" / "chinna")


def val_without_classes(root: Path) -> None:
    make_folder(root / "train", 2)
    (root / "val").mkdir()


def valid_for_val(root: Path) -> None:
    make_folder(root / "train", 2)
    make_folder(root / "valid", 2)


def capitals(root: Path) -> None:
    make_folder(root / "Train", 2)
    make_folder(root / "Val", 2)


def a_file(root: Path) -> None:
    root.rmdir()
    root.write_text("")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (only_one_class, "holds only one class folder, 'flower'"),
        (lambda root: None, "holds no class folder, but at least 2 classes are needed"),
        (one_image, "/china'. Put images there, or remove the folder. Images are files that end in .jpg"),
        (empty_class, "there is no image in '{root}/empty'"),
        (empty_class_in_val, "there is no image in '{root}/val/china'"),
        (unknown_class_in_val, "'{root}/val/chinna' is a class that '{root}/train' lacks"),
        (val_without_classes, "'{root}/val' holds no class folder, so there are no validation images"),
        (valid_for_val, "holds train, valid, which are not class folders. Rename the folder of the training images to"),
        (capitals, "holds Train, Val, which are not class folders"),
        (a_file, "'{root}' is not a folder"),
        (lambda root: root.rmdir(), "'{root}' does not exist"),
    ],
)
def test_unusable_folder_is_a_usage_error(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    make(root)
    with pytest.raises(UsageError) as caught:
        load(root)
    assert str(caught.value).startswith("data.root: ")
    assert words.format(root=root) in str(caught.value)


def test_empty_split_and_missing_root_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^data.val_fraction: 0.1 of 4 samples leaves 0 for validation"):
        load(make_folder(tmp_path, 2), val_fraction=0.1)
    with pytest.raises(UsageError, match=r"^data.root: null, but imagefolder needs a folder"):
        load_data(DataConfig.model_validate({"name": "imagefolder"}))


def test_size_is_224_and_only_training_is_augmented(tmp_path: Path) -> None:
    data = load(make_folder(tmp_path, 2), image_size=None, augment="resized_crop", val_fraction=0.5)
    assert data.train[0][0].shape == (3, 224, 224)
    assert isinstance(data.val, Images)
    assert data.val.at_epoch(1)[0][0].equal(data.val.at_epoch(2)[0][0])
