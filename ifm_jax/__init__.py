"""Implicit Feature Modification (Robinson et al., NeurIPS 2021) on MoCo-v2, in JAX."""
