"""The training state of a replica: its stages, random number generators, snapshots and fingerprints."""
