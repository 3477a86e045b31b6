"""Which model lies in a folder or behind a hub name: told by its content, since a path can be given another model."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..errors import GenarmError

# What transformers and PEFT read: settings, weights, vocabularies, chat templates. Not notes, logs or checkpoints.
_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
_BLOCK, _BLOCKS = 1 << 16, 1024  # of a larger file these are read, 64 MiB: a second, whatever the model's size


def identity(source: str | Path) -> str:
    """A SHA-256 (64 hex digits) of a model's or adapter's folder, or "commit:..." of a repository on the hub.

    The folder's own name counts for nothing, the names and sizes of its files do, and their bytes: all of them up to
    64 MiB, and of a larger file 1024 blocks of 64 KiB, the first, the last and those at even distances between. Another
    training changes them; a change to a single small tensor of a large file can pass unseen.

    A hub name is the commit that transformers loads: the newest one, or without a network the one in the cache.

    Raises:
        GenarmError: the source is neither, or a file cannot be read.
    """
    if not Path(source).is_dir():
        return f"commit:{_commit(str(source))}"
    whole = hashlib.sha256()
    try:
        for path in sorted(path for path in Path(source).iterdir() if path.suffix in _FILES and path.is_file()):
            whole.update(f"{path.name}\n{path.stat().st_size}\n".encode() + _digest(path))
    except OSError as error:
        raise GenarmError(f"{source}: cannot be read: {error.strerror}") from error
    return whole.hexdigest()


def _digest(path: Path) -> bytes:
    size, digest = path.stat().st_size, hashlib.sha256()
    last = max(0, size - _BLOCK)
    starts = range(0, size, _BLOCK) if size <= _BLOCK * _BLOCKS else (last * i // (_BLOCKS - 1) for i in range(_BLOCKS))
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return digest.digest()


def _commit(name: str) -> str:
    try:
        for file in ("config.json", "adapter_config.json"):
            with suppress(EntryNotFoundError):  # not in the repository; or not in the cache, and no network
                return Path(hf_hub_download(name, file)).parent.name  # .../snapshots/COMMIT/config.json
    except (OSError, ValueError) as error:
        raise GenarmError(f"{name!r}: no such folder, and no such model on the hub") from error
    raise GenarmError(f"{name!r}: no such folder, and no model that can be had from the hub")
