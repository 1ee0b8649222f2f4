"""`dreplica flags`: which determinism flags a job needs, and the cost of each."""
