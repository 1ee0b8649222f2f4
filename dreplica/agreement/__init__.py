"""Fingerprints of training state and the protocol that compares them: a library for anyone's loop.

It knows nothing of the trainer, which is its first user.
"""
