"""Measurements: bytes and launches in the interpreter, compiled code offline, times on a GPU."""
