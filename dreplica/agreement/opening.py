"""What a comparison needs: agreed settings, the hasher, the run folders, the exchange between ranks."""

from dataclasses import dataclass
from typing import Any

import torch

from dreplica.agreement.arguments import InternalArguments, check_algorithm
from dreplica.agreement.exchange import Exchange
from dreplica.agreement.generators import GeneratorUse
from dreplica.agreement.hasher import Hasher, negotiated_hasher
from dreplica.agreement.mesh.shards import Shards, open_shards
from dreplica.agreement.notices.notices import Notices
from dreplica.agreement.run_folders import RunFolders
from dreplica.agreement.settings import Settings, exchange_settings
from dreplica.agreement.subject import Subject
from dreplica.agreement.trace.writer import TraceWriter
from dreplica.agreement.verdict.signs import Sign
from dreplica.distributed.channel import Channel
from dreplica.distributed.together import together
from dreplica.environment.facts import collect_environment
from dreplica.errors import SharedUsageError


@dataclass(frozen=True)
class Parts:
    """What a comparison needs. `folders` and `notices` are to be closed."""

    hasher: Hasher
    folders: RunFolders
    exchange: Exchange
    notices: Notices
    shards: Shards | None
    """The parts of tensors that this rank of a mesh holds, or None without a mesh."""


def open_parts(
    subject: Subject,
    generators: GeneratorUse,
    settings: Settings,
    channel: Channel,
    record: str | None,
    reference: str | None,
    internal: InternalArguments,
) -> Parts:
    """Agree with the other ranks on the settings, and open what the comparison needs.

    Note:
        Collective: call it on every rank.

    Args:
        subject: The models and optimizers to compare.
        generators: Which global generators are compared.
        settings: What to compare, and when.
        channel: The control channel between all ranks.
        record: Path of a new run folder, or None.
        reference: Path of a recorded run, or None.
        internal: The further keyword arguments of `Agreement`.

    Raises:
        UsageError: If the ranks' settings differ, or something cannot be opened.
    """
    shards = together(channel, lambda: open_shards(subject, settings.mesh, settings.partitioned, channel))
    if shards is not None and (record or reference):
        text = "record and reference are not possible for a model on a device mesh. Omit them."
        raise SharedUsageError(text, code="mesh-not-recorded")
    compares_rng = "rng" in settings.compared and settings.every and generators.not_drawn
    unseeded = exchange_settings(
        channel,
        _as_values(settings, shards) | {"record": record, "reference": reference},
        generators.first_digests if compares_rng else {},
    )
    devices = [tensor.device for tensor in subject.tensors()]
    hasher = internal.get("hasher") or negotiated_hasher(devices, channel if settings.every else None)
    manifest = collect_environment(devices[0] if devices else torch.device("cpu")) if record or reference else {}
    run = hasher.algorithm, settings.expect, settings.steps_done
    folders = RunFolders(channel, record, reference, manifest, *run)
    try:
        if settings.steps_done:
            generators.resume(folders.not_drawn())
        trace = internal.get("trace") or folders.trace
        trace = trace or TraceWriter(None, channel.size, algorithm=hasher.algorithm)
        check_algorithm(trace, hasher)
        recorded = internal.get("recorded") or folders.reference
        comparison = channel, hasher, trace, recorded, _signs(settings, subject), unseeded
        exchange = Exchange(*comparison, with_advice=not settings.quiet, shards=shards)
        has_own_samples = settings.expect == "ddp" and shards is None  # tensor-parallel ranks have the same
        return Parts(hasher, folders, exchange, Notices(subject, channel, hasher, has_own_samples), shards)
    except BaseException:
        folders.close()
        raise


def _as_values(settings: Settings, shards: Shards | None) -> dict[str, Any]:
    """Return the settings that must be the same on every rank, by the name of their argument."""
    return {
        "expect": settings.expect,
        "stages": sorted(settings.compared),
        "every": settings.every,
        "lag": settings.lag,
        "on_divergence": settings.on_divergence,
        "steps_done": settings.steps_done,
        "partitioned": sorted(settings.partitioned),
        "mesh": None if shards is None else str(shards.axes),
    }


def _signs(settings: Settings, subject: Subject) -> list[Sign]:
    """Return what is known of the run that remedies depend on."""
    is_ddp = settings.expect == "ddp"
    known = {Sign.LIBRARY: not settings.quiet, Sign.DDP: is_ddp, Sign.WRAPPED: is_ddp and subject.is_ddp}
    return [sign for sign, holds in known.items() if holds]
