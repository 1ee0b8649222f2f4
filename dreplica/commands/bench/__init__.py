"""`dreplica bench`: the cost per step of the trainer and of its checks."""
