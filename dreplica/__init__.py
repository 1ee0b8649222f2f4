"""Train replicas in lock-step, compare every bit of their state at every step, and name the cause when they part."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreplica.agreement.agreement import Agreement
    from dreplica.agreement.hasher import Hasher
    from dreplica.agreement.verdict.verdict import Divergence
    from dreplica.diagnosis.diagnose_step import diagnose
    from dreplica.replica.wiring import check_wiring
    from dreplica.state.fingerprint.fingerprint import fingerprint
    from dreplica.state.replica import Replica

__all__ = ["Agreement", "Divergence", "Hasher", "Replica", "check_wiring", "diagnose", "fingerprint"]

# Imported when they are asked for: torch takes seconds and half a gigabyte, a worker has things to do before it, and
# `dreplica compare` needs none.
_MODULES = {
    "Agreement": "dreplica.agreement.agreement",
    "Divergence": "dreplica.agreement.verdict.verdict",
    "Hasher": "dreplica.agreement.hasher",
    "Replica": "dreplica.state.replica",
    "check_wiring": "dreplica.replica.wiring",
    "diagnose": "dreplica.diagnosis.diagnose_step",
    "fingerprint": "dreplica.state.fingerprint.fingerprint",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
