"""The `dreplica` command and its subcommands, the topmost package."""
