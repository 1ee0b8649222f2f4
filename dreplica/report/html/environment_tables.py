"""Tables of the replicas and of their environment."""

import shlex
from collections.abc import Mapping
from typing import Any

from dreplica.agreement.trace.report_records import ReplicaInfo
from dreplica.environment.manifest import compare_manifests
from dreplica.report.html.charts import LAST, Table, name_replicas, percent
from dreplica.report.html.run_files import RunFiles


def replicas_table(run: RunFiles) -> Table:
    """Return one row per replica: host, device, seed, final accuracy and digests. Empty columns are left out."""
    report = run.report
    fingerprints = {row.replica: row.digests for row in report.fingerprints} if report else {}
    last = run.epochs[-1]["val"].get("accuracy", []) if run.epochs else []
    rows = []
    for r, row in enumerate((report.replicas if report else []) or _replicas_of(run.manifests)):
        digests = fingerprints.get(r, {})
        shown = ["" if fact is None else str(fact) for fact in (row.host, row.device, row.seed)]
        accuracy = percent(last[r]) if r < len(last) else ("", LAST)
        rows.append([(str(r), r), *shown, accuracy, *(digests.get(k, "")[:12] for k in ("weights", "buffers"))])
    columns = ["replica", "host", "device", "seed", "validation accuracy", "weights", "buffers"]
    kept = [i for i in range(len(columns)) if any(row[i] not in ("", ("", LAST)) for row in rows)]
    return Table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _replicas_of(manifests: list[dict[str, Any]]) -> list[ReplicaInfo]:
    """Return what manifests say about the replicas. Their values may have any type."""
    return [
        ReplicaInfo.model_construct(
            replica=r, host=row.get("host"), device=(row.get("device") or {}).get("name"), seed=row.get("seed")
        )
        for r, row in enumerate(manifests)
    ]


def environment_table(run: RunFiles) -> Table | None:
    """Return the manifest fields that differ between replicas, or None if there are none."""
    overrides = run.config.get("overrides") or {}
    rows = [{key: value for key, value in row.items() if key != "replica"} for row in run.manifests]
    cells = []
    for difference in compare_manifests(rows, overrides) if len(rows) > 1 else []:
        groups: dict[str, list[int]] = {}
        for replica_id, value in enumerate(difference.values):
            groups.setdefault(str(value), []).append(replica_id)
        sides = "; ".join(f"{value} on {name_replicas(ids, len(rows))}" for value, ids in groups.items())
        cells.append([difference.field, sides, "yes" if difference.allowed else "no"])
    return Table(["field", "values", "may differ"], cells) if cells else None


def manifest_table(run: RunFiles) -> Table | None:
    """Return the manifest fields of replica 0, without variables that are not set and without distributions."""
    if not run.manifests:
        return None
    manifest = {key: value for key, value in run.manifests[0].items() if key != "distributions"}
    if isinstance(argv := manifest.get("argv"), list):
        manifest["argv"] = shlex.join(map(str, argv))
    if isinstance(variables := manifest.get("variables"), dict):
        manifest["variables"] = {name: value for name, value in variables.items() if value is not None}
    return Table(["field", "replica 0"], [[name, str(value)] for name, value in _flat(manifest)])


def distributions_table(run: RunFiles) -> Table | None:
    """Return the installed distributions of replica 0 and their versions, or None if they are not recorded."""
    found = run.manifests[0].get("distributions") if run.manifests else None
    if not found or not isinstance(found, dict):
        return None
    return Table(["distribution", "version"], [[str(name), str(version)] for name, version in found.items()])


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        rows += _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else [(f"{prefix}{key}", item)]
    return rows
