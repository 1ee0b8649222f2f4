"""Diagnosis: from the location of a divergence to its cause, suspects and remedy."""
