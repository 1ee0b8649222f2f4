"""Faulty models, data sets, builds and operators that the cases use."""
