"""A lock between processes on a file or folder."""

from __future__ import annotations

from typing import BinaryIO


def lock(file: BinaryIO | int) -> None:
    """Until the file (or its descriptor) is closed, as it is when the process ends, however that comes about.

    BlockingIOError when another process has it. Nothing where files cannot be locked.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):  # Windows; some network file systems
        pass
