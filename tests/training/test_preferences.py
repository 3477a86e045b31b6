"""Preference data: formats as published, files of all kinds, and tokens at the boundary of prompt and response."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from genarm.errors import GenarmError
from genarm.preferences import data_files
from genarm.preferences.pairs import Preference, Preferences, encode_preferences, read_preferences
from genarm.training.arm import _pieces
from published_rows import HELLO, PUBLISHED, pku, said

pytestmark = pytest.mark.versions


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(messages: Any) -> Any:
    return messages if isinstance(messages, str) else [message["content"] for message in messages]


# --- formats


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row_is_taken(tmp_path: Path, name: str) -> None:
    one = PUBLISHED[name]
    rows = read_preferences(write(tmp_path / "rows.jsonl", [one.row] * 2), objective=one.objective)
    assert rows.format.startswith(one.format)
    assert len(rows) == 2 and not rows.dropped
    chat = isinstance(one.prompt, list)
    for row in rows:
        assert contents(row.prompt) == one.prompt
        assert (contents(row.chosen), contents(row.rejected)) == (
            ([one.chosen], [one.rejected]) if chat else (one.chosen, one.rejected)
        )
    if chat:
        assert [message["role"] for message in rows[0].prompt][-1] == "user"
        assert [message["role"] for message in rows[0].chosen + rows[0].rejected] == ["assistant"] * 2


@pytest.mark.parametrize(
    ("good", "useless", "reason"),
    [
        ("texts", {"chosen": ""}, "empty"),
        ("texts", {"rejected": " \n"}, "empty"),
        ("texts", {"chosen": None}, "empty"),
        ("texts", {"chosen": " No idea."}, "equal"),
        ("texts", {"prompt": None}, "no_prompt"),
        ("HH-RLHF", {"chosen": f"{HELLO}"}, "empty"),
        ("HH-RLHF", {"chosen": "\n\nHuman: other\n\nAssistant: yes"}, "no_prompt"),
        ("HH-RLHF", {"chosen": f"{HELLO} No idea."}, "equal"),
        ("PKU-SafeRLHF", {"better_response_id": -1}, "tied"),
        ("PKU-SafeRLHF", {"better_response_id": None}, "tied"),
        ("PKU-SafeRLHF", {"response_1": "Because."}, "equal"),
        ("UltraFeedback binarized", {"score_rejected": 8.0}, "tied"),
        ("UltraFeedback binarized", {"score_rejected": 9}, "contradicted"),
        ("UltraFeedback binarized", {"chosen": []}, "empty"),
        ("UltraFeedback binarized", {"chosen": said("Why?", "")}, "empty"),
        ("UltraFeedback binarized", {"chosen": said("Why?", "No idea.")}, "equal"),
        ("conversations of several turns", {"chosen": said("hi", "Hello.", "Why?")}, "empty"),
        ("conversations of several turns", {"chosen": said("Who?", "I.")}, "no_prompt"),
        ("ShareGPT", {"chosen": {"from": "gpt", "value": " "}}, "empty"),
        ("Orca of Argilla", {"status": "tie"}, "tied"),
        ("Stanford SHP", {"labels": None}, "tied"),
        ("WebGPT", {"score_0": 0.5}, "tied"),
        ("HelpSteer2", {"preference_strength": 0}, "tied"),
        ("Chatbot Arena", {"winner": "tie (bothbad)"}, "tied"),
        ("Nectar", {"answers": [{"answer": "a", "rank": 1}]}, "empty"),
        ("Nectar", {"answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]}, "tied"),
    ],
)
def test_a_useless_row_is_left_out_or_refused(tmp_path: Path, good: str, useless: dict[str, Any], reason: str) -> None:
    row = PUBLISHED[good].row
    path = write(tmp_path / "rows.jsonl", [row, row | useless, row])
    rows = read_preferences(path)
    assert rows.dropped == {reason: [f"{path}:2"]}
    assert [one.where for one in rows] == [f"{path}:1", f"{path}:3"]
    assert "2 of 3 rows, left out: 1 with" in rows.summary()
    with pytest.raises(GenarmError, match=r"rows\.jsonl: strict: there are rows to be left out: .* in row 2$"):
        read_preferences(path, strict=True)
    if good != "HH-RLHF":  # whose first row alone does not tell its format less than the second
        with pytest.raises(GenarmError, match=r"has no rows that can be trained on: .* in row 1, 2$"):
            read_preferences(write(path, [row | useless] * 2))


def test_many_useless_rows_are_named_by_reason(tmp_path: Path) -> None:
    row = PUBLISHED["texts"].row
    path = write(tmp_path / "rows.jsonl", [row, *[row | {"chosen": ""}] * 12, row | {"chosen": row["rejected"]}])
    with pytest.raises(GenarmError) as caught:
        read_preferences(path, strict=True)
    named = "an empty response in row 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more; equal responses in row 14"
    assert str(caught.value).endswith(named)


@pytest.mark.parametrize(
    ("rows", "objective", "message"),
    [
        (
            [{"prompt": "p", "completion": "c", "label": True}],
            None,
            ":1: columns of no known format: prompt, completion",
        ),
        (
            [PUBLISHED["texts"].row, pku(0, 0)],
            None,
            ":2: has no chosen and no rejected; the format by the first row: p",
        ),
        (
            [PUBLISHED["texts"].row],
            "safer",
            ":1: objective chooses between labels of PKU-SafeRLHF, but the format is p",
        ),
        ([PUBLISHED["texts"].row], "kinder", "objective: expected 'better' or 'safer', got 'kinder'"),
        ([pku(0, 2)], "safer", ":1: safer_response_id is neither 0 nor 1: 2"),
        ([{k: v for k, v in pku(0, 0).items() if k[:6] != "better"}], None, ":1: has no better_response_id; .* --obj"),
        ([PUBLISHED["WebGPT"].row | {"score_0": "high"}], None, ":1: score_0 is not a number: 'high'"),
        ([PUBLISHED["WebGPT"].row | {"score_0": float("nan")}], None, ":1: score_0 is not finite: nan"),
        ([PUBLISHED["Nectar"].row | {"answers": "so"}], None, ":1: answers is not made of objects"),
        ([PUBLISHED["Nectar"].row | {"answers": [{"answer": "a"}] * 2}], None, ":1: answers has one without rank"),
        ([PUBLISHED["summaries"].row | {"summaries": []}], None, ":1: summaries has 0 instead of 2"),
        ([PUBLISHED["system turn"].row | {"tools": "{"}], None, ":1: tools is not JSON"),
        ([PUBLISHED["system turn"].row | {"tools": {"a": 1}}], None, ":1: tools is not a list"),
        ([PUBLISHED["Orca"].row | {"system": 3}], None, ":1: system is not a string"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, rows: list[Any], objective: str | None, message: str) -> None:
    with pytest.raises(GenarmError, match=message):
        read_preferences(write(tmp_path / "rows.jsonl", rows), objective=objective)


def test_a_prompt_that_a_response_begins_with_by_accident_stays(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "ab", "rejected": "ac"}, *[{"prompt": "a", "chosen": "x", "rejected": "y"}] * 2]
    assert read_preferences(write(tmp_path / "rows.jsonl", rows))[0].chosen == "ab"
    long = "What is the capital of France?"
    rows[0] = {"prompt": long, "chosen": f"{long} Paris", "rejected": f"{long} Rome"}
    assert read_preferences(write(tmp_path / "rows.jsonl", rows))[0].chosen == " Paris"


def test_one_side_that_repeats_the_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "chosen": "Why? So.", "rejected": f" No {i}."} for i in range(3)]
    rows.append({"prompt": "Why?", "chosen": "Why? ", "rejected": " No."})
    rows.append({"prompt": "Why?", "chosen": " So.", "rejected": " No 3."})  # most are enough
    read = read_preferences(write(tmp_path / "rows.jsonl", rows))
    assert [(row.chosen, row.rejected) for row in read] == [(" So.", f" No {i}.") for i in range(4)]
    assert read.dropped == {"empty": [f"{tmp_path}/rows.jsonl:4"]}


# --- files

ROWS = [{"prompt": f"q{i} \u2028\x85", "chosen": "yes", "rejected": "no"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
FILES: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: LINES,
    "bom.jsonl": lambda: b"\xef\xbb\xbf" + LINES,
    "crlf.jsonl": lambda: LINES.replace(b"\n", b"\r\n\r\n"),
    "rows.jsonl.gz": lambda: gzip.compress(LINES),
    "gzip-without-its-name": lambda: gzip.compress(b"\xef\xbb\xbf" + LINES),
    "rows.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "bom.json": lambda: b"\xef\xbb\xbf\n " + json.dumps(ROWS).encode(),
    "rows.json.gz": lambda: gzip.compress(json.dumps(ROWS).encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_files_hold_the_same_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name]())
    rows = read_preferences(str(tmp_path / name))
    assert [row.prompt for row in rows] == [row["prompt"] for row in ROWS]
    (tmp_path / "plain").write_bytes(LINES)
    assert rows.sha256() == read_preferences(tmp_path / "plain").sha256()
    (tmp_path / "plain").write_bytes(LINES.replace(b"yes", b"yea"))
    assert rows.sha256() != read_preferences(tmp_path / "plain").sha256()


PACKED = gzip.compress(LINES, mtime=0)  # without the time: processes that share the tests must name them alike


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cut.gz", PACKED[:-20], "cut.gz: cannot be unpacked"),
        ("bad.gz", PACKED[:20] + b"\xff" * 20, "bad.gz: cannot be unpacked"),
        ("rows.json", b'[{"prompt": 1},\n 2,\n]', "rows.json: is not JSON: .*: line 3, column 1"),
        ("rows.json", b"[1]", "rows.json:1: is not an object"),
        ("rows.json", b"[]", "rows.json: has no rows"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GenarmError, match=message):
        read_preferences(tmp_path / name)


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow comes with the extra train")
    import pyarrow
    import pyarrow.parquet

    one = PUBLISHED["UltraFeedback binarized"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([one.row, one.row | {"chosen": None}]), tmp_path / "rows")
    rows = read_preferences(tmp_path / "rows")
    assert contents(rows[0].prompt + rows[0].chosen) == ["Why?", "Because."]
    assert rows.dropped == {"empty": [f"{tmp_path}/rows:2"]}
    (tmp_path / "cut").write_bytes((tmp_path / "rows").read_bytes()[:-10])
    with pytest.raises(GenarmError, match="cut: cannot be read"):
        read_preferences(tmp_path / "cut")


def test_folders_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets comes with the extra train")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "files").mkdir()
    for split, chosen in (("train", "yes"), ("test", "yea")):
        write(tmp_path / "files" / f"{split}.jsonl", [row | {"chosen": chosen} for row in ROWS])
    loaded = datasets.load_dataset(str(tmp_path / "files"), split="train")
    loaded.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": loaded, "test": loaded.select([0])}).save_to_disk(str(tmp_path / "splits"))
    for source, n, chosen in [
        (tmp_path / "files", 3, "yes"),
        (f"{tmp_path}/files:test", 3, "yea"),
        (f"{tmp_path}/files:train[:2]", 2, "yes"),
        (tmp_path / "saved", 3, "yes"),
        (f"{tmp_path}/splits:test", 1, "yes"),
    ]:
        rows = read_preferences(source)
        assert [row.chosen for row in rows] == [chosen] * n
        assert rows[0].where.endswith(":1")
    with pytest.raises(GenarmError, match=r"files: cannot be read: .*nowhere"):
        read_preferences(f"{tmp_path}/files:nowhere")
    with pytest.raises(GenarmError, match=r"splits: cannot be read: .*nowhere"):
        read_preferences(f"{tmp_path}/splits:nowhere")
    with pytest.raises(GenarmError, match="no-one/nothing: no such file, and no data set of the hub that can be read"):
        read_preferences("no-one/nothing:train")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    datasets = pytest.importorskip("datasets", reason="datasets comes with the extra train")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    nowhere = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setattr(data_files, "HfApi", lambda: nowhere)
    with pytest.raises(GenarmError, match=r"no-one/nothing: no such file, and .*\(HF_HUB_OFFLINE=1 takes one"):
        read_preferences("no-one/nothing:train")


@pytest.mark.parametrize(
    ("package", "source"), [("datasets", "Anthropic/hh-rlhf"), ("datasets", "."), ("pyarrow", "rows.parquet")]
)
def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.parquet").write_bytes(b"PAR1")
    for name in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(GenarmError, match=rf"needs {package}: pip install 'gen.*\[train\]"):
        read_preferences(source)


# --- tokens


def byte_level(single: str = "<s> $A", merges: tuple[tuple[str, str], ...] = (), prefix_space: bool = False) -> Any:
    """The shape of GPT-2's and Llama 3's: bytes, of which those of a word, or of a space and a word, are joined."""
    names = ["<unk>", "<s>", "</s>"]
    table = {name: i for i, name in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    for left, right in merges:
        table[left + right] = len(table)
    core = Tokenizer(models.BPE(table, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    core.decoder = decoders.ByteLevel()
    return wrapped(core, single)


def sentence_piece(single: str = "<s> $A", words: tuple[str, ...] = ("hello", "world")) -> Any:
    """The shape of Llama 2's: a text is opened by a space, and a word has a token with the space before it."""
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{i:02X}>", 0.0) for i in range(256))]
    vocabulary += [("▁", -2.0), *((f"▁{word}", -1.0) for word in words), *((chr(c), -5.0) for c in range(33, 127))]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    space, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), strip])
    return wrapped(core, single)


