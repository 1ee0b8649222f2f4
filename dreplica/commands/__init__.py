"""The `dreplica` command and its subcommands. No other package imports this one."""
