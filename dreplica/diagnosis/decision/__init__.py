"""Decisions: from the evidence of a divergence to its cause."""
