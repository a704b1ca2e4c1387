"""What scripts and tests count launches and bytes with, in Triton's interpreter: ``triton_norm.cli.counting``.

Needs ``TRITON_INTERPRET=1`` before triton is imported.
"""

from triton_norm.cli.counting import Count, Launch, Operators, counting

__all__ = ["Count", "Launch", "Operators", "counting"]
