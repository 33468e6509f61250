"""The command line: flags, and endings said in one line."""
