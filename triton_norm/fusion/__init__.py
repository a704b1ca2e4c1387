"""Fusing in models that exist: which norm takes what follows it in, and the forward that calls it so."""

from .fuse import fuse, fuse_report
from .register import register

__all__ = ["fuse", "fuse_report"]

register()