def wrapped(core: Any, single: str) -> Any:
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    if single != "$A":
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


MERGES = (("y", "e"), ("ye", "s"), ("Ġ", "yes"), (":", "y"))
TOKENIZERS = {
    "bytes": byte_level(merges=MERGES),
    "bytes, neither": byte_level("$A", MERGES),
    "bytes, EOS appended": byte_level("<s> $A </s>", MERGES),
    "bytes, only EOS": byte_level("$A </s>", MERGES),
    "bytes, space before": byte_level(merges=MERGES, prefix_space=True),
    "pieces": sentence_piece(),
    "pieces, EOS appended": sentence_piece("<s> $A </s>"),
}
BOUNDARIES = [
    ("Q:", " yes"), ("Q: ", "yes"), ("Q:  ", "yes"), ("Q:", "yes"), ("Q:\n", "yes"), ("hello ", "world"),
    ("hello", " world"), ("hello", "world"), ("hel", "lo"), ("ye", "s"), ("Q:", "\n\nyes"), ("Q: ", " yes"),
    ("it", "'s"), ("café", "é ☃"), ("", "yes"), ("Q: ", "hello world "),
]  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("prompt", "response"), BOUNDARIES)
def test_a_response_goes_on_from_the_prompts_own_tokens(name: str, prompt: str, response: str) -> None:
    """No character is lost, doubled or put between; BOS is there if the tokenizer writes it, EOS once at the end."""
    tokenizer = TOKENIZERS[name]
    rows = [Preference(prompt, response, "~", "f:1")]
    bos = "<s>" * (name not in ("bytes, neither", "bytes, only EOS"))
    if not prompt and not bos:
        with pytest.raises(GenarmError, match="f:1: prompt has no tokens"):
            encode_preferences(rows, tokenizer, 64)
        return
    (pair,), _ = encode_preferences(rows, tokenizer, 64)
    assert pair["prompt"] == [1] * bool(bos) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert pair["chosen"][-1] == 2
    together = tokenizer.decode(pair["prompt"] + pair["chosen"], clean_up_tokenization_spaces=False)
    space = " " * (name == "bytes, space before" or name.startswith("pieces"))  # that opens a text, not a response
    assert together.removeprefix(bos) == f"{space}{prompt}{response}</s>"


