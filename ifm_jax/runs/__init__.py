"""A run: how it starts, its loop, its working directory, and what it says of itself."""
