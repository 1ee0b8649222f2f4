"""Data sets, the index stream of the coordinator, the loader and caches of decoded images."""
