"""One replica: built from scratch from a seed, with its wiring checked."""
