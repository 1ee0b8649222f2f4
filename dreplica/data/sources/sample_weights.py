"""The weight of each training sample in the loss."""

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
    """Return the weights that `data.sample_weights` names.

    Args:
        config: The section `data`.
        labels: Labels of the training samples. None if they are known only once a sample is loaded.
        files: Files of the training samples, relative to `data.root`. Empty if samples are not in files.
        known: All files, those of validation samples included, as a CSV file may give these a weight, too.

    Returns:
        float32 (training samples,), or None for null.

    Raises:
        UsageError: If a weight is invalid, a training sample has none, or one is for a file that is not in the data.
    """
    if config.sample_weights is None:
        return None
    if config.sample_weights == "balanced":
        if labels is None:
            raise UsageError(
                f"data.sample_weights: 'balanced' needs the labels of all samples at once, but the training set of "
                f"{config.name!r} has none. Add an attribute `labels` or `targets` that holds them.",
                code="labels-unknown",
                key="data.sample_weights",
            )
        return balanced(labels)
    if not files:
        raise UsageError(
            f"data.sample_weights: {config.sample_weights!r} is a CSV file, but the samples of {config.name!r} are not "
            "in files that it could name. Use balanced or null.",
            code="no-files",
            key="data.sample_weights",
            value=config.sample_weights,
        )
    return _read(Path(config.sample_weights).expanduser(), files, known)


def balanced(labels: Sequence[int]) -> Tensor:
    """Return weights with which each class counts the same and the mean weight is 1.

    A sample of class c has w = N / (K n_c), with n_c of N samples in class c and K classes, as in scikit-learn's
    compute_class_weight("balanced").

    Returns:
        float32 (N,).
    """
    numbers = torch.as_tensor(labels, dtype=torch.int64)
    counts = torch.bincount(numbers).double()
    return (len(numbers) / (counts.count_nonzero() * counts[numbers])).float()


def _read(path: Path, files: Sequence[str], known: Collection[str]) -> Tensor:
    def error(problem: str, code: str, line: int | None = None) -> UsageError:
        where = f"data.sample_weights: {str(path)!r}" + ("" if line is None else f", line {line}")
        return UsageError(f"{where}{problem}", code=code, key="data.sample_weights", path=str(path), line=line)

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), start=1) if row]
    except FileNotFoundError:
        raise error(
            f" does not exist. Relative paths start at {Path.cwd()}. Name a CSV file, or use balanced or null.",
            "csv-missing",
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as cause:
        raise error(
            f" cannot be read as CSV ({cause}). Save it as UTF-8 text with the columns file,weight.", "csv-unreadable"
        ) from None
    if not rows or [cell.strip() for cell in rows[0][1]] != ["file", "weight"]:
        raise error(": expected the columns file,weight. Write file,weight as the first line.", "csv-header", 1)
    lines: dict[str, int] = {}
    weights: dict[str, float] = {}
    for number, row in rows[1:]:
        if len(row) != 2:
            raise error(f": expected 2 columns, got {len(row)}. Write file,weight.", "csv-columns", number)
        name = row[0].strip()
        if name not in known:
            raise error(
                f": data.root has no image {name!r}. {_nearest(name, known)}"
                "Paths are relative to data.root, with forward slashes.",
                "csv-unknown-file",
                number,
            )
        if name in lines:
            raise error(f": {name!r} already has a weight in line {lines[name]}. Keep one.", "csv-duplicate", number)
        weight = _weight(row[1])
        if weight is None:
            raise error(
                f": {name!r} has the weight {row[1].strip()!r}. Write a number that is at least 0.",
                "csv-weight",
                number,
            )
        lines[name], weights[name] = number, weight
    missing = [name for name in files if name not in weights]
    if missing:
        raise error(
            f" has no weight for {missing[0]!r} and {len(missing) - 1} more of {len(files)} training images. "
            "Add a line for each.",
            "csv-incomplete",
        )
    result = torch.tensor([weights[name] for name in files], dtype=torch.float32)
    if not result.any():
        raise error(
            ": all weights are 0, so no sample would be learned. Give at least one sample a weight.", "csv-all-zero"
        )
    return result


def _weight(text: str) -> float | None:
    """Return the weight, None if the text is not a finite number that is at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    return value if 0 <= value <= torch.finfo(torch.float32).max else None


def _nearest(name: str, known: Collection[str]) -> str:
    """Return a hint with a file of the same name in another folder, empty if there is none."""
    same = [file for file in known if file.rsplit("/", 1)[-1] == name.rsplit("/", 1)[-1]]
    return f"{nearest(name, same)} " if same else ""
