"""The command line, `genarm`."""

from .app import main

__all__ = ["main"]
