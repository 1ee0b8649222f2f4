"""Configuration: the schema of every section, loading from YAML and the command line, and error messages."""
