"""A model is known by its content, wherever it lies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from genarm.errors import GenarmError
from genarm.models import identity as module
from genarm.models.identity import identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"):
        (tmp_path / "model" / name).write_text(f"this is {name}")
    return tmp_path / "model"


def test_the_same_content_elsewhere(folder: Path, tmp_path: Path) -> None:
    before = identity(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("other words")
    (tmp_path / "copy" / "checkpoint-3").mkdir()
    assert identity(str(tmp_path / "copy")) == before
    assert len(before) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "model.safetensors").write_text("this is model.safetensorz"),
        lambda folder: (folder / "model.safetensors").write_text("this is model.safetensors, longer"),
        lambda folder: (folder / "model.safetensors").rename(folder / "adapter_model.safetensors"),
        lambda folder: (folder / "chat_template.jinja").unlink(),
        lambda folder: (folder / "adapter_config.json").touch(),
    ],
)
def test_other_content_in_the_same_place(folder: Path, change: Callable[[Path], object]) -> None:
    before = identity(folder)
    change(folder)
    assert identity(folder) != before


def test_large_files_by_their_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 4)
    monkeypatch.setattr(module, "_BLOCKS", 3)
    seen = set()
    for content in ("a" * 40, "b" + "a" * 39, "a" * 39 + "b", "a" * 19 + "b" + "a" * 20, "a" * 41):
        (folder / "model.safetensors").write_text(content)
        seen.add(identity(folder))
    assert len(seen) == 5
    (folder / "model.safetensors").write_text("a" * 10 + "b" + "a" * 29)  # between the blocks
    assert identity(folder) in seen


def test_a_hub_name_is_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an adapter's file is there, as in a repository that holds one."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(name: str, file: str) -> str:
        if (name, file) != ("owner/arm", "adapter_config.json"):
            raise LocalEntryNotFoundError("not in the cache")
        return str(tmp_path / "snapshots" / "0123abcd" / file)

    monkeypatch.setattr(module, "hf_hub_download", download)
    assert identity("owner/arm") == "commit:0123abcd"
    with pytest.raises(GenarmError, match="'owner/other': no such folder, and no model that can be had"):
        identity("owner/other")
    monkeypatch.undo()
    with pytest.raises(GenarmError, match="'a/b/c': no such folder, and no such model on the hub"):
        identity("a/b/c")
