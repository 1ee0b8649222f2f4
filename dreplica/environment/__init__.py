"""Determinism settings, device, hardware, and the manifest that records them."""
