"""Evidence: what each replica observed of a divergent step."""
