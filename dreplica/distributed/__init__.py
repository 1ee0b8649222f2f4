"""Processes: rendezvous, the control process group, liveness, signals and launching."""
