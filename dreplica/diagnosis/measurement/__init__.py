"""Measurements of a divergence: full tensors, error propagation, distances and float64 arbitration."""
