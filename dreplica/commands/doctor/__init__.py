"""`dreplica doctor`: what on this machine would break determinism, measured, and what to do about it."""
