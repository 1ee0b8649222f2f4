"""Launching of worker processes under torchrun, and their exit codes."""
