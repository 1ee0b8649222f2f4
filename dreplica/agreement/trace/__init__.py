"""Traces: recorded digests of a run, written, read and compared."""
