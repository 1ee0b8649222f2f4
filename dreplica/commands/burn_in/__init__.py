"""`dreplica burn-in`: train a job repeatedly for a chosen time to find devices that compute wrongly."""
