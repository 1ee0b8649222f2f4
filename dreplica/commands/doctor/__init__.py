"""`dreplica doctor`: measure what would break determinism on this machine."""
