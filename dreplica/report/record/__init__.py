"""The run folder, `report.json`, metrics, experiment trackers and the terminal."""
