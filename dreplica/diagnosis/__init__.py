"""From the place where replicas part to the cause: what it is, who, why, and what to do about it."""
