"""Studies of the package; `ifm-jax study --config=studies/NAME` runs one."""
