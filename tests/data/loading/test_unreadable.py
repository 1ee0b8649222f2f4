"""Tests of `data.on_error: skip`: all replicas skip what any cannot load, and nothing else changes."""

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dreplica.config.schema import DataConfig
from dreplica.data.datasets import load_data
from dreplica.data.loading import unreadable
from dreplica.data.loading.unreadable import skip_unreadable
from dreplica.data.samples import DataSets, at_epoch, describe
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.errors import SharedUsageError
from dreplica.state.stages import rng_stage
from tests.data.pictures import make_folder
from tests.harness import run_replicas


def load(root: Path) -> DataSets:
    section = {"name": "imagefolder", "root": str(root), "image_size": 32, "val_fraction": 0.25}
    return load_data(DataConfig.model_validate({**section, "augment": "flip", "sample_weights": "balanced"}))


def names(dataset: Any) -> list[str]:
    return [dataset.describe(index) for index in range(len(dataset))]


def spoil(root: Path, file: str) -> None:
    (root / file).write_bytes(b"no image")


def find(world: World, roots: list[Path]) -> tuple[list[str], list[str], tuple[str, ...], str]:
    root = roots[world.replica_id]
    data = skip_unreadable(load(root), world.channel, 0, str(root))
    return names(data.train), names(data.val), data.skipped, data.digest


@pytest.mark.parametrize("local", [False, True])
def test_all_replicas_skip_what_any_node_cannot_load(local: bool, tmp_path: Path) -> None:
    roots = [make_folder(tmp_path / "0", 8)]
    sound = load(roots[0])
    train, val = names(sound.train), names(sound.val)
    if local:
        roots *= 3
        for file in (train[4], train[6], val[1]):
            spoil(roots[0], file)
    else:
        roots += [make_folder(tmp_path / name, 8) for name in ("1", "2")]
        spoil(roots[1], train[4])
        spoil(roots[2], val[1])
        spoil(roots[2], train[6])
    results = run_replicas(find, 3, roots)
    kept_train, kept_val, skipped, _ = results[0]
    assert results == [results[0]] * 3
    assert kept_train == [f"index {i} ({name})" for i, name in enumerate(train) if i not in (4, 6)]
    assert kept_val == [f"index {i} ({name})" for i, name in enumerate(val) if i != 1]
    assert len(skipped) == 3
    for line, file in zip(skipped, (train[4], train[6], val[1]), strict=True):
        assert f"({file})" in line


@pytest.mark.process
def test_remaining_samples_do_not_change(tmp_path: Path) -> None:
    sound = load(make_folder(tmp_path))
    spoil(tmp_path, sound.train.describe(2))  # type: ignore[attr-defined]
    random.seed(3)
    before = rng_stage().digest
    data = skip_unreadable(load(tmp_path), Channel(), 1, "")
    assert rng_stage().digest == before
    others = [0, 1, *range(3, 18)]
    assert data.weights is not None
    assert sound.weights is not None
    assert data.weights.equal(sound.weights[others])
    for epoch in (1, 2):
        view, whole = at_epoch(data.train, epoch), at_epoch(sound.train, epoch)
        for index, other in enumerate(others):
            assert view[index][0].equal(whole[other][0])
            assert view[index][1] == whole[other][1]
    assert describe(data.train, 2).startswith("index 2 (index 3 (")


def test_skipping_none_changes_nothing_and_all_is_an_error(tmp_path: Path) -> None:
    data = load(make_folder(tmp_path, 4))
    assert skip_unreadable(data, Channel(), 0, "") is data
    for file in names(data.val):
        spoil(tmp_path, file)
    with pytest.raises(SharedUsageError, match=r"^data.on_error: 'skip' leaves no sample of the val set"):
        skip_unreadable(data, Channel(), 0, "")


def test_progress_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unreadable, "_LOG_INTERVAL", -1.0)
    monkeypatch.setattr(unreadable, "_PER_MESSAGE", 4)
    caplog.set_level(logging.INFO)
    skip_unreadable(load(make_folder(tmp_path, 4)), Channel(), 0, "")
    counts = [(4, 6), (6, 6), (2, 2)]
    assert caplog.messages == [f"data.on_error: checked {done} of {all_} samples" for done, all_ in counts]


class Own(torch.utils.data.Dataset[Any]):
    """A user's data set whose sample 3 raises."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        if index == 3:
            raise RuntimeError("row 3 is damaged")
        return torch.full((2,), float(index)), index


def test_skipping_samples_of_a_user_data_set() -> None:
    data = skip_unreadable(DataSets(Own(), Own(), 5, "digest"), Channel(), 0, "")
    assert [data.train[index][1] for index in range(4)] == [0, 1, 2, 4]
    assert len(data.skipped) == 2
    assert "row 3 is damaged" in data.skipped[0]
