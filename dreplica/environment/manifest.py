"""Manifest of each replica's environment, exchanged and compared before the first step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from dreplica.distributed.alike import gather_alike
from dreplica.distributed.channel import Channel
from dreplica.distributed.process_group import World
from dreplica.environment.device import Device
from dreplica.environment.distributions import runs_kernels
from dreplica.environment.facts import collect_environment, describe_device
from dreplica.environment.variables import HARMLESS, STRICT, change_by, variable_may_round

# Fields that may differ between replicas without an error. A difference is recorded as a possible cause.
_MAY_DIFFER = {
    "host",
    "cpu.model",
    "device.index",
    "device.name",
    "device.uuid",
    "device.capability",
    "device.driver",
    "device.shared",
    "seed",
}
_MAY_DIFFER_BELOW = ("argv", "script", "commit", "distributions")
"""Fields, with those below them, that may differ, too: evidence where replicas diverge, and no reason to stop them."""
_MAY_ROUND = {"cpu.model", "device.name", "device.capability", "device.driver"}
_MOST_DISTRIBUTIONS = 8
"""Number of distributions whose versions are named where more differ between replicas."""
# Config keys that decide a field: a replica with one of the keys in its `overrides` may differ in the field.
_FOLLOWS_FROM = {
    "numerics.deterministic_algorithms": ("determinism.mode",),
    "numerics.deterministic_warn_only": ("determinism.mode",),
    "numerics.fill_uninitialized_memory": ("determinism.fill_uninitialized_memory",),
    "numerics.threads": ("determinism.threads",),
    "numerics.cudnn_benchmark": ("determinism.cudnn_benchmark",),
    "numerics.cudnn_deterministic": ("determinism.cudnn_deterministic", "determinism.mode"),
    "numerics.cudnn_tf32": ("determinism.tf32",),
    "numerics.matmul_tf32": ("determinism.tf32",),
    "numerics.float32_matmul_precision": ("determinism.tf32",),
    "numerics.cuda_matmul_fp32_precision": ("determinism.tf32",),
    "numerics.cudnn_conv_fp32_precision": ("determinism.tf32",),
    "numerics.cudnn_rnn_fp32_precision": ("determinism.tf32",),
    "numerics.matmul_fp16_reduced_precision": ("determinism.reduced_precision_reduction",),
    "numerics.matmul_bf16_reduced_precision": ("determinism.reduced_precision_reduction",),
    "numerics.onednn": ("determinism.onednn",),
    "numerics.cublas_workspace_config": ("determinism.cublas_workspace_config", "determinism.mode"),
    "weights": ("model.weights", "model.name", "model.factory", "replica.factory"),
    "device.type": ("world.device",),
    "device.cuda": ("world.device",),
    "device.cudnn": ("world.device",),
}


@dataclass(frozen=True)
class Difference:
    """A manifest field whose value differs between replicas."""

    field: str
    """Dotted name of the field."""
    values: tuple[Any, ...]
    """One value per replica."""
    allowed: bool
    """True if replicas may differ in the field, so that the difference is recorded but no error."""

    @property
    def may_round(self) -> bool:
        """True if sound hardware that differs in the field may round differently."""
        section, _, name = self.field.partition(".")
        if section == "variables":
            return variable_may_round(name)
        return self.field in _MAY_ROUND or runs_kernels(self.field)

    def __str__(self) -> str:
        groups: dict[str, list[int]] = {}
        for replica_id, value in enumerate(self.values):
            groups.setdefault(repr(value), []).append(replica_id)
        parts = (
            f"{value} on replica{'s' * (len(ids) > 1)} {', '.join(map(str, ids))}" for value, ids in groups.items()
        )
        section, _, name = self.field.partition(".")
        change = change_by(name) if section == "variables" else None
        return f"{self.field}: {'; '.join(parts)}{f' (it can change {change})' if change else ''}"


def collect_manifest(
    world: World, device: Device, seed: int | None, data_digest: str, weights_digest: str | None = None
) -> dict[str, Any]:
    """Return the manifest of this replica.

    Args:
        world: This replica's process, for the name of its host.
        device: This replica's device.
        seed: The model seed.
        data_digest: Digest of the data set as loaded.
        weights_digest: Digest of the file of pretrained weights, or None without one and before the build.

    Returns:
        JSON values by field.
    """
    row = collect_environment(device.device, seed)
    row |= {"host": world.host, "device": describe_device(device.device, device.shared)}
    return row | {"data": data_digest, "weights": weights_digest}


def compare_values(rows: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Return the dotted fields in which the replicas' mappings differ, none of them allowed."""
    flat = [_flatten(row) for row in rows]
    columns = {field: tuple(row.get(field) for row in flat) for field in sorted(set().union(*flat))}
    return [
        Difference(field, values, allowed=False)
        for field, values in columns.items()
        if any(value != values[0] for value in values)
    ]


