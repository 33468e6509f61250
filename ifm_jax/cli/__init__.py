"""The command line: flags, and one-line messages at the end."""
