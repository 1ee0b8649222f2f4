"""Prove that training reproduces bit for bit, and name the cause when it does not.

Everything public is imported from here, from `dreplica.lightning` or from `dreplica.transformers`.
All other modules are internal and may change without notice.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreplica.agreement.agreement import Agreement
    from dreplica.agreement.trace.reader import Trace
    from dreplica.agreement.verdict.verdict import Divergence, Verdict
    from dreplica.agreement.wiring.fault import WiringError
    from dreplica.diagnosis.diagnose_step import diagnose
    from dreplica.distributed.liveness.lost import ReplicaLost
    from dreplica.errors import DreplicaError
    from dreplica.replica.wiring import check_wiring
    from dreplica.state.fingerprint.fingerprint import fingerprint
    from dreplica.state.replica import Replica

__version__ = "0.2.0"

__all__ = [
    "Agreement",
    "Divergence",
    "DreplicaError",
    "Replica",
    "ReplicaLost",
    "Trace",
    "Verdict",
    "WiringError",
    "__version__",
    "check_wiring",
    "diagnose",
    "fingerprint",
]

# Each name is imported on first use. Importing torch takes seconds and half a gigabyte of memory: a worker must set
# environment variables before that, and `dreplica compare` does not need torch at all.
_MODULES = {
    "Agreement": "dreplica.agreement.agreement",
    "Divergence": "dreplica.agreement.verdict.verdict",
    "DreplicaError": "dreplica.errors",
    "Replica": "dreplica.state.replica",
    "ReplicaLost": "dreplica.distributed.liveness.lost",
    "Trace": "dreplica.agreement.trace.reader",
    "Verdict": "dreplica.agreement.verdict.verdict",
    "WiringError": "dreplica.agreement.wiring.fault",
    "check_wiring": "dreplica.replica.wiring",
    "diagnose": "dreplica.diagnosis.diagnose_step",
    "fingerprint": "dreplica.state.fingerprint.fingerprint",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
