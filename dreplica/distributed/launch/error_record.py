"""The record of the error that ended a run as unusable, for the process that started its workers.

The parent names a file in an environment variable, and the replica that prints the error writes it there as JSON.
"""

import json
import os
from pathlib import Path

from dreplica.distributed.failure import Failure
from dreplica.errors import UsageError

ERROR_FILE = "DREPLICA_ERROR_FILE"
"""Environment variable with the path of the record."""


def write_error(error: UsageError) -> None:
    """Write the data of `error` into the record, if the parent asks for one."""
    path = os.environ.get(ERROR_FILE)
    if path is not None:
        Path(path).write_text(json.dumps(Failure.from_exception(error).as_dict()), encoding="utf-8")


def read_error(path: Path) -> UsageError | None:
    """Return the recorded error, or None if there is none."""
    try:
        failure = Failure.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    return UsageError(failure.message, code=failure.code, **failure.fields)
