"""Tracing: every operator of a step, with its module path and digests."""
