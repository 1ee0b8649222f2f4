"""Caches of decoded samples, on the device and shared between the processes of a node."""