def compare_manifests(
    manifests: Sequence[Mapping[str, Any]], declared: Mapping[int, Mapping[str, Any]]
) -> list[Difference]:
    """Return the fields in which replicas' manifests differ.

    Args:
        manifests: The manifest of each replica.
        declared: The config's `overrides` by replica id, which allow differences in the fields that they decide.
    """
    ignored = {f"variables.{name}" for name in HARMLESS}
    if any(_is_unread(row) for row in manifests):  # on a slow disk, git may list the changes on some replicas only
        ignored |= {"commit.dirty", "commit.diff"}
    different = [item for item in compare_values(manifests) if item.field not in ignored]
    found = [replace(item, allowed=_is_allowed(item, declared)) for item in different]
    named = {item.field.removeprefix("packages.") for item in found if item.field.startswith("packages.")}
    found = [item for item in found if item.field.removeprefix("distributions.") not in named]
    return _without_long_tail(found)


def gather_manifests(own: Mapping[str, Any], channel: Channel) -> list[dict[str, Any]]:
    """Exchange manifests, of which each replica sends only what differs from that of rank 0.

    Args:
        own: The manifest of this replica.
        channel: The control channel between all replicas.

    Returns:
        The manifest of each replica, in the order of ranks.

    Note:
        Collective: call on every rank.
    """
    return gather_alike(own, channel)


def _is_unread(manifest: Mapping[str, Any]) -> bool:
    commit = manifest.get("commit")
    return isinstance(commit, Mapping) and commit.get("dirty") is None


def _without_long_tail(found: Sequence[Difference]) -> list[Difference]:
    """Replace all but a few differing distributions with one difference that counts them."""
    rows = [item for item in found if item.field.startswith("distributions.")]
    # What torch may run comes first.
    tail = sorted(rows, key=lambda item: not item.may_round)[_MOST_DISTRIBUTIONS:]
    if len(tail) < 2:
        return list(found)
    texts = [repr([item.values[r] for item in tail]) for r in range(len(tail[0].values))]
    values = tuple(f"{len(tail)} more, digest {xxhash.xxh3_64_hexdigest(text.encode())}" for text in texts)
    return [*(item for item in found if item not in tail), Difference("distributions", values, allowed=True)]


def _is_allowed(difference: Difference, declared: Mapping[int, Mapping[str, Any]]) -> bool:
    section, _, name = difference.field.partition(".")
    if difference.field in _MAY_DIFFER or section in _MAY_DIFFER_BELOW:
        return True
    if section == "variables" and name not in STRICT:
        return True
    keys = {tuple(key.split(".")) for key in _FOLLOWS_FROM.get(difference.field, ())}
    undeclared = [
        value
        for replica_id, value in enumerate(difference.values)
        if not any(key in (declared.get(replica_id, {}).get(section) or {}) for section, key in keys)
    ]
    return all(value == undeclared[0] for value in undeclared)


def follows_from(field: str) -> tuple[str, ...]:
    """Return the dotted config keys that decide a manifest field.

    There are none for fields of the machine and its software.
    """
    return _FOLLOWS_FROM.get(field, ())


def spell_device(manifest: Mapping[str, Any]) -> str:
    """Return a text that names the physical device of a replica and its host."""
    device, host = manifest["device"], manifest["host"]
    if device["type"] != "cuda":
        return f"{manifest['cpu']['model'] or 'the CPU'} of host {host}"
    return f"{device['name']}, {card_of(manifest)}, cuda:{device['index']} of host {host}"


def card_of(manifest: Mapping[str, Any]) -> str | None:
    """Return the UUID of a replica's GPU or MIG slice as in nvidia-smi, or None on the CPU."""
    device = manifest["device"]
    if device["type"] != "cuda":
        return None
    return f"{'MIG' if ' MIG ' in device['name'] else 'GPU'}-{device['uuid']}"


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flatten(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            flat[f"{prefix}{key}"] = tuple(item)
        else:
            flat[f"{prefix}{key}"] = item
    return flat
