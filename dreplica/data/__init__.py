"""Data sets, the index stream of the coordinator, and the loader."""
