"""Who computes fingerprints: the CPU those of its tensors, a GPU those of its own, where Triton works."""

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dreplica.distributed.channel import Channel
from dreplica.state.fingerprint import multilinear
from dreplica.state.fingerprint.fingerprint import ALGORITHM, WITH_MEMORY, num_bytes
from dreplica.state.fingerprint.pending_digests import Digests
from dreplica.state.stages import Entry, Stage, digest_entry, with_distinct_names

if TYPE_CHECKING:
    from dreplica.state.fingerprint.gpu import DeviceHash

log = logging.getLogger(__name__)

_Place = tuple[torch.device, int]
"""Where a digest is to come: of the device's, the how many-th."""


class Observation:
    """What a replica holds at one moment, stage by stage; its device may still be computing the digests.

    Args:
        parts: of each stage, in causal order, its entries: a name, and a digest or where to find it.
        sizes: bytes of tensors hashed, by stage.
        on_devices: digests to come.

    Attributes:
        num_bytes: bytes of tensors hashed.
    """

    def __init__(
        self,
        parts: Mapping[str, Mapping[str, bytes | _Place]],
        sizes: Mapping[str, int],
        on_devices: Mapping[torch.device, Digests],
    ) -> None:
        self.num_bytes = sum(sizes.values())
        self._parts, self._sizes, self._on_devices = parts, sizes, on_devices
        self._stages: dict[str, Stage] | None = None

    @property
    def ready(self) -> bool:
        """Whether `stages` would not wait."""
        return all(digests.ready for digests in self._on_devices.values())

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages, in causal order. Waits until all digests are there."""
        if self._stages is None:
            everything = {device: digests.all for device, digests in self._on_devices.items()}
            self._stages = {
                stage: Stage(
                    tuple(entries),
                    b"".join(
                        part if isinstance(part, bytes) else everything[part[0]][16 * part[1] : 16 * part[1] + 16]
                        for part in entries.values()
                    ),
                    self._sizes[stage],
                )
                for stage, entries in self._parts.items()
            }
            self._parts, self._on_devices = {}, {}
        return self._stages


class Hasher:
    """Takes the fingerprints of all of a step's stages.

    Args:
        takes: which tensors are hashed on their device, with one launch for all on the same; by default none: tensors
            elsewhere are copied to the CPU, with a warning. Sparse tensors and subclasses of Tensor are in any case.

    Attributes:
        algorithm: names the functions in use: digests of different ones are never compared.
    """

    def __init__(self, takes: Callable[[Tensor], bool] | None = None) -> None:
        self.algorithm = ALGORITHM if takes is None else f"{ALGORITHM}+{multilinear.ALGORITHM}"
        self._takes = takes
        self._devices: dict[torch.device, DeviceHash] = {}

    @property
    def is_asynchronous(self) -> bool:
        """Whether digests may come after `start` has returned."""
        return self._takes is not None

    def start(self, stages: Mapping[str, Iterable[Entry]]) -> Observation:
        """Starts on the entries of all stages as they are now; the tensors may change as soon as it returns.

        On a GPU in its current stream, so what runs in others must be awaited there first, as for any operator.
        """
        parts: dict[str, dict[str, bytes | _Place]] = {}
        sizes: dict[str, int] = {}
        there: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for stage, entries in stages.items():
            own = parts[stage] = {}
            sizes[stage] = 0
            for name, value in with_distinct_names(entries):
                if isinstance(value, Tensor):
                    sizes[stage] += num_bytes(value)
                    if self._takes is not None and self._takes(value) and _has_memory_of_its_own(value):
                        named = there.setdefault(value.device, [])
                        own[name] = value.device, len(named)
                        named.append((name, value))
                        continue
                    if value.device.type != "cpu":
                        _warn_of_copy(value.device.type)
                own[name] = digest_entry(name, value)
        return Observation(parts, sizes, {device: self._on(device).start(named) for device, named in there.items()})

    def _on(self, device: torch.device) -> "DeviceHash":
        from dreplica.state.fingerprint.gpu import DeviceHash  # needs Triton

        if device not in self._devices:
            self._devices[device] = DeviceHash(device)
        return self._devices[device]


def _has_memory_of_its_own(tensor: Tensor) -> bool:
    if type(tensor) not in WITH_MEMORY or tensor.layout is not torch.strided:
        return False
    return not (tensor.is_quantized or tensor.is_nested)


@lru_cache
def _warn_of_copy(device_type: str) -> None:
    log.warning("fingerprints of tensors on %s are taken through a copy to the CPU, which is slow", device_type)


def hasher_for(devices: Iterable[torch.device]) -> Hasher:
    """Hashes on those of `devices` that are NVIDIA GPUs, if the kernel works there, else through copies to the CPU.

    Raises RuntimeError if it runs and computes something else than its definition.
    """
    gpus = sorted({device for device in devices if device.type == "cuda"}, key=str)
    if not gpus or torch.version.cuda is None:
        return Hasher()
    try:
        from dreplica.state.fingerprint.gpu import computes_as_defined

        wrong = [device for device in gpus if not computes_as_defined(device)]
    except Exception as error:  # Triton, a compiler or the card may be missing, unfit or too old in many ways
        log.warning("no fingerprints on %s itself: %s: %s", gpus[0], type(error).__name__, error)
        return Hasher()
    if wrong:
        raise RuntimeError(
            f"the fingerprint kernel on {', '.join(map(str, wrong))} computes something else than its definition: this "
            "card, its driver or Triton is at fault. Leave the card out, or pass hasher=Hasher() to Agreement."
        )
    return Hasher(lambda tensor: tensor.is_cuda)


def common_hasher(device: torch.device, channel: Channel) -> tuple[Hasher, list[str]]:
    """That for the replicas' devices where it is the same on all, else the CPU's; and what each one's own computes.

    A collective. Raises RuntimeError as `hasher_for` does.
    """
    own = hasher_for([device])
    algorithms = channel.gather(own.algorithm)
    return own if len(set(algorithms)) == 1 else Hasher(), algorithms
