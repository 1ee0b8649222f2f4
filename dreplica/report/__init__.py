"""What people and programs read of a run: the terminal, report.json, metrics.jsonl, report.html, other services."""