def test_the_response_has_the_tokens_of_a_text_that_goes_on() -> None:
    """A space at the prompt's end would have joined the word; after it the word has its token without a space."""
    tokenizer = TOKENIZERS["bytes"]
    (pair,), _ = encode_preferences([Preference("Q: ", "yes yes", "no", "f:1")], tokenizer, 64)
    assert tokenizer.convert_ids_to_tokens(pair["chosen"]) == ["yes", "Ġyes", "</s>"]
    (pair,), _ = encode_preferences([Preference("Q:", " yes yes", "no", "f:1")], tokenizer, 64)
    assert tokenizer.convert_ids_to_tokens(pair["chosen"]) == ["Ġyes", "Ġyes", "</s>"]
    (pair,), _ = encode_preferences([Preference("a ", "world", "no", "f:1")], TOKENIZERS["pieces"], 64)
    assert TOKENIZERS["pieces"].convert_ids_to_tokens(pair["chosen"]) == [*"world", "</s>"]


def test_the_text_of_each_token_is_that_within_the_text() -> None:
    """By itself a word's token would lose its space, and a byte of a character would be none."""
    for name, expected in (("pieces", [" world", " world", " ", "☃", "</s>"]), ("bytes", [*" world world ☃", "</s>"])):
        (pair,), _ = encode_preferences([Preference("hello", " world world ☃", "no", "f:1")], TOKENIZERS[name], 64)
        assert list(_pieces(pair["prompt"], pair["chosen"], TOKENIZERS[name])) == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("response", ["no</s>", "no</s></s>", "no</s>\n", "no"])
