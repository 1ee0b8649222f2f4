"""Replays of a build or a step from restored state."""
