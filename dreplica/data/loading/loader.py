"""The loader: batches of exactly the samples that the coordinator sent."""

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dreplica.data.cache.device_cache import DeviceCachedImages
from dreplica.data.loading.index_stream import WINDOW, IndexStream, epoch_generator
from dreplica.data.samples import BatchId, SampleError, describe, load_batch, normalization, uncached
from dreplica.errors import UsageError
from dreplica.state.tensors import to_device

_PREFETCH = 2
"""Batches that each worker loads ahead."""


@dataclass(frozen=True)
class Batch:
    """One batch, on the replica's device."""

    indices: Tensor
    """Sample indices as the coordinator sent them: int64 (batch,), on the CPU."""
    inputs: Tensor
    """Inputs of the model, (batch, ...). uint8 images have been normalized to float32."""
    labels: Tensor
    """Labels, int64 (batch,)."""
    weights: Tensor | None = None
    """Weight of each sample in the loss, float32 (batch,). None weighs all samples equally."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that replicas compare as stage `batch`, by name."""
        named = {"inputs": self.inputs, "labels": self.labels}
        return named if self.weights is None else named | {"weights": self.weights}


@dataclass(frozen=True)
class LabelRange:
    """The labels that the criterion accepts. Others would fail with an index error, on a GPU with an opaque one."""

    num_classes: int
    """Number of classes. Labels are 0 to num_classes - 1."""
    ignored: int | None = None
    """The criterion's `ignore_index`, which is accepted, too."""

    def check(self, labels: Tensor, indices: Tensor, dataset: Dataset[Any]) -> None:
        """Raise SampleError for a label outside the range. Floats are not checked.

        Args:
            labels: Labels on the CPU, (batch,).
            indices: Sample indices, int64 (batch,).
            dataset: The data set, for the sample's name.
        """
        if labels.is_floating_point() or labels.dim() != 1:
            return
        wrong = (labels < 0) | (labels >= self.num_classes)
        if self.ignored is not None:
            wrong &= labels != self.ignored
        if wrong.any():
            position = int(wrong.nonzero()[0])
            raise SampleError(
                f"data.name: the sample at {describe(dataset, int(indices[position]))} has the label "
                f"{int(labels[position])}, and there are {self.num_classes} classes, counted from 0. "
                "Correct the label, or the number of classes that your function returns.",
                code="label-out-of-range",
                key="data.name",
                index=int(indices[position]),
                label=int(labels[position]),
                num_classes=self.num_classes,
            )


def load_batches(
    dataset: Dataset[Any],
    stream: IndexStream,
    device: torch.device,
    num_workers: int,
    seed: int,
    epoch: int,
    memory_format: torch.memory_format = torch.preserve_format,
    *,
    labels: LabelRange | None = None,
    weights: Tensor | None = None,
) -> Generator[Batch, None, None]:
    """Yield the stream's batches on `device`. Close the generator to end the workers early.

    Workers are seeded from (seed, epoch). The global generators of the training process are not used.

    Args:
        dataset: The data set, as seen in the epoch.
        stream: The index batches of the pass.
        device: The device of the batches.
        num_workers: Number of loader processes. 0 loads in this process.
        seed: `seed.data`, for the workers' seeds.
        epoch: The epoch (from 1), for the workers' seeds.
        memory_format: Memory format of image batches.
        labels: The accepted labels. None accepts all.
        weights: Weight of each sample of the data set, float32 (samples,).

    Raises:
        SampleError: If a sample cannot be loaded, in the training process and once its batch is due.
    """
    assert num_workers * _PREFETCH < WINDOW, "workers must not read past the window that was sent"
    if isinstance(dataset, DeviceCachedImages) and dataset.is_complete:
        for number in range(stream.first, len(stream)):
            stream.consumed(number)
            indices = stream.batch(number)
            yield _make_batch(dataset, indices, dataset.get(indices), device, memory_format, labels, weights)
        return
    loader: DataLoader[Any] = DataLoader(
        _Batches(dataset.source if isinstance(dataset, DeviceCachedImages) else dataset),
        batch_sampler=_IdentifiedBatches(stream),
        num_workers=num_workers,
        prefetch_factor=_PREFETCH if num_workers else None,
        collate_fn=_identity,
        pin_memory=device.type == "cuda",
        generator=epoch_generator(seed, epoch),
        worker_init_fn=isolate_worker_signals,
    )
    for number, loaded in enumerate(loader, start=stream.first):
        stream.consumed(number)
        yield _make_batch(dataset, stream.batch(number), loaded, device, memory_format, labels, weights)


