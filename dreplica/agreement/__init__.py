"""Comparison of training state between replicas and between runs.

This package is a library for any training loop. It knows nothing of the trainer.
"""
