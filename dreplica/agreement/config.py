"""The `agreement` section."""

from typing import Annotated, Literal

from pydantic import Field

from dreplica.section import Lockstep, Section


class AgreementConfig(Section):
    """What is compared, how often, and what happens when it differs."""

    every: Annotated[int, Lockstep()] = Field(1, ge=0)
    """Compare every so many steps; 0: never."""
    expect: Annotated[Literal["auto", "identical", "independent"], Lockstep()] = "auto"
    """`identical`: all state must be equal; `independent`: indices and batches must be, states need not; `auto`:
    identical unless `seed.model` gives replicas distinct seeds."""
    snapshot_every: Annotated[int, Lockstep()] = Field(50, ge=0)
    """Steps between snapshots kept in memory, from which a divergence is replayed; 0: no snapshots, no replay."""
    on_divergence: Annotated[Literal["stop", "continue"], Lockstep()] = "stop"
    """`stop` at the first difference, or `continue` and only record it."""
    record: Annotated[Literal["stages", "tensors"], Lockstep()] = "stages"
    """What the run folder keeps of every checked step: the digest of each stage (trace.jsonl) or, beside it, of each
    single tensor, too (tensors.bin: 16 bytes for each), so that `dreplica compare` can name the tensor."""
