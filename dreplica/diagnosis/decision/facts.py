"""The known facts of a run, from which verdicts are concluded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dreplica.environment.manifest import Difference


@dataclass(frozen=True)
class BuildFacts:
    """Seeds and generators of one replica's build."""

    seed: int
    """The seed that the replica's generators were given."""
    seed_after: int
    """`torch.initial_seed()` after the build; differs from `seed` if the build seeded again."""
    rng_before: bytes
    """Digest of all generators just before the build."""
    rng_after: bytes
    """Digest of all generators just after the build."""


@dataclass
class RunFacts:
    """The known facts of a run, except the comparison itself."""

    num_replicas: int
    """Number of replicas in the run."""
    seeded: bool = True
    """True if `seed.model` is set."""
    shared_seed: bool = True
    """True if `seed.model` gives all replicas the same seed."""
    overrides: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """The config's declared differences: replica id to section to key to value."""
    differences: Sequence[Difference] = ()
    """Manifest fields in which the replicas differ."""
    builds: Sequence[BuildFacts] = ()
    """Facts of each replica's build, by replica id; empty before the build."""
    manifests: Sequence[Mapping[str, Any]] = ()
    """Each replica's manifest, by replica id."""
