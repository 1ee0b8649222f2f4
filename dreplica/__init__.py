"""Train replicas in lock-step, compare every bit of their state at every step, and name the cause when they part."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreplica.agreement.agreement import Agreement
    from dreplica.agreement.fingerprint import fingerprint
    from dreplica.agreement.verdict import Divergence
    from dreplica.replica.replica import Replica
    from dreplica.replica.wiring import check_wiring

__all__ = ["Agreement", "Divergence", "Replica", "check_wiring", "fingerprint"]

_HOMES = {
    "Agreement": "dreplica.agreement.agreement",
    "Divergence": "dreplica.agreement.verdict",
    "Replica": "dreplica.replica.replica",
    "check_wiring": "dreplica.replica.wiring",
    "fingerprint": "dreplica.agreement.fingerprint",
}


def __getattr__(name: str) -> Any:
    # When it is asked for: a worker has things to do before it imports torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
