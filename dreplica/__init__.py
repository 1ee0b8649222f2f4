"""Train replicas in lock-step, compare every bit of their state at every step, and name the cause when they part."""

from dreplica.agreement.agreement import Agreement
from dreplica.agreement.fingerprint import fingerprint
from dreplica.agreement.verdict import Divergence
from dreplica.diagnosis.own_step import diagnose
from dreplica.replica.replica import Replica
from dreplica.replica.wiring import check_wiring

__all__ = ["Agreement", "Divergence", "Replica", "check_wiring", "diagnose", "fingerprint"]
