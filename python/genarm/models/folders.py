"""Folders of models: how a source names one, and the files in it that a Git checkout may hold in name only."""

from pathlib import Path
from typing import NamedTuple

from ..errors import GenarmError

_POINTER = b"version https://git-lfs.github.com/spec/"
# What a folder is loaded from, and what, where it is there, is read in its place.
_FILES = {
    "*.json": None,
    "model*.safetensors": None,
    "adapter_model.safetensors": None,
    "pytorch_model*.bin": "model*.safetensors",
    "adapter_model.bin": "adapter_model.safetensors",
    "*.model": "tokenizer.json",
    "*.txt": "tokenizer.json",
}


class Place(NamedTuple):
    """Where a model or adapter lies: a folder or hub name, and the subfolder in it, empty where there is none."""

    root: str
    subfolder: str

    @classmethod
    def of(cls, source: str | Path) -> "Place":
        """Of "DIR#SUBFOLDER", unless a folder has that very name."""
        root, mark, subfolder = str(source).rpartition("#")
        return cls(root, subfolder) if mark and not Path(source).exists() else cls(str(source), "")

    @property
    def folder(self) -> str | Path:
        """The folder itself; of what is no folder, the hub name."""
        return Path(self.root, self.subfolder) if Path(self.root).is_dir() else self.root

    def __str__(self) -> str:
        return repr(f"{self.root}#{self.subfolder}" if self.subfolder else self.root)


def lfs_pointer(path: str | Path) -> bool:
    """Whether the file holds a Git LFS pointer, a few lines that stand for a large file until it is downloaded."""
    with Path(path).open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def check_folder(label: str, folder: str | Path) -> None:
    """GenarmError when a file that a model, adapter or tokenizer would be loaded from is a Git LFS pointer.

    `label` is what errors call the model: "base", "ARM 'a'". What is no folder, such as a hub name, passes.
    """
    folder = Path(folder)
    for pattern, preferred in _FILES.items():
        if preferred is None or not any(folder.glob(preferred)):
            for file in sorted(folder.glob(pattern)):
                if file.is_file() and lfs_pointer(file):
                    raise GenarmError(
                        f"{label}: {str(file)!r} is a Git LFS pointer, not the file itself: run `git lfs pull` there"
                    )
