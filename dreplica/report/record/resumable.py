"""Decide whether an earlier run of the same name can be resumed."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dreplica.agreement.trace.folder_lock import FolderLock
from dreplica.agreement.trace.run_metadata import fold_distributions, manifest_differences
from dreplica.agreement.trace.run_report import ReportError, RunReport
from dreplica.environment.manifest import compare_values
from dreplica.report.record.run_folder import create_run_folder, newest_run_folder
from dreplica.training.checkpoint.file_format import list_checkpoints

log = logging.getLogger(__name__)

_MAY_DIFFER: dict[str, set[str] | None] = {
    "world": None,
    "run": None,
    "checkpoint": None,
    "report": None,
    "agreement": {"snapshot_every", "on_divergence", "record"},
    "data": {"num_workers", "cache", "decode", "root"},
    "train": {"epochs", "max_steps"},
}
"""Config sections, or keys of a section, that change how far or how fast a run goes, but not its results."""

_MACHINE_FAULTS = {"replica-lost", "transient-fault", "persistent-fault"}
"""Causes outside of the run itself, after which resuming makes sense."""


class NotResumable(Exception):
    """The reason why a run cannot be resumed."""


class Completed(NotResumable):
    """The run has completed."""


def claim_folder(
    root: str, name: str, config_yaml: str, data_digest: str | None, may_resume: bool
) -> tuple[Path, bool, FolderLock]:
    """Return the folder of the newest run of this name if it can be resumed, or else a new one.

    Args:
        root: Folder of the run folders.
        name: Name of the run.
        config_yaml: The resolved config of this run.
        data_digest: Digest of this run's data, as in manifests.
        may_resume: False to create a new folder in any case.

    Returns:
        The folder, whether it is resumed, and the lock on it.

    Raises:
        UsageError: The folder cannot be created.
    """
    newest = newest_run_folder(root, name) if may_resume else None
    if newest is not None:
        lock = None
        try:
            lock = FolderLock(newest)
            if lock.taken:
                raise NotResumable("another run writes to it")
            check_resumable(newest, config_yaml, data_digest)
            return newest, True, lock
        except Completed:
            pass
        except (NotResumable, OSError) as reason:
            log.warning("run.resume: starting a new run instead of resuming %s: %s", newest, reason)
        if lock is not None and not lock.taken:
            lock.release()
    folder = create_run_folder(root, name)
    return folder, False, FolderLock(folder)


def check_resumable(folder: Path, config_yaml: str, data_digest: str | None) -> None:
    """Check that a run was interrupted, with the same config and data as this run.

    Args:
        folder: The run folder.
        config_yaml: The resolved config of this run.
        data_digest: Digest of this run's data, as in manifests.

    Raises:
        NotResumable: The run cannot be resumed. The text says why.
        Completed: The run has completed.
    """
    try:
        _check_end(RunReport.read(folder))
    except ReportError as error:
        if error.code != "no-report":  # a run that was killed has none
            raise NotResumable(f"its {error}") from None
    try:
        before = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise NotResumable(f"its config.yaml cannot be read: {error}") from None
    seeds = (before or {}).get("seed", {})
    if None in (seeds.get("model"), seeds.get("data")) and not list_checkpoints(folder / "checkpoints"):
        raise NotResumable("it drew random seeds and has no checkpoint")
    differences = compare_values([_decisive(before), _decisive(yaml.safe_load(config_yaml))])
    if differences:
        one, other = differences[0].values
        raise NotResumable(f"its config differs: {differences[0].field} was {one!r}, and is {other!r} now")
    try:
        data_before = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))[0]["data"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise NotResumable(f"its manifest.json cannot be read: {error}") from None
    if data_before != data_digest:
        raise NotResumable(f"its data differ: their digest was {data_before}, and is {data_digest} now")


def _check_end(report: RunReport) -> None:
    """Raise NotResumable if a run ended for a reason that a resumed run would meet again."""
    if report.run.stopped_after is not None:
        return
    if report.verdict is None:
        raise NotResumable("its report.json has no verdict")
    if report.verdict.cause == "none":
        raise Completed("it completed")
    if report.verdict.cause not in _MACHINE_FAULTS:
        raise NotResumable(f"it ended with the cause {report.verdict.cause}")


def manifest_changes(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return a line for each value in which the environment of an interrupted run differs from the current one.

    Args:
        folder: The run folder.
        manifest: The current manifest of rank 0.

    Raises:
        OSError, ValueError, LookupError: The recorded manifest cannot be read.
    """
    before = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))[0]
    if not isinstance(before, dict):
        raise ValueError("it is not the file of a run")
    now = json.loads(json.dumps({"replica": 0, **manifest}))
    return [
        f"{item.field} was {item.one!r} before the interruption, and is {item.other!r} now"
        for item in fold_distributions(manifest_differences([before], [now], configured=True))
    ]


def _decisive(config: Any) -> dict[str, Any]:
    """Return the config entries that results depend on."""
    kept = {}
    for section, values in (config or {}).items():
        dropped = _MAY_DIFFER.get(section, set())
        if dropped is None:
            continue
        kept[section] = values
        if isinstance(values, Mapping):
            kept[section] = {key: value for key, value in values.items() if key not in dropped}
    return kept
