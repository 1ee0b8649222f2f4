"""The verdict on copies of a tensor that differ on a mesh."""

from collections.abc import Mapping, Sequence

from dreplica.agreement.mesh.axes import Axes
from dreplica.agreement.mesh.shards import Located
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.location import describe
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.distributed.rank_names import name_ranks

_MOST_NAMED = 5
"""Parts of tensors named in a line of evidence."""
_REMEDIES = {"buffers": ("mesh-buffers-alike",), "gradients": ("mesh-reduce-gradient", "mesh-clip-whole-norm")}
"""Stage to remedies, where it is not the build."""


def describe_located(located: Located, axes: Axes, epoch: int | None, with_advice: bool) -> Verdict:
    """Return the verdict on copies that differ.

    Args:
        located: The first place where they differ.
        axes: The mesh.
        epoch: The epoch of the step, if known.
        with_advice: True to suggest remedies that fit the stage.
    """
    place = located.place
    members = sorted(rank for ids in place.groups for rank in ids)
    verdict = describe(place, epoch, len(members))
    if place.stage is None:
        return verdict
    where = spell(located.shard)
    copies = [axis for axis in axes.names if axis not in located.shard]
    lines = [
        Evidence.of(
            "shard-differs",
            ranks=name_ranks(members),
            axes=" x ".join(copies),
            shard=where or "the whole tensor",
            coordinates={str(rank): list(axes.coordinate_of(rank)) for rank in members},
        )
    ]
    if located.others:
        some = "; ".join(spell(other) or "whole tensors" for other in located.others[:_MOST_NAMED])
        lines.append(Evidence.of("shards-differ-too", count=len(located.others), some=some, shards=located.others))
    summary = f"{verdict.summary} of the mesh {axes}" + (f", shard {where}" if where else "")
    return verdict.with_(
        summary=summary,
        evidence=[*verdict.evidence[:1], *lines, *verdict.evidence[1:]],
        remedy=_remedies(place.step, place.stage, copies) if with_advice and place.phase is None else [],
        shard=located.shard or None,
        mesh=dict(zip(axes.names, axes.sizes, strict=True)),
    )


def spell(shard: Mapping[str, int]) -> str:
    """Return a part of a tensor in words."""
    return ", ".join(f"{axis} {position}" for axis, position in shard.items())


def _remedies(step: int, stage: str, copies: Sequence[str]) -> list[Remedy]:
    if step == 0:
        return [Remedy.of("mesh-seed-alike")]
    return [Remedy.of(code, axes=" and ".join(copies)) for code in _REMEDIES.get(stage, ("mesh-update-alike",))]
