"""Tests of data sets from a user's function."""

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import IterableDataset

from dreplica.config.schema import DataConfig
from dreplica.data.datasets import load_data
from dreplica.data.samples import TensorImages
from dreplica.errors import UsageError
from tests.fixtures import tiny_images


def config(**values: Any) -> DataConfig:
    return DataConfig.model_validate(values)


def returns_nothing(_config: DataConfig) -> None:
    return None


def empty_validation(config: DataConfig) -> tuple[TensorImages, TensorImages, int]:
    train, _, num_classes = tiny_images(config)
    return train, TensorImages(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.int64)), num_classes


def numbers(_config: DataConfig) -> tuple[int, int, int]:
    return 1, 2, 3


def takes_nothing() -> None:
    return None


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(3, 8, 8), 0

    def __len__(self) -> int:
        return 1


def streams(_config: DataConfig) -> tuple[Stream, Stream, int]:
    return Stream(), Stream(), 5


def of_classes(num_classes: Any) -> Any:
    return lambda config: (*tiny_images(config)[:2], num_classes)


classes_none, classes_text, classes_zero, classes_one = map(of_classes, [None, "five", 0, 1])


def of_samples(sample: Any) -> Any:
    return lambda _config: ([sample] * 3, [sample] * 3, 5)


dicts, texts, threes, objects, bare = map(
    of_samples,
    [
        {"x": torch.zeros(2), "y": 0},
        (torch.zeros(2), "cat"),
        (torch.zeros(2), 1, 2),
        (object(), 1),
        torch.zeros(2, 2),
    ],
)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{__name__}:numbers", "the training set of"),
        (f"{__name__}:takes_nothing", "cannot be called with (a value)"),
        (f"{__name__}:streams", "is Stream, which cannot be read by index"),
        (f"{__name__}:classes_none", "returned null as the number of classes"),
        (f"{__name__}:classes_text", "returned 'five' as the number of classes"),
        (f"{__name__}:classes_zero", "returned 0 as the number of classes"),
        (f"{__name__}:classes_one", "returned 1 as the number of classes"),
        (f"{__name__}:dicts", "is dict. Return (input, label)"),
        (f"{__name__}:texts", "is (Tensor, str)."),
        (f"{__name__}:threes", "is (Tensor, int, int)."),
        (f"{__name__}:objects", "is (object, int)."),
        (f"{__name__}:bare", "is Tensor."),
        (f"{__name__}:returns_nothing", "returned NoneType. Return (training set, validation set, number of classes)"),
        (f"{__name__}:empty_validation", "the validation set of"),
        (f"{__name__}:no_such", "has no function 'no_such'"),
        ("no_such_module:f", "no module named 'no_such_module'"),
    ],
)
def test_bad_data_factory_is_a_usage_error(name: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_data(config(name=name))
    assert str(caught.value).startswith("data.name: ")
    assert words in str(caught.value)


arrays, one_hots = map(
    of_samples,
    [
        (numpy.zeros((9, 8, 3), dtype=numpy.uint8), 1),
        (torch.zeros(3, 9, 8, dtype=torch.uint8), torch.tensor([0, 1])),
    ],
)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("arrays", "(ndarray, int)"),
        ("one_hots", "(Tensor, Tensor)"),
        ("threes", "(Tensor, int, int)"),
        ("dicts", "dict"),
        ("texts", "(Tensor, str)"),
    ],
)
def test_bad_image_sample_error_shows_the_types(name: str, found: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_data(config(name=f"{__name__}:{name}", image_size=16))
    assert str(caught.value) == (
        f"data.name: the first sample of the training set of '{__name__}:{name}' is {found}. Return (input, label): "
        "a PIL image or a torch.uint8 tensor (3, H, W), and an int."
    )


class Named(TensorImages):
    """A data set whose `targets` are class names instead of labels."""

    targets = ("cat", "dog") * 40

    def __init__(self, whole: TensorImages) -> None:
        self.images, self.classes = whole.images, whole.labels

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], int(self.classes[index])


def named(config: DataConfig) -> Any:
    train, val, num_classes = tiny_images(config)
    return Named(train), val, num_classes


def test_labels_are_read_only_for_balanced_weights() -> None:
    assert len(load_data(config(name=f"{__name__}:named")).train) == 80  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^data.sample_weights: 'balanced' needs .* 'targets' .* begins with 'cat'"):
        load_data(config(name=f"{__name__}:named", sample_weights="balanced"))


def damaged_first(_config: DataConfig) -> Any:
    class Damaged(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            if index == 0:
                raise OSError("damaged")
            return super().__getitem__(index)

    pairs = [(torch.zeros(3, 9, 8, dtype=torch.uint8), 1)] * 3
    return Damaged(pairs), pairs, 2


def test_size_is_that_of_the_first_readable_image() -> None:
    data = load_data(config(name=f"{__name__}:damaged_first", augment="flip"))
    assert data.train[1][0].shape == (3, 8, 8)


def test_data_from_a_user_function() -> None:
    data = load_data(config(name="tests.fixtures:tiny_images"))
    assert (len(data.train), len(data.val), data.num_classes) == (80, 40, 5)  # type: ignore[arg-type]


def reads_root(config: DataConfig) -> Any:
    assert config.root is not None
    return tiny_images(config)


@pytest.mark.parametrize(("function", "unread"), [("tiny", ["root", "split_seed"]), ("reads_root", ["split_seed"])])
def test_setting_that_the_function_does_not_read_is_an_error(function: str, unread: list[str]) -> None:
    name = f"{__name__}:{function}" if function == "reads_root" else "tests.fixtures:tiny_images"
    with pytest.raises(UsageError) as caught:
        load_data(config(name=name, root="folder", split_seed=3, batch_size=4))
    fields = caught.value.fields
    assert caught.value.code == "ignored-setting"
    assert [fields["key"], *fields["others"]] == [f"data.{key}" for key in unread]
    assert f"data.name is '{name}', which does not read" in fields["reason"]


def test_setting_that_the_function_reads_is_accepted() -> None:
    load_data(config(name=f"{__name__}:reads_root", root="folder", batch_size=4, num_workers=2))
