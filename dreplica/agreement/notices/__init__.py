"""Warnings about what all replicas share: mistakes on which replicas agree, and which no comparison finds.

Each warning is given once per run, only where it is certain, and never ends the run. The checks read digests and
settings that are there anyway. None waits for a device, except once where something is suspicious already.
"""
