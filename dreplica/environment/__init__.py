"""The environment of a run: determinism settings, device, hardware and the manifest that records them."""