def test_rendered_texts_keep_one_bos_and_one_eos(name: str, response: str) -> None:
    rows = [Preference("<s>Q:", response, "~", "f:1")]
    (pair,), _ = encode_preferences(rows, TOKENIZERS[name], 64)
    assert pair["prompt"].count(1) == 1 and pair["prompt"][0] == 1
    assert 2 not in pair["prompt"]
    assert pair["chosen"].count(2) == 1 and pair["chosen"][-1] == 2


def test_a_template_that_writes_bos_is_not_given_another() -> None:
    tokenizer = byte_level("<s> $A </s>")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    rows = [Preference(said("x"), said("a", roles=("assistant",)), said("b", roles=("assistant",)), "f:1")]
    (pair,), _ = encode_preferences(rows, tokenizer, 64)
    assert tokenizer.decode(pair["prompt"]) == "<s>[user]x"
    assert tokenizer.decode(pair["chosen"]) == "[assistant]a</s>"


def test_a_question_is_asked_by_the_template_or_as_text() -> None:
    asked = said("Be kind.", "Why?", roles=("system", "user"))
    answers = [said(text, roles=("assistant",)) for text in ("So.", "No.")]
    rows = [Preference(asked, *answers, "f:1", question=True)]
    tokenizer = byte_level()
    (pair,), _ = encode_preferences(rows, tokenizer, 64)
    assert tokenizer.decode(pair["prompt"] + pair["chosen"]) == "<s>Be kind.\n\nWhy?So.</s>"
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (pair,), _ = encode_preferences(rows, tokenizer, 64)
    assert tokenizer.decode(pair["prompt"]) == "[system]Be kind.[user]Why?"


