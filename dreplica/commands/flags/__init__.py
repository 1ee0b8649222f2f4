"""Which determinism flags a job needs, and what each costs."""
