"""The peers that this package is compared with, in PyTorch: for tests and benchmarks, not part of the package."""
