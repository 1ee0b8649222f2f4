"""What each training sample counts in the loss."""

import csv
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dreplica.config.messages import nearest
from dreplica.config.schema import DataConfig
from dreplica.errors import UsageError


def make_weights(
    config: DataConfig, labels: Sequence[int] | None, files: Sequence[str] = (), known: Collection[str] = ()
) -> Tensor | None:
    """(training samples,) float32, as `data.sample_weights` says; None for null.

    Args:
        config: the section.
        labels: of the training samples; None if they are known only once a sample is loaded.
        files: of the training samples, relative to `data.root`; empty if they are not in files.
        known: all files, those of validation samples included: a CSV may give these a weight, too.

    Raises UsageError for what is no weight, for a training sample without one, and for one of no sample.
    """
    if config.sample_weights is None:
        return None
    if config.sample_weights == "balanced":
        if labels is None:
            raise UsageError(
                f"data.sample_weights: 'balanced' needs the labels of all samples, and the training set of "
                f"{config.name!r} gives them one by one. Give it an attribute `labels` or `targets` that holds them."
            )
        return balanced(labels)
    if not files:
        raise UsageError(
            f"data.sample_weights: {config.sample_weights!r}: the samples of {config.name!r} have no files to name in "
            "a CSV. Use balanced or null."
        )
    return _read(Path(config.sample_weights).expanduser(), files, known)


def balanced(labels: Sequence[int]) -> Tensor:
    """w = N / (K n_c) for a sample of class c, of which there are n_c among N samples of K classes, as scikit-learn's
    compute_class_weight("balanced"): each class counts the same, and the mean weight is 1. float32 (N,)."""
    numbers = torch.as_tensor(labels, dtype=torch.int64)
    counts = torch.bincount(numbers).double()
    return (len(numbers) / (counts.count_nonzero() * counts[numbers])).float()


def _read(path: Path, files: Sequence[str], known: Collection[str]) -> Tensor:
    where = f"data.sample_weights: {str(path)!r}"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if row]
    except FileNotFoundError:
        raise UsageError(
            f"{where} is not there (from {Path.cwd()}). Name a CSV file, or one of balanced, null."
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{where} cannot be read as CSV ({error}). Write it as UTF-8 text: file,weight.") from None
    if not rows or [cell.strip() for cell in rows[0][1]] != ["file", "weight"]:
        raise UsageError(f"{where}, line 1: its columns are not file,weight. Write these as the first line.")
    lines: dict[str, int] = {}
    weights: dict[str, float] = {}
    for number, row in rows[1:]:
        if len(row) != 2:
            raise UsageError(f"{where}, line {number}: {len(row)} columns. Write two: file,weight.")
        name = row[0].strip()
        if name not in known:
            raise UsageError(
                f"{where}, line {number}: data.root has no image {name!r}. {_nearest(name, known)}"
                "Paths are relative to data.root, with forward slashes."
            )
        if name in lines:
            raise UsageError(f"{where}, line {number}: {name!r} has a weight in line {lines[name]} already. Keep one.")
        lines[name], weights[name] = number, _weight(row[1], f"{where}, line {number}: {name!r}")
    missing = [name for name in files if name not in weights]
    if missing:
        raise UsageError(
            f"{where} has no weight for {missing[0]!r}, and {len(missing) - 1} more of {len(files)} training images. "
            "Add a line for each."
        )
    result = torch.tensor([weights[name] for name in files], dtype=torch.float32)
    if not result.any():
        raise UsageError(f"{where}: all weights are 0, so nothing would be learned. Give some sample a weight.")
    return result


def _weight(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= torch.finfo(torch.float32).max:
        raise UsageError(f"{where} has the weight {text.strip()!r}. Write a number, 0 or more.")
    return value


def _nearest(name: str, known: Collection[str]) -> str:
    """A hint; files of the same name in other folders are the likeliest."""
    same = [file for file in known if file.rsplit("/", 1)[-1] == name.rsplit("/", 1)[-1]]
    return f"{nearest(name, same)} " if same else ""
