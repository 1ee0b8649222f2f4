"""Liveness of the ranks: heartbeats, alarms, and the ranks that are lost or hang."""
