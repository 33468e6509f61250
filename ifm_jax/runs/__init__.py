"""A run: its start, loop, working directory and messages."""
