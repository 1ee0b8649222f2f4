"""Loads exactly the samples that the coordinator sent."""

import os
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dreplica.data.cache.device_cache import OnDevice
from dreplica.data.loading.index_stream import WINDOW, IndexStream, epoch_generator
from dreplica.data.samples import Place, SampleError, by_itself, describe, load_batch, normalization
from dreplica.errors import UsageError
from dreplica.state.tensors import to_device

_PREFETCH = 2


@dataclass(frozen=True)
class Batch:
    """One batch, on the replica's device."""

    indices: Tensor
    """(batch,) int64, on the CPU: which samples, as the coordinator sent them."""
    inputs: Tensor
    """(batch, ...): as it reaches the model. Images of bytes are float32 by then, and normalised."""
    labels: Tensor
    """(batch,) int64."""
    weights: Tensor | None = None
    """(batch,) float32: what each sample counts in the loss; None: all the same."""

    def tensors(self) -> dict[str, Tensor]:
        """What replicas compare as stage `batch`, by name."""
        named = {"inputs": self.inputs, "labels": self.labels}
        return named if self.weights is None else named | {"weights": self.weights}


@dataclass(frozen=True)
class Labels:
    """What labels may be; others would end in an index error, or on a GPU in nothing that one can read."""

    num_classes: int
    ignored: int | None = None
    """The criterion's `ignore_index`."""

    def check(self, labels: Tensor, indices: Tensor, dataset: Dataset[Any]) -> None:
        """Raises SampleError for a label that is no class. `labels`: (batch,), on the CPU; floats are not judged."""
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
                "Correct the label, or the number of classes that your function returns."
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
    labels: Labels | None = None,
    weights: Tensor | None = None,
) -> Generator[Batch, None, None]:
    """The stream's batches, loaded by `num_workers` processes and moved to `device`; close it to end them early.

    Workers are seeded from (seed, epoch); the training process's own generators are not drawn from. `labels`: what they
    may be; `weights`: (samples,) of the data set. Raises SampleError for a sample that cannot be loaded, once its batch
    is due, in the training process, whichever process has tried.
    """
    assert num_workers * _PREFETCH < WINDOW, "workers must not read past the window that was sent"
    if isinstance(dataset, OnDevice) and dataset.is_complete:
        for number in range(stream.first, len(stream)):
            stream.consumed(number)
            indices = stream.batch(number)
            yield _make_batch(dataset, indices, dataset.get(indices), device, memory_format, labels, weights)
        return
    loader: DataLoader[Any] = DataLoader(
        _Batches(dataset.source if isinstance(dataset, OnDevice) else dataset),
        batch_sampler=_Placed(stream),
        num_workers=num_workers,
        prefetch_factor=_PREFETCH if num_workers else None,
        collate_fn=_as_it_is,
        pin_memory=device.type == "cuda",
        generator=epoch_generator(seed, epoch),
        worker_init_fn=leave_the_group,
    )
    for number, loaded in enumerate(loader, start=stream.first):
        stream.consumed(number)
        yield _make_batch(dataset, stream.batch(number), loaded, device, memory_format, labels, weights)


def load_again(
    dataset: Dataset[Any],
    indices: Tensor,
    device: torch.device,
    memory_format: torch.memory_format = torch.preserve_format,
    *,
    weights: Tensor | None = None,
) -> Batch:
    """One batch of the given samples, loaded in this process, as `load_batches` would; images are decoded anew."""
    dataset = by_itself(dataset)
    loader: DataLoader[Any] = DataLoader(
        _Batches(dataset),
        batch_sampler=[(None, indices.tolist())],  # type: ignore[list-item]
        collate_fn=_as_it_is,
        generator=torch.Generator(),
    )
    return _make_batch(dataset, indices, next(iter(loader)), device, memory_format, None, weights)


def normalize(inputs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixel / 255 - mean) / std: uint8 (batch, channels, H, W) to float32, on the tensor's device."""
    shape = (1, -1, 1, 1)
    center, scale = (
        to_device(torch.tensor([255 * value for value in values]).view(shape), inputs.device) for values in (mean, std)
    )
    return inputs.to(torch.float32).sub_(center).div_(scale)


@dataclass(frozen=True)
class _Placed:
    """A batch sampler that says of each batch which it is."""

    stream: IndexStream

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self) -> Iterator[Any]:
        stream = self.stream
        return (((stream.serial, number), indices) for number, indices in enumerate(stream, stream.first))


class _Batches(Dataset[Any]):
    """Loads a batch at a time, in whichever process. What cannot be loaded comes back as a SampleError, returned: what
    a worker raises reaches the trainer as the text of a traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, placed: tuple[Place | None, list[int]]) -> Any:
        place, indices = placed
        try:
            inputs, labels = load_batch(self.dataset, indices, place)
            return inputs, labels
        except UsageError as error:
            return SampleError(str(error))
        except (RuntimeError, TypeError, ValueError) as error:
            which = "; ".join(describe(self.dataset, index) for index in indices[:3])
            return SampleError(
                f"data.name: these samples do not go together into a batch ({which}; ...): {error}. Let the data set "
                "give (input, label), inputs of one shape and dtype; or images, and set data.image_size."
            )


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _make_batch(
    dataset: Dataset[Any],
    indices: Tensor,
    loaded: Any,
    device: torch.device,
    memory_format: torch.memory_format,
    rule: Labels | None,
    weights: Tensor | None,
) -> Batch:
    if isinstance(loaded, SampleError):
        raise loaded
    inputs, labels = loaded
    if rule is not None:
        rule.check(labels, indices, dataset)
    if inputs.dim() != 4:
        memory_format = torch.preserve_format  # as nn.Module.to does: channels_last is for images
    inputs = to_device(inputs, device, memory_format)
    if isinstance(dataset, OnDevice):
        inputs = dataset.keep_and_augment(indices, inputs, labels).contiguous(memory_format=memory_format)
    if inputs.dtype is torch.uint8:
        inputs = normalize(inputs, *normalization(dataset))
    return Batch(
        indices,
        inputs,
        to_device(labels, device),
        None if weights is None else to_device(weights[indices], device),
    )


def leave_the_group(_worker_id: int) -> None:
    """Signals to the whole job (torchrun's SIGTERM, Ctrl-C) are the trainer's, which still needs its workers then.

    A worker ends when the loader tells it to, and notices by itself when its trainer is gone.
    """
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
