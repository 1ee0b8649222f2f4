"""Checkpoints: capture of the state of a replica, the file format, writing, and resuming."""
