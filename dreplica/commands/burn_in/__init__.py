"""`dreplica burn-in`: a job trained again and again for a chosen time, to find the card that computes wrongly."""