def reload_batch(
    dataset: Dataset[Any],
    indices: Tensor,
    device: torch.device,
    memory_format: torch.memory_format = torch.preserve_format,
    *,
    weights: Tensor | None = None,
) -> Batch:
    """Load one batch in this process without caches, as `load_batches` would.

    Args:
        dataset: The data set, as seen in the epoch.
        indices: Sample indices, int64 (batch,).
        device: The device of the batch.
        memory_format: Memory format of image batches.
        weights: Weight of each sample of the data set, float32 (samples,).

    Raises:
        SampleError: If a sample cannot be loaded.
    """
    dataset = uncached(dataset)
    loader: DataLoader[Any] = DataLoader(
        _Batches(dataset),
        batch_sampler=[(None, indices.tolist())],  # type: ignore[list-item]
        collate_fn=_identity,
        generator=torch.Generator(),
    )
    return _make_batch(dataset, indices, next(iter(loader)), device, memory_format, None, weights)


def normalize(inputs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (pixel / 255 - mean) / std as float32.

    Args:
        inputs: uint8 (batch, channels, H, W).
        mean: Mean per channel, of pixels scaled to 0…1.
        std: Standard deviation per channel, of pixels scaled to 0…1.

    Returns:
        float32 (batch, channels, H, W) on the device of `inputs`.
    """
    shape = (1, -1, 1, 1)
    center, scale = (
        to_device(torch.tensor([255 * value for value in values]).view(shape), inputs.device) for values in (mean, std)
    )
    return inputs.to(torch.float32).sub_(center).div_(scale)


@dataclass(frozen=True)
class _IdentifiedBatches:
    """A batch sampler that yields each batch's indices with its BatchId."""

    stream: IndexStream

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Any]:
        stream = self.stream
        return (((stream.serial, number), indices) for number, indices in enumerate(stream, stream.first))


class _Batches(Dataset[Any]):
    """A data set that loads a batch at a time.

    It returns a SampleError instead of raising it, because an exception in a worker reaches the training process only
    as the text of a traceback.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, batch: tuple[BatchId | None, list[int]]) -> Any:
        batch_id, indices = batch
        try:
            inputs, labels = load_batch(self.dataset, indices, batch_id)
            return inputs, labels
        except UsageError as error:
            return SampleError(str(error), code=error.code, **error.fields)
        except (RuntimeError, TypeError, ValueError) as error:
            which = "; ".join(describe(self.dataset, index) for index in indices[:3])
            return SampleError(
                f"data.name: cannot collate these samples into a batch ({which}; ...): {error}. Return (input, label) "
                "with inputs of one shape and dtype, or return images and set data.image_size.",
                code="cannot-collate",
                key="data.name",
                indices=indices,
            )


def _identity(loaded: Any) -> Any:
    return loaded


def _make_batch(
    dataset: Dataset[Any],
    indices: Tensor,
    loaded: Any,
    device: torch.device,
    memory_format: torch.memory_format,
    accepted: LabelRange | None,
    weights: Tensor | None,
) -> Batch:
    if isinstance(loaded, SampleError):
        raise loaded
    inputs, labels = loaded
    if accepted is not None:
        accepted.check(labels, indices, dataset)
    if inputs.dim() != 4:
        memory_format = torch.preserve_format  # as nn.Module.to does: channels_last is for images
    inputs = to_device(inputs, device, memory_format)
    if isinstance(dataset, DeviceCachedImages):
        inputs = dataset.store_and_augment(indices, inputs, labels).contiguous(memory_format=memory_format)
    if inputs.dtype is torch.uint8:
        inputs = normalize(inputs, *normalization(dataset))
    return Batch(
        indices,
        inputs,
        to_device(labels, device),
        None if weights is None else to_device(weights[indices], device),
    )


def isolate_worker_signals(_worker_id: int) -> None:
    """Move a loader worker to a separate process group, with default signal handlers.

    Signals to the whole job (torchrun's SIGTERM, Ctrl-C) are for the training process, which still needs its workers
    then. A worker ends when the loader asks for it, or when it notices that its training process is gone.
    """
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
