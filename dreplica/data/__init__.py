"""Data sets, the coordinator that draws the order of samples, and the loader that loads exactly those."""
