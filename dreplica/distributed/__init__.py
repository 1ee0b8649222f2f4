"""The lowest room: processes, devices, determinism settings, the environment manifest, the run folder, logging."""
