"""Conversion of `report.json` from schema 1, which versions before 0.2 wrote."""

from typing import Any

_COMMAND_STARTS = ("--", "dreplica ", "torchrun ", "pip ", "sudo ")
"""First words of a remedy that is a command: schema 1 holds remedies as text only."""


def upgrade_schema_1(content: dict[str, Any]) -> dict[str, Any]:
    """Convert a report from schema 1 to the current schema.

    Values of unexpected types are kept, so that validation reports them.

    Args:
        content: The JSON object, without its key `schema`. It is changed in place.

    Returns:
        The same object.
    """
    verdict, divergence, run = (content.get(key) for key in ("verdict", "divergence", "run"))
    if isinstance(verdict, dict):
        _rename(verdict, "classes", "groups")
        for key, convert in (("evidence", _evidence), ("remedy", _remedy)):
            if isinstance(verdict.get(key), list):
                verdict[key] = [convert(line) if isinstance(line, str) else line for line in verdict[key]]
    if isinstance(divergence, dict):
        _rename(divergence, "stage_classes", "stage_groups")
    if isinstance(run, dict) and "last_step" not in run:
        run["last_step"] = run.get("stopped_after")  # the first reports had no last_step
    if isinstance(content.get("epochs"), list):
        for row in content["epochs"]:
            _convert_metrics(row)
    return content


def _rename(values: dict[str, Any], old: str, new: str) -> None:
    if old in values:
        values[new] = values.pop(old)


def _evidence(line: str) -> dict[str, Any]:
    return {"code": "text", "text": line, "data": {"text": line}}


def _remedy(line: str) -> dict[str, Any]:
    command, _, remark = line.partition("  #")
    if remark or line.startswith(_COMMAND_STARTS):
        return {"code": "text", "text": remark.strip(), "command": command, "data": {"text": line}}
    return {"code": "text", "text": line, "data": {"text": line}}


def _convert_metrics(row: Any) -> None:
    """Group the values of an epoch's metrics: schema 1 holds one value per replica."""
    for part in ("train", "val"):
        metrics = row.get(part) if isinstance(row, dict) else None
        if isinstance(metrics, dict):
            row[part] = {name: _groups(values) for name, values in metrics.items()}


def _groups(values: Any) -> Any:
    if not isinstance(values, list):
        return values
    groups: dict[str, dict[str, Any]] = {}
    for replica_id, value in enumerate(values):
        groups.setdefault(repr(value), {"replicas": [], "value": value})["replicas"].append(replica_id)
    return list(groups.values())
