"""Fused normalization layers for PyTorch, in Triton."""
