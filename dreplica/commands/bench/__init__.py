"""`dreplica bench`: what the trainer and its checks cost per step, on the user's own config."""
