"""Verdicts: cause, location, suspects, evidence and remedy of a divergence."""
