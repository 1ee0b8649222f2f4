"""One replica: built from scratch from a seed, and checked to be wired right."""
