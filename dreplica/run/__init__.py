"""One training run in a worker process: prepare, rendezvous, build, train, diagnose and report."""
