"""Building one replica from scratch from a seed, and checking its wiring."""
