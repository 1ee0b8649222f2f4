"""Faults and faulty builds, made on purpose: what `inject:` and configs/cases use."""
