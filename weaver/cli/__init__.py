"""The command line: one file per subcommand, flags to config to stage."""