def test_tools_reach_the_template(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    row = {"prompt": said("1 + 1?"), "chosen": [call], "rejected": "3", "tools": json.dumps(tools)}
    (preference,) = read_preferences(write(tmp_path / "rows.jsonl", [row]))
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for t in tools %}({{ t.function.name }}){% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name }}!{% endfor %}{% endfor %}"
    )
    (pair,), _ = encode_preferences([preference], tokenizer, 64)
    assert tokenizer.decode(pair["prompt"]) == "(add)[user]1 + 1?"
    assert tokenizer.decode(pair["chosen"]) == "[assistant]add!</s>"


def test_pairs_that_are_equal_as_tokens_are_left_out() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
    rows = Preferences(
        Preference(said("x"), *(said(text, roles=("assistant",)) for text in pair), f"f:{i}")
        for i, pair in enumerate([("yes", "yes "), ("yes", "no"), ("a" * 90 + "b", "a" * 90 + "c")], start=1)
    )
    rows.dropped = {"empty": ["f:4"]}
    pairs, counts = encode_preferences(rows, tokenizer, 64)
    assert len(pairs) == counts["prompts"] == 1
    assert (counts["dropped_equal_tokens"], counts["dropped_empty"]) == (2, 1)
    with pytest.raises(GenarmError, match=r"f: strict: .*: responses that are equal as tokens in row 1, 3$"):
        encode_preferences(rows, tokenizer, 64, strict=True)
    with pytest.raises(GenarmError, match=r"f: has no rows that can be trained on: .* in row 1$"):
        encode_preferences(rows[:1], tokenizer, 64)


def test_a_tokenizer_that_loses_characters_at_the_boundary_leaves_the_row_out() -> None:
    """It has no token for "b", only for "ab": no tokens give the text after the prompt's own."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "ab": 3, "a": 4, "c": 5}, "<unk>"))
    tokenizer = wrapped(core, "<s> $A")
    rows = [Preference("a", "b", "c", "f:1")]
    with pytest.raises(GenarmError, match="responses that the tokenizer cannot tell from the prompt in row 1"):
        encode_preferences(rows, tokenizer, 64)
