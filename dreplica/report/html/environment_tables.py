"""What the report says of the replicas and of what they ran on."""

from collections.abc import Mapping
from typing import Any

from dreplica.environment.manifest import compare_manifests
from dreplica.report.html.charts import LAST, Table, name_replicas, percent
from dreplica.report.html.run_files import RunFiles


def replicas_table(run: RunFiles) -> Table:
    """Each replica: where, on what, from which seed, to which accuracy and weights."""
    report = run.report or {}
    replicas = report.get("replicas") or [
        {**manifest, "device": (manifest.get("device") or {}).get("name")} for manifest in run.manifests
    ]
    fingerprints = {row["replica"]: row for row in report.get("fingerprints") or []}
    last = run.epochs[-1]["val"].get("accuracy", []) if run.epochs else []
    rows = []
    for r, row in enumerate(replicas):
        digests = fingerprints.get(r, {})
        facts = [row.get("host"), row.get("device"), row.get("seed")]
        shown = ["" if fact is None else str(fact) for fact in facts]
        accuracy = percent(last[r]) if r < len(last) else ("", LAST)
        rows.append([(str(r), r), *shown, accuracy, *(digests.get(k, "")[:12] for k in ("weights", "buffers"))])
    columns = ["replica", "host", "device", "seed", "validation accuracy", "weights", "buffers"]
    told = [i for i in range(len(columns)) if any(row[i] not in ("", ("", LAST)) for row in rows)]
    return Table([columns[i] for i in told], [[row[i] for i in told] for row in rows])


def environment_table(run: RunFiles) -> Table | None:
    """The manifest's fields on which replicas differ; None if there is none."""
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
    """All of the manifest, as replica 0 has it."""
    if not run.manifests:
        return None
    return Table(["field", "replica 0"], [[name, str(value)] for name, value in _flat(run.manifests[0])])


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        rows += _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else [(f"{prefix}{key}", item)]
    return rows
