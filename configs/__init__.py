"""Recipes, one a module: `ifm_jax.configs` once installed, found by name through `ifm_jax.recipes`."""
