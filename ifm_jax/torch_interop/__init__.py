"""PyTorch checkpoints, read and written, and step-for-step parity with the original."""
