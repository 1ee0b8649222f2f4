"""`dreplica cases`: run a small faulty job for each known cause and check the verdict."""
