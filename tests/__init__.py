"""Tests of ifm_jax."""
