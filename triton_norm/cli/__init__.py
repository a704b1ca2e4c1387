"""The commands of ``python -m triton_norm``, and what they draw, list and count."""
