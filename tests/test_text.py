"""Text into tokens and back: prompts, vocabularies, the text of a continuation as its tokens arrive."""

import json

import pytest

from genarm import GenarmError
from genarm.folders import check_folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 100\n"


@pytest.mark.parametrize(
    ("pointer", "beside", "refused"),
    [
        ("model.safetensors", (), True),
        ("model-00002-of-00002.safetensors", ("model.safetensors.index.json",), True),
        ("pytorch_model.bin", (), True),
        ("pytorch_model.bin", ("model.safetensors",), False),  # which is read in its place
        ("adapter_model.safetensors", (), True),
        ("adapter_model.bin", ("adapter_model.safetensors",), False),
        ("config.json", ("model.safetensors",), True),
        ("tokenizer.json", ("tokenizer.model",), True),
        ("tokenizer.model", (), True),
        ("tokenizer.model", ("tokenizer.json",), False),
        ("merges.txt", ("vocab.json",), True),
        ("picture.png", (), False),
    ],
)
def test_git_lfs_pointers_are_named(tmp_path, pointer, beside, refused):
    for name in beside:
        (tmp_path / name).write_text(json.dumps({}))
    (tmp_path / pointer).write_text(POINTER)
    if refused:
        with pytest.raises(GenarmError, match=rf"^ARM 'a': '.*{pointer}' is a Git LFS pointer.*git lfs pull"):
            check_folder("ARM 'a'", tmp_path)
    else:
        check_folder("ARM 'a'", tmp_path)


def test_only_what_a_folder_holds_is_looked_at(tmp_path):
    (tmp_path / "a.json").mkdir()
    check_folder("base", tmp_path)
    check_folder("base", "some/hub-name")
