"""Rendezvous of the ranks in the store of the launcher."""
