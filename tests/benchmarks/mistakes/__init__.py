"""The mistakes campaign: planted mistakes of code, each with the cause that an expert would conclude."""
