"""What to compare, the settings that must be the same on every rank, and generators that should be."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dreplica.agreement.generators import describe_unseeded, differing
from dreplica.distributed.channel import Channel
from dreplica.errors import SharedUsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What `Agreement` was asked to compare, and when."""

    expect: str
    """What must agree: `identical`, `independent` or `ddp`."""
    compared: frozenset[str]
    """Names of the stages to compare."""
    every: int
    """Steps between comparisons; 0 for none."""
    on_divergence: str
    """`stop` to raise `Divergence`, or `continue`."""
    lag: int
    """1 to complete a comparison during the next step, otherwise 0."""
    timeout: float
    """Seconds to wait for another rank."""
    steps_done: int
    """Number of steps taken before."""
    quiet: bool
    """Leave it to the caller to say what was compared."""
    group: Any = None
    """The process group of the ranks to compare, or None for that of the model or the default one."""
    mesh: Any = None
    """The DeviceMesh of all ranks, or None for that of the model's DTensors."""
    partitioned: tuple[str, ...] = ()
    """Axes of the mesh along which ranks hold different tensors."""


def exchange_settings(channel: Channel, settings: Mapping[str, Any], generators: Mapping[str, str]) -> list[str]:
    """Check that all ranks have the same settings, and return the generators that differ between them.

    Note:
        Collective: call it on every rank.

    Args:
        channel: The control channel between all ranks.
        settings: Argument name to value, as JSON values.
        generators: Generator name to the digest of its state on this rank, or empty where they are not compared.

    Returns:
        Names of the generators that differ. Rank 0 logs a message about them.

    Raises:
        SharedUsageError: On all ranks, if a setting differs between them.
    """
    rows = channel.gather((dict(settings), dict(generators)))
    for name in settings:
        values = [row[name] for row, _ in rows]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise SharedUsageError(
                f"{name} must be the same on every rank, got {values[0]!r} on rank 0 and {values[other]!r} on rank "
                f"{other}. Pass the same value on every rank.",
                code="settings-differ",
                argument=name,
                values=values,
            )
    unseeded = differing([digests for _, digests in rows])
    if unseeded and channel.rank == 0:
        log.info(describe_unseeded(unseeded))
    return unseeded
