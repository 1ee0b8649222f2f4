"""Hashing of all stages of a step: on the CPU, and for tensors on an NVIDIA GPU on that GPU where Triton works."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dreplica.distributed.channel import Channel
from dreplica.errors import DreplicaError
from dreplica.state.fingerprint import multilinear
from dreplica.state.fingerprint.fingerprint import ALGORITHM, WITH_MEMORY, num_bytes
from dreplica.state.fingerprint.pending_digests import Digests
from dreplica.state.stages import Entry, Stage, digest_entry, with_distinct_names

if TYPE_CHECKING:
    from dreplica.state.fingerprint.gpu import DeviceHash

log = logging.getLogger(__name__)

_Slot = tuple[torch.device, int]
"""A device, and the index of the digest in its output buffer."""


class KernelError(DreplicaError, RuntimeError):
    """The fingerprint kernel of a GPU computes wrong digests."""

    default_code = "fingerprint-kernel"


class Observation:
    """Digests of a replica's state at one moment, which a device may still be computing.

    Args:
        parts: Stage, in causal order, to entry name to the digest or to its slot on a device.
        sizes: Stage to bytes of tensors hashed.
        on_devices: Device to the digests that it computes.

    Attributes:
        num_bytes: Bytes of tensors hashed.
        splits: On a device mesh, stage to the axes over which each entry is split.
    """

    def __init__(
        self,
        parts: Mapping[str, Mapping[str, bytes | _Slot]],
        sizes: Mapping[str, int],
        on_devices: Mapping[torch.device, Digests],
    ) -> None:
        self.num_bytes = sum(sizes.values())
        self._parts, self._sizes, self._on_devices = parts, sizes, on_devices
        self.splits: Mapping[str, Sequence[frozenset[int]]] = {}
        self._stages: dict[str, Stage] | None = None

    @property
    def ready(self) -> bool:
        """True if reading `stages` would not wait."""
        return all(digests.ready for digests in self._on_devices.values())

    @property
    def stages(self) -> dict[str, Stage]:
        """Stage name to its digests, in causal order. Waits until all digests are computed."""
        if self._stages is None:
            buffers = {device: digests.all for device, digests in self._on_devices.items()}
            self._stages = {
                stage: Stage(
                    tuple(entries),
                    b"".join(
                        part if isinstance(part, bytes) else buffers[part[0]][16 * part[1] : 16 * part[1] + 16]
                        for part in entries.values()
                    ),
                    self._sizes[stage],
                )
                for stage, entries in self._parts.items()
            }
            self._parts, self._on_devices = {}, {}
        return self._stages


class Hasher:
    """Hashing of all stages of a step together.

    Args:
        on_device: Selects the tensors that are hashed on their own device, with one launch for all tensors of a device.
            By default none: tensors on other devices are copied to the CPU, with a warning. Sparse tensors and
            subclasses of Tensor are always hashed on the CPU.

    Attributes:
        algorithm: Name of the hash functions in use. Digests of different algorithms are never compared.
    """

    def __init__(self, on_device: Callable[[Tensor], bool] | None = None) -> None:
        self.algorithm = ALGORITHM if on_device is None else f"{ALGORITHM}+{multilinear.ALGORITHM}"
        self._on_device = on_device
        self._devices: dict[torch.device, DeviceHash] = {}

    @property
    def is_asynchronous(self) -> bool:
        """True if digests may still be computed when `start` has returned."""
        return self._on_device is not None

    def start(self, stages: Mapping[str, Iterable[Entry]]) -> Observation:
        """Start hashing the current bytes of all stages.

        The tensors may be overwritten as soon as this returns. A GPU hashes in its current stream, so wait there for
        work in other streams first, as for any operator.

        Raises:
            TypeError: If a tensor has no memory to hash. The message names it.
        """
        parts: dict[str, dict[str, bytes | _Slot]] = {}
        sizes: dict[str, int] = {}
        queued: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for stage, entries in stages.items():
            row = parts[stage] = {}
            sizes[stage] = 0
            for name, value in with_distinct_names(entries):
                if isinstance(value, Tensor):
                    sizes[stage] += num_bytes(value)
                    if self._on_device is not None and self._on_device(value) and _has_own_memory(value):
                        named = queued.setdefault(value.device, [])
                        row[name] = value.device, len(named)
                        named.append((name, value))
                        continue
                    if value.device.type != "cpu":
                        _warn_of_copy(value.device.type)
                row[name] = digest_entry(name, value)
        started = {device: self._device_hash(device).start(named) for device, named in queued.items()}
        return Observation(parts, sizes, started)

    def _device_hash(self, device: torch.device) -> "DeviceHash":
        from dreplica.state.fingerprint.gpu import DeviceHash  # needs Triton

        if device not in self._devices:
            self._devices[device] = DeviceHash(device)
        return self._devices[device]


def _has_own_memory(tensor: Tensor) -> bool:
    if type(tensor) not in WITH_MEMORY or tensor.layout is not torch.strided:
        return False
    return not (tensor.is_quantized or tensor.is_nested)


@lru_cache
def _warn_of_copy(device_type: str) -> None:
    log.warning("fingerprints of %s tensors are computed on a copy in CPU memory, which is slow", device_type)


def hasher_for(devices: Iterable[torch.device]) -> Hasher:
    """Return a hasher that uses the NVIDIA GPUs among `devices`, or the CPU if the kernel does not run there.

    Raises:
        KernelError: If the kernel runs but computes wrong digests.
    """
    gpus = sorted({device for device in devices if device.type == "cuda"}, key=str)
    if not gpus or torch.version.cuda is None:
        return Hasher()
    try:
        from dreplica.state.fingerprint.gpu import computes_as_defined

        wrong = [device for device in gpus if not computes_as_defined(device)]
    except Exception as error:  # Triton, a compiler or the GPU may be missing, unsupported or too old in many ways
        log.warning("fingerprints are computed on the CPU, not on %s: %s: %s", gpus[0], type(error).__name__, error)
        return Hasher()
    if wrong:
        names = ", ".join(map(str, wrong))
        raise KernelError(
            f"the fingerprint kernel on {names} computes wrong digests: the GPU, its driver or Triton is faulty. "
            "Exclude this GPU (CUDA_VISIBLE_DEVICES), or update the driver and Triton.",
            devices=list(map(str, wrong)),
        )
    return Hasher(lambda tensor: tensor.is_cuda)


def common_hasher(devices: Iterable[torch.device], channel: Channel) -> tuple[Hasher, list[str]]:
    """Choose a hasher of the same algorithm on all replicas.

    Note:
        Collective: call it on every rank.

    Args:
        devices: The devices of this replica's tensors.
        channel: The control channel between all replicas.

    Returns:
        The hasher of this replica's devices if all replicas have the same algorithm, otherwise that of the CPU; and
        for each replica the algorithm that its devices support.

    Raises:
        KernelError: On all replicas, if the kernel of any computes wrong digests.
    """
    own, failure = Hasher(), None
    try:
        own = hasher_for(devices)
    except KernelError as error:  # raised after the collective, on all replicas
        failure = str(error)
    rows = channel.gather((own.algorithm, failure))
    failures = [f"replica {rank}: {text}" for rank, (_, text) in enumerate(rows) if text is not None]
    if failures:
        raise KernelError("; ".join(failures))
    algorithms = [algorithm for algorithm, _ in rows]
    return own if len(set(algorithms)) == 1 else Hasher(), algorithms


def describe_fallback(algorithms: Iterable[str]) -> str:
    """Return the warning for replicas that cannot all hash on their GPUs, from `common_hasher`'s second result."""
    rows = ", ".join(f"replica {replica_id}: {algorithm}" for replica_id, algorithm in enumerate(algorithms))
    return f"fingerprints are computed on the CPU, because not all replicas support the same algorithm: {rows}"


def negotiated_hasher(devices: Iterable[torch.device], channel: Channel | None) -> Hasher:
    """Return the hasher of `common_hasher` and log a warning if replicas support different algorithms.

    Without a channel, return this replica's own hasher.

    Note:
        Collective: call it on every rank.
    """
    if channel is None:
        return hasher_for(devices)
    hasher, algorithms = common_hasher(devices, channel)
    if len(set(algorithms)) > 1:
        log.warning(describe_fallback(algorithms))
    return hasher
