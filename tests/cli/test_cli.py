"""The command line: what it prints, the errors it ends in, and runs that are killed and go on."""

from __future__ import annotations

import codecs
import errno
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from genarm.cli import app as cli
from genarm.cli.screen import Screen
from genarm.decoding import checks
from genarm.decoding.results import GenerationResult
from genarm.training import arm as training
from genarm_kernels import row_seed
from genarm_kernels.backends import NAMES, cpu, why_unavailable

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
POSITIONS = 256


def save_model(folder: Path, seed: int, specials: tuple[str, str] = ("<bos>", "<eos>")) -> None:
    """A random Llama of two layers with a byte-level tokenizer."""
    symbols = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    core.add_special_tokens([AddedToken(symbol, special=True) for symbol in specials])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=specials[0], eos_token=specials[1])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(symbols),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Here and in processes started here: the models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, ARMs kind and terse; odd (another tokenizer), nan (fails on "!"), bert, adapter, empty; prompt files."""
    folder = tmp_path_factory.mktemp("root")
    for seed, name in enumerate(["base", "kind", "terse"]):
        save_model(folder / name, seed)
    save_model(folder / "odd", 3, ("<s>", "</s>"))
    save_model(folder / "nan", 4)
    broken = LlamaForCausalLM.from_pretrained(folder / "nan")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "nan")
    broken.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids("!")] = math.nan
    broken.save_pretrained(folder / "nan")
    BertConfig(architectures=["BertModel"]).save_pretrained(folder / "bert")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "empty").mkdir()
    good = {"prompt": "hello"}
    for name, rows in {
        "good": [good, {"prompt": "What now?", "id": "b"}, {"messages": [{"role": "user", "content": "tëst"}]}],
        "long": [good, {"prompt": "x" * POSITIONS}],
        "weights": [good, {**good, "weights": {"rude": 1}}],
        "text": [good, {**good, "weights": {"kind": "much"}}],
        "keys": [good, {"question": "hello"}],
        "message": [{"messages": [{"role": "user"}]}],
        "surrogate": [{"prompt": "\ud800"}],
        "id": [{**good, "id": ["\ud800"]}],
        "name": [{"messages": [{"role": "user", "content": "hello", "name": "\ud800"}]}],
        "list": [["hello"]],
        "huge": [{**good, "weights": {"kind": 10**400}}],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "mark.jsonl").write_bytes(codecs.BOM_UTF8 + b"\n")
    for name in ("utf-16", "utf-16-le"):  # with a byte order mark, and without
        (folder / f"{name}.jsonl").write_text('{"prompt": "hello"}\n', encoding=name)
    (folder / "broken.jsonl").write_text('{"prompt": "hello"}\n\n{"prompt": "hel\n')
    return folder


class Ran(NamedTuple):
    status: int
    out: str
    err: str


Genarm = Callable[..., Ran]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def genarm(
    root: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Ran]]:
    """Runs the command line in this process, in `root`, where results of former tests are removed."""
    monkeypatch.chdir(root)
    for file in root.glob("out*.jsonl"):
        file.unlink()

    def run(line: str, stdin: bytes | None = b"") -> Ran:
        monkeypatch.setattr("sys.stdin", Terminal() if stdin is None else io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stop:
            cli.main(shlex.split(line))
        out, err = capfd.readouterr()
        return Ran(int(stop.value.code or 0), out, err)

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    yield run
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


BASE = "generate --base base --max-new-tokens 8 --top-k 40"
MODELS = f"{BASE} --arm kind=kind --arm terse=terse:0.5"


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


MISSING = next(name for name in NAMES[::-1] if name == "cuda" or why_unavailable(name))
ERRORS = {
    "generate --base '' --prompt x": "--base: expected a folder or the name of a model",
    f"{BASE} --arm a=:1.5 --prompt x": "--arm 'a=:1.5': expected NAME=DIR or NAME=DIR:WEIGHT",
    "generate --arm helpful=:2 --prompt x": "--arm 'helpful=:2': expected NAME=DIR or NAME=DIR:WEIGHT",
    f"{MODELS} --weight kind=1e39 --prompt x": "--weight of 'kind': expected a finite number, got 1e+39",
    f"{BASE} --arm kind=kind:1e39 --prompt x": "--arm: weight of 'kind': expected a finite number, got 1e+39",
    f"{MODELS} --stop '' --prompt x": "--stop: expected a text that is not empty",
    f"{MODELS} --temperature 1e39 --prompt x": "--temperature: expected a finite number of at least 0, got 1e+39",
    f"{MODELS} --prompts huge.jsonl": "huge.jsonl:1: weight of 'kind': expected a finite number, got 1000",
    f"{MODELS} --prompts list.jsonl": "list.jsonl:1: is not an object",
    f"{MODELS} --prompts id.jsonl": "id.jsonl:1: id is not valid Unicode",
    f"{MODELS} --prompts name.jsonl": "name.jsonl:1: messages is not valid Unicode",
    "generate --base nowhere/at/all --prompt x": "base: no such folder: 'nowhere/at/all'",
    f"{BASE} --arm a=./nowhere --prompt x": "ARM 'a': no such folder: './nowhere'",
    "generate --base empty --prompt x": "base: 'empty' holds no causal language model",
    "generate --base adapter --prompt x": "base: 'adapter' is a LoRA adapter; give it as --arm NAME=DIR, and its base",
    "generate --base bert --prompt x": "base: 'bert' holds no causal language model but BertModel",
    f"{BASE} --arm a=odd --prompt x": "ARM 'a': its tokenizer differs from the base's: token 0 is '<s>', not '<bos>'",
    f"{MODELS} --weight rude=1 --prompt x": "--weight: no ARM is called 'rude'; there are: kind, terse",
    f"{MODELS} --prompts weights.jsonl": "weights.jsonl:2: weights: no ARM is called 'rude'; there are: kind, terse",
    f"{BASE} --arm kind=kind:much --prompt x": "--arm: weight of 'kind': expected a finite number, got 'much'",
    f"{BASE} --arm kind=kind: --prompt x": "--arm: weight of 'kind': expected a finite number, got ''",
    f"{MODELS} --weight kind --prompt x": "--weight 'kind': expected NAME=WEIGHT, such as polite=0.5",
    f"{MODELS} --weight kind=much --prompt x": "--weight of 'kind': expected a finite number, got 'much'",
    f"{MODELS} --weight kind=nan --prompt x": "--weight of 'kind': expected a finite number, got nan",
    f"{MODELS} --prompts text.jsonl": "text.jsonl:2: weight of 'kind': expected a finite number, got 'much'",
    f"{BASE} --arm kind --prompt x": "--arm 'kind': expected NAME=DIR or NAME=DIR:WEIGHT",
    f"{MODELS} --arm kind=terse --prompt x": "--arm: the name 'kind' is given twice",
    f"{MODELS} --prompts blank.jsonl": "blank.jsonl: has no prompts",
    f"{MODELS} --prompts mark.jsonl": "mark.jsonl: has no prompts",
    f"{MODELS} --prompts utf-16.jsonl": "utf-16.jsonl:1: is not UTF-8 but seems to be UTF-16; save the text as UTF-8\n",
    f"{MODELS} --prompts utf-16-le.jsonl": "utf-16-le.jsonl:1: is not UTF-8 but seems to be UTF-16",
    f"{MODELS} --prompt x --tokenizer ./nowhere": "tokenizer: no such folder: './nowhere'",
    f"{MODELS} --prompt x --tokenizer odd": "ARM 'kind': its tokenizer differs from the base's: token 0 is '<bos>'",
    f"{MODELS} --prompt x --tokenizer ./nowhere --out out.jsonl": "tokenizer: no such folder: './nowhere'",
    "generate --base ./nowhere --prompt x --out out.jsonl": "base: no such folder: './nowhere'",
    f"{MODELS} --prompts nowhere.jsonl": "nowhere.jsonl: cannot be read: No such file or directory",
    f"{MODELS}": "standard input: has no prompts",
    f"{MODELS} --prompts broken.jsonl": "broken.jsonl:3: is not JSON: Unterminated string starting at: column 12\n",
    f"{MODELS} --prompts keys.jsonl": "keys.jsonl:2: is not an object with either prompt or messages",
    f"{MODELS} --prompts message.jsonl": "message.jsonl:1: messages has a message whose content is missing",
    f"{MODELS} --prompts surrogate.jsonl": "surrogate.jsonl:1: prompt is not valid Unicode",
    f"{MODELS} --prompts good.jsonl --prompt x": "give --prompt or --prompts, not both",
    f"{MODELS} --prompts long.jsonl": f"more than the {POSITIONS} positions of the base",
    f"{MODELS} --prompts long.jsonl --batch-size 1 --out out.jsonl": f"long.jsonl:2: {POSITIONS + 18} tokens and 8",
    f"{MODELS} --prompt x --out nowhere/o.jsonl": "nowhere/o.jsonl: cannot be written to: No such file or directory",
    f"{MODELS} --prompt x --out empty": "empty: cannot be written to: not a regular file",
    f"{MODELS} --prompt x --out good.jsonl": "good.jsonl:1: belongs to another run (not a line of results)",
    f"{MODELS} --prompt x --backend abacus": "backend: expected 'auto' or one of reference",
    f"{MODELS} --prompt x --backend {MISSING} --device cpu": f"backend '{MISSING}' cannot run",
    f"{MODELS} --prompt x --device abacus": f"'abacus' cannot be used; torch {torch.__version__} finds: cpu",
    f"{MODELS} --prompt x --device meta": f"device 'meta' cannot be used; torch {torch.__version__} finds: cpu",
    f"{MODELS} --prompt x --dtype int8": "dtype: expected",
    f"{MODELS} --prompt x --temperature nan": "temperature",
    f"{MODELS} --prompt x --temperature warm": "Invalid value for '--temperature'",
    f"{MODELS} --prompt x --warmth 1": "; see genarm generate --help\n",
    "generate --prompt": "Option '--prompt' requires an argument; see genarm generate --help\n",
    "abacus": "No such command 'abacus'; see genarm --help\n",
    "": "Missing command; see genarm --help\n",
    "train --base base --data good.jsonl": "Missing option '--out'; see genarm train --help\n",
    "train --base base --data nowhere.jsonl --out out": "nowhere.jsonl: cannot be read",
    "train --base base --data good.jsonl --out out --beta=-1": "beta: expected a finite number above 0, got -1",
    "train --base base --data good.jsonl --out out --objective nicer": "objective: expected 'better' or 'safer', got",
    "train --base base --data good.jsonl --out out": "good.jsonl:1: columns of no known format: prompt; expected",
}


@pytest.mark.parametrize("line", ERRORS)
def test_an_error_is_one_line(genarm: Genarm, line: str) -> None:
    status, out, err = genarm(line)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and ERRORS[line] in err and err.endswith("\n") and err.count("\n") == 1
    assert not any(path.stat().st_size for path in Path().glob("out*.jsonl"))  # nothing was decoded either


@pytest.mark.parametrize("options", ["", "--batch-size 2", "--batch-size 2 --compare"])
def test_a_prompt_that_cannot_be_decoded_is_named(genarm: Genarm, options: str) -> None:
    good = "--prompt a --prompt b --prompt c " if options else ""
    status, out, err = genarm(f"generate --base nan --max-new-tokens 1 --no-chat {good}--prompt 'd!' {options}")
    assert (status, out.count("===")) == (2, 3 if options else 0)  # what finished before it is shown
    assert err.startswith(f"error: --prompt {4 if options else 1}: token 0 cannot be drawn") and err.count("\n") == 1


def test_a_file_of_results_has_one_writer(genarm: Genarm) -> None:
    fcntl = pytest.importorskip("fcntl")
    line = f"{MODELS} --prompts good.jsonl --out out.jsonl"
    with Path("out.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert genarm(line) == (2, "", "error: out.jsonl: another process is writing to it\n")
    assert not Path("out.jsonl").read_bytes()
    assert genarm(line).status == 0


def test_a_terminal_without_prompts_is_told_what_to_do(genarm: Genarm) -> None:
    status, out, err = genarm(MODELS, stdin=None)
    assert (status, out, err.count("\n")) == (2, "", 1) and "no prompts: give --prompt" in err


@pytest.mark.parametrize("error", [ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "gone", "file"), OSError("!")])
def test_a_bug_keeps_its_traceback(root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def bug(*_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "load", bug)
    with pytest.raises(type(error)):
        cli.main(["generate", "--prompt", "x"])


def test_a_full_disk_is_one_line(genarm: Genarm, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    assert genarm(f"{MODELS} --prompt x --out out.jsonl") == (
        2,
        "",
        "error: out.jsonl: cannot be written to: No space left on device\n",
    )


def test_a_disk_that_is_full_for_a_while(genarm: Genarm) -> None:
    resource = pytest.importorskip("resource")
    line = f"{MODELS} --prompts good.jsonl --out"
    genarm(f"{line} out2.jsonl")
    whole = Path("out2.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.index(b"\n") + 100, limits[1]))  # within the second line
    try:
        full = genarm(f"{line} out.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full == (2, "", f"error: out.jsonl: cannot be written to: {os.strerror(errno.EFBIG)}\n")
    assert genarm(f"{line} out.jsonl") == (0, "out.jsonl: 3 of 3 prompts are done\n", "")
    assert Path("out.jsonl").read_bytes() == whole


def test_prompts_come_from_three_places(genarm: Genarm) -> None:
    lines = genarm(MODELS, stdin="hello\n\nWhat now?\r\ntëst\n".encode())
    assert lines.status == 0 and lines.err == ""
    assert genarm(MODELS, stdin=codecs.BOM_UTF8 + "hello\nWhat now?\ntëst\n".encode()) == lines
    assert re.findall("^=== .*$", lines.out, re.M) == ["=== 1/3: hello", "=== 2/3: What now?", "=== 3/3: tëst"]
    assert genarm(f"{MODELS} --prompts good.jsonl") == lines
    assert genarm(f"{MODELS} --prompt hello --prompt 'What now?' --prompt tëst") == lines
    genarm(f"{MODELS} --prompts good.jsonl --out out.jsonl")
    assert all(f"{row['text']}\n\n" in lines.out for row in read("out.jsonl"))


def test_a_single_prompt_is_streamed_plainly(genarm: Genarm) -> None:
    status, out, err = genarm(f"{MODELS} --prompt hello")
    genarm(f"{MODELS} --prompt hello --out out.jsonl")
    assert (status, out, err) == (0, read("out.jsonl")[0]["text"] + "\n", "")


def test_a_line_of_results_says_all(genarm: Genarm) -> None:
    status, out, err = genarm(f"{MODELS} --prompts good.jsonl --seed 7 --weight kind=0.25 --out out.jsonl")
    assert (status, out, err) == (0, "out.jsonl: 3 of 3 prompts are done\n", "")
    rows = read("out.jsonl")
    assert [row["index"] for row in rows] == [0, 1, 2] and [row["seed"] for row in rows] == [
        row_seed(7, i) for i in range(3)
    ]
    assert [row.get("prompt") for row in rows] == ["hello", "What now?", None] and rows[1]["id"] == "b"
    assert rows[2]["messages"] == [{"role": "user", "content": "tëst"}]
    for row in rows:
        n = len(row["tokens"])
        assert 0 < n <= 8 and len(row["logprobs"]) == len(row["base_logprobs"]) == n
        assert {name: len(values) for name, values in row["rewards"].items()} == {"kind": n, "terse": n}
        assert row["weights"] == {"kind": 0.25, "terse": 0.5} and row["finish_reason"] in ("eos", "length")
        assert row["settings"]["top_k"] == 40 and row["settings"]["arms"] == {"kind": "kind", "terse": "terse"}


def test_batches_change_nothing(genarm: Genarm) -> None:
    for size in (1, 2, 3):
        genarm(f"{MODELS} --prompts good.jsonl --batch-size {size} --out out{size}.jsonl")
    one, *others = [read(f"out{size}.jsonl") for size in (1, 2, 3)]
    for other in others:
        assert [row["tokens"] for row in other] == [row["tokens"] for row in one]
        for a, b in zip(one, other, strict=True):
            assert b["logprobs"] == pytest.approx(a["logprobs"], abs=1e-4)


def test_weights_of_a_row(genarm: Genarm) -> None:
    rows = [{"prompt": "hello"}, {"prompt": "hello", "weights": {"kind": -1}}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    genarm(f"{MODELS} --temperature 0 --prompts rows.jsonl --out out.jsonl")
    genarm(f"{MODELS} --temperature 0 --prompts rows.jsonl --weight kind=-1 --out out2.jsonl")
    (plain, steered), (same, _) = read("out.jsonl"), read("out2.jsonl")
    assert [plain["weights"], steered["weights"]] == [{"kind": 1.0, "terse": 0.5}, {"kind": -1, "terse": 0.5}]
    assert plain["tokens"] != steered["tokens"] == same["tokens"]


@pytest.mark.versions
def test_chat_is_the_template(genarm: Genarm) -> None:
    rows = [{"prompt": "<user>hello\n<assistant>"}, {"messages": [{"role": "user", "content": "hello"}]}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    genarm(f"{MODELS} --temperature 0 --no-chat --prompts rows.jsonl --out out.jsonl")
    genarm(f"{MODELS} --temperature 0 --prompt hello --out out2.jsonl")
    genarm(f"{MODELS} --temperature 0 --no-chat --prompt hello --out out3.jsonl")
    (text, chat), (default,), (bare,) = read("out.jsonl"), read("out2.jsonl"), read("out3.jsonl")
    assert text["tokens"] == chat["tokens"] == default["tokens"] != bare["tokens"]


def test_stop_and_folders_with_colons(genarm: Genarm, root: Path) -> None:
    whole = genarm(f"{MODELS} --prompt hello").out
    assert (
        genarm(f"{MODELS} --prompt hello --stop {shlex.quote(whole[3])}").out == whole[: whole.index(whole[3])] + "\n"
    )
    if not (root / "ki:2").exists():
        (root / "ki:2").symlink_to(root / "kind")
    assert genarm(f"{BASE} --arm kind=ki:2 --arm terse=terse:0.5 --prompt hello").out == whole
    assert genarm(f"{BASE} --arm kind=ki:2:1.0 --arm terse=terse --weight terse=0.5 --prompt hello").out == whole


def test_compare_piped(genarm: Genarm) -> None:
    status, out, err = genarm(f"{MODELS} --prompts good.jsonl --compare")
    assert (status, err) == (0, "") and "\x1b" not in out
    genarm(f"{MODELS} --prompts good.jsonl --compare --out out.jsonl")
    genarm(f"{BASE} --prompts good.jsonl --out out2.jsonl")  # no ARMs
    genarm(f"{MODELS} --prompts good.jsonl --out out3.jsonl")
    for both, base, guided in zip(read("out.jsonl"), read("out2.jsonl"), read("out3.jsonl"), strict=True):
        assert both["unguided"]["tokens"] == base["tokens"] != guided["tokens"] == both["tokens"]
        assert f"--- unguided\n{base['text']}\n--- guided\n{guided['text']}\n\n" in out


def test_rewards_piped(genarm: Genarm) -> None:
    status, out, err = genarm(f"{MODELS} --prompt hello --rewards")
    assert (status, err) == (0, "")
    header, *lines = [line.split("\t") for line in out.splitlines()]
    assert header == ["token", "kind", "terse", "advantage"]
    genarm(f"{MODELS} --prompt hello --out out.jsonl")
    (row,) = read("out.jsonl")
    table = zip(row["rewards"]["kind"], row["rewards"]["terse"], row["base_logprobs"], strict=True)
    expected = [[kind, terse, (kind - base) + 0.5 * (terse - base)] for kind, terse, base in table]
    assert [[float(x) for x in line[1:]] for line in lines] == [pytest.approx(x, abs=2e-3) for x in expected]
    assert all(isinstance(json.loads(line[0]), str) for line in lines)
    assert genarm(f"{MODELS} --prompt hello --rewards --compare").out.endswith(f"--- guided\n{out}")


def test_arms_that_only_look_on_count_alike(genarm: Genarm) -> None:
    out = genarm(f"{MODELS} --prompt hello --rewards --weight kind=0 --weight terse=0").out
    genarm(f"{BASE} --prompt hello --out out.jsonl")
    (row,) = read("out.jsonl")
    lines = [[float(x) for x in line.split("\t")[1:]] for line in out.splitlines()[1:]]
    expected = [kind + terse - 2 * base for (kind, terse, _), base in zip(lines, row["base_logprobs"], strict=True)]
    assert [line[2] for line in lines] == pytest.approx(expected, abs=3e-3)
    assert any(expected)


def test_a_terminal_gets_columns_and_colours(genarm: Genarm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm", "COLUMNS": "60"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = genarm(f"{MODELS} --prompts good.jsonl --compare --rewards --batch-size 1").out
    plain = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", out)
    assert plain.count("advantage over the base") == 1 and len(re.findall("unguided +guided", plain)) == 3
    assert ";48;2;" in out and "3/3" in plain  # a colour; the bar
    streamed = genarm(f"{MODELS} --prompt hello --rewards").out
    assert ";48;2;" in streamed
    monkeypatch.delenv("FORCE_COLOR")
    text = genarm(f"{MODELS} --prompt hello").out
    assert printable(text) in printable(re.sub("\x1b\\[[0-9;]*m", "", streamed))


def printable(text: str) -> str:
    return "".join(c for c in text if c.isprintable() and c != " ")


def result(text: str) -> GenerationResult:
    return GenerationResult([text], [[]], [[]], [[]], {}, ["length"])


def test_columns_keep_long_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    sides = {name: result(text * 100) for name, text in {"unguided": "x", "guided": "y"}.items()}
    Screen(None, rewards=False).show("", sides, {})
    out = capsys.readouterr().out
    assert (out.count("x"), out.count("y")) == (100, 100)


def test_an_interrupted_run_goes_on(genarm: Genarm, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"{MODELS} --max-new-tokens 3 --prompts good.jsonl --compare --batch-size 2 --out"
    genarm(f"{line} out.jsonl")
    whole, decode = Path("out.jsonl").read_bytes(), cli.decode

    def interrupted(*args: Any) -> Any:
        yield from itertools.islice(decode(*args), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "decode", interrupted)
    assert genarm(f"{line} out2.jsonl") == (
        130,
        "",
        "interrupted: 2 of 3 done; run the same command again to go on\n",
    )
    monkeypatch.setattr(cli, "decode", decode)
    assert whole.startswith(Path("out2.jsonl").read_bytes())
    assert genarm(f"{line} out2.jsonl").status == 0
    assert Path("out2.jsonl").read_bytes() == whole

    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    cuts = [0, 40, ends[0] - 1, ends[0], ends[1] + 300, len(whole) - 1]
    for cut in cuts:  # as if killed in the middle of writing
        Path("out2.jsonl").write_bytes(whole[:cut])
        assert genarm(f"{line} out2.jsonl") == (0, "out2.jsonl: 3 of 3 prompts are done\n", "")
        assert Path("out2.jsonl").read_bytes() == whole

    monkeypatch.setattr(cli, "load", None)  # a finished run loads nothing
    assert genarm(f"{line} out2.jsonl").status == 0
    assert Path("out2.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("--seed 1", "other seed"),
        ("--weight kind=2", "other weights"),
        ("--top-p 0.5", "other top_p"),
        ("--compare", "other compare"),
        ("--stop x", "other stop"),
        ("--arm more=kind", "other weights, arms"),
    ],
)
def test_results_of_another_run_are_left_alone(genarm: Genarm, change: str, names: str) -> None:
    genarm(f"{MODELS} --prompts good.jsonl --out out.jsonl")
    before = Path("out.jsonl").read_bytes()
    status, _, err = genarm(f"{MODELS} --prompts good.jsonl --out out.jsonl {change}")
    assert (status, err) == (2, f"error: out.jsonl:1: belongs to another run ({names}); choose another --out\n")
    assert Path("out.jsonl").read_bytes() == before


@pytest.mark.parametrize("changed", ["base", "ARM 'kind'", "tokenizer"])
def test_results_of_models_that_have_changed_are_left_alone(genarm: Genarm, tmp_path: Path, changed: str) -> None:
    """The paths are the same."""
    folders = {name: tmp_path / name for name in ("base", "kind", "tokenizer")}
    for seed, folder in enumerate(folders.values()):
        save_model(folder, seed)
    line = f"{BASE} --base {folders['base']} --arm kind={folders['kind']} --tokenizer {folders['tokenizer']}"
    line += " --prompts good.jsonl --out out.jsonl"
    genarm(line)
    whole = Path("out.jsonl").read_bytes()
    part = whole[: whole.index(b"\n") + 1]
    Path("out.jsonl").write_bytes(part)
    before = {path: path.read_bytes() for path in tmp_path.glob("*/model.safetensors")}
    save_model(folders[changed.removeprefix("ARM ").strip("'")], seed=9)
    for lines in (part, whole):
        Path("out.jsonl").write_bytes(lines)
        status, _, err = genarm(line)
        assert status == 2
        assert err == f"error: out.jsonl:1: belongs to another run ({changed} has changed); choose another --out\n"
        assert Path("out.jsonl").read_bytes() == lines
    for path, content in before.items():
        path.write_bytes(content)
    assert genarm(line).status == 0


def test_an_adapter_in_a_subfolder_is_known_by_its_content(genarm: Genarm, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def save(seed: int) -> None:
        torch.manual_seed(seed)
        model = LlamaForCausalLM.from_pretrained("base")
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(model, config, adapter_name="polite").save_pretrained(tmp_path / "arms")

    save(1)
    line = f"{BASE} --base base --arm kind={tmp_path / 'arms'}#polite --prompts good.jsonl --out out.jsonl"
    assert genarm(line)[0] == 0
    whole = Path("out.jsonl").read_bytes()
    assert genarm(line)[0] == 0 and Path("out.jsonl").read_bytes() == whole
    save(2)
    status, _, err = genarm(line)
    assert (status, "ARM 'kind' has changed" in err) == (2, True)


def test_results_that_do_not_say_of_which_models_they_are(genarm: Genarm) -> None:
    """As they were written before."""
    genarm(f"{MODELS} --prompt hello --out out.jsonl")
    (row,) = read("out.jsonl")
    del row["settings"]["identity"]
    Path("out.jsonl").write_text(json.dumps(row) + "\n")
    status, _, err = genarm(f"{MODELS} --prompt hello --out out.jsonl")
    assert status == 2 and "(written by a version that did not record which models it used); choose another" in err


def test_the_bases_tokenizer_may_lie_elsewhere(genarm: Genarm, tmp_path: Path) -> None:
    save_model(tmp_path, seed=0)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "chat_template.jinja").unlink()
    bare = f"generate --base {tmp_path} --max-new-tokens 8 --top-k 40 --prompt hello"
    status, _, err = genarm(bare)
    assert status == 2 and "error: base: no tokenizer lies in" in err
    assert genarm(f"{bare} --tokenizer base") == genarm(f"{BASE} --prompt hello")


def test_no_file_loses_its_end(genarm: Genarm) -> None:
    genarm(f"{MODELS} --prompts good.jsonl --out out.jsonl")
    status, _, err = genarm(f"{MODELS} --prompt hello --out out.jsonl")
    assert status == 2 and "out.jsonl:1: belongs to another run" not in err and "more lines than there are" in err
    Path("out2.jsonl").write_text("notes without a newline")
    assert genarm(f"{MODELS} --prompt hello --out out2.jsonl").status == 2
    assert Path("out2.jsonl").read_text() == "notes without a newline"


def test_help_shows_examples_that_parse(genarm: Genarm) -> None:
    assert "genarm generate" in genarm("--help").out
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        status, out, err = genarm(f"{name} --help")
        assert (status, err) == (0, "") and "Example" in out
        examples = re.findall(rf"genarm {name}.*$", inspect.getdoc(command.callback) or "", re.M)
        assert examples
        for example in examples:
            assert example in out  # on one line, as it is to be copied
            assert not re.search(
                "--(base|data) (?!DIR|FILE|llama-7b|Anthropic/hh-rlhf )", example
            )  # no name of what is not there
            command.make_context(name, shlex.split(example)[2:])


def test_info(genarm: Genarm) -> None:
    status, out, err = genarm("info")
    assert (status, err) == (0, "")
    for name in NAMES:
        reason = why_unavailable(name)
        state = (
            f"missing: {reason}" if reason else f"available, {cpu.instruction_set()}" if name == "cpu" else "available"
        )
        assert re.search(rf"^backend {name} +{re.escape(state)}$", out, re.M)
    for name in ("genarm-kernels", "python", "torch", "transformers", "device cpu", "model base", "model polite"):
        assert re.search(rf"^{name} +\S", out, re.M)


def test_info_says_how_given_models_are_run(genarm: Genarm, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = genarm("info").out
    status, out, err = genarm("info --base base --arm kind=kind")
    assert (status, err, out.removeprefix(alone)) == (
        0,
        "",
        "path the base     static caches, fused steps\npath ARM 'kind'   static caches, fused steps\n",
    )
    monkeypatch.setattr(checks, "static_models", lambda model, linear: "planted")
    assert genarm("info --base base").out.removeprefix(alone) == "path the base     plain loop: planted\n"
    assert genarm("info --arm kind=nowhere/at/all").status == 2


def test_train_has_the_options_of_train_arm() -> None:
    options = {p.name: p for p in typer.main.get_command(cli.app).commands["train"].params}  # type: ignore[attr-defined]
    arguments = inspect.signature(training.train_arm).parameters
    assert set(options) - {"help"} == set(arguments)
    for name, argument in arguments.items():
        assert options[name].required == (argument.default is argument.empty)
        assert options[name].required or options[name].default == argument.default


@pytest.mark.versions
def test_train_then_generate(genarm: Genarm, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("peft")
    rows = [{"prompt": "hello", "chosen": "yy" * n, "rejected": "nn" * n} for n in (1, 2, 3, 4)]
    Path("prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--lora-r 2 --batch-size 2 --eval-fraction 0 --quiet"
    assert genarm(f"train --base base --data prefs.jsonl --out {tmp_path}/arm {options}") == (0, "", "")
    assert not [warning for warning in recwarn if warning.category is FutureWarning]
    status, out, err = genarm(f"{BASE} --arm new={tmp_path}/arm --prompt hello")
    assert (status, err) == (0, "") and out.strip()


def test_a_dry_run_writes_plain_text_and_no_folder(genarm: Genarm, tmp_path: Path) -> None:
    row = {"prompt": "one", "chosen": "two", "rejected": "three"}
    (tmp_path / "prefs.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"chosen": ""}) + "\n")
    arguments = f"train --base base --data {tmp_path}/prefs.jsonl --out {tmp_path}/arm --dry-run"
    status, out, err = genarm(arguments)
    assert (status, err) == (0, "")
    assert f"{tmp_path}/prefs.jsonl: prompt, chosen, rejected; 1 of 2 rows, left out: 1 with an empty response\n" in out
    assert "--- example 1 of 1\n" in out and "\nchosen:   [" in out and "\x1b" not in out
    assert not (tmp_path / "arm").exists()
    error = f"error: {tmp_path}/prefs.jsonl: strict: there are rows to be left out: an empty response in row 2\n"
    assert genarm(f"{arguments} --strict") == (2, "", error)


def test_an_interrupted_training_says_how_to_go_on(genarm: Genarm, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train_arm", interrupted)
    expected = 130, "", "interrupted: run the same command with --resume to go on\n"
    assert genarm("train --base base --data good.jsonl --out arm") == expected


@pytest.mark.versions
def test_the_bundled_models_are_the_default(genarm: Genarm) -> None:
    status, out, err = genarm(
        "generate --prompt 'How do I sleep better?' --max-new-tokens 4 --weight polite=0 --rewards"
    )
    assert (status, err, out.splitlines()[0]) == (0, "", "token\thelpful\tpolite\tadvantage")


# The console script itself, in processes of its own: seconds each to start.


def start(root: Path, line: str, **options: Any) -> subprocess.Popen[str]:
    script = Path(sys.executable).with_name("genarm")
    return subprocess.Popen(
        [script, *shlex.split(line)], cwd=root, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL, **options
    )


KILLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job of a shell's background inherits ignored
from genarm.cli import app as cli
from genarm.cli import results_file
append = results_file.Results.append
def append_and_die(self, records):
    append(self, records)
    if self.done == int(sys.argv[1]):
        os.kill(os.getpid(), int(sys.argv[2]))
results_file.Results.append = append_and_die
cli.main(sys.argv[3:])
"""


def test_killed_processes_lose_and_repeat_nothing(genarm: Genarm, root: Path) -> None:
    """Where a number of results are on the disk, and others under way."""
    texts = [{"prompt": "abcdefgh" * (1 + i % 5)} for i in range(16)]
    (root / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    line = f"{MODELS} --max-new-tokens 12 --prompts many.jsonl --batch-size 2 --out"
    for kill, done in {signal.SIGKILL: 5, signal.SIGINT: 9}.items():
        command = [sys.executable, "-c", KILLED, str(done), str(int(kill)), *shlex.split(f"{line} out.jsonl")]
        killed = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert Path("out.jsonl").read_bytes().count(b"\n") == done
        if kill == signal.SIGKILL:
            assert killed.returncode == -kill
        else:
            message = f"interrupted: {done} of {len(texts)} done; run the same command again to go on\n"
            assert (killed.returncode, killed.stderr) == (130, message)
    assert genarm(f"{line} out.jsonl").status == genarm(f"{line} out2.jsonl").status == 0
    assert Path("out.jsonl").read_bytes() == Path("out2.jsonl").read_bytes()


def test_a_closed_pipe_ends_quietly(root: Path) -> None:
    process = start(root, f"{MODELS} --prompts good.jsonl", stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.close()  # as `| head -0` does
    assert process.stderr and process.stderr.read() == ""
    assert process.wait() in (0, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("line", ["--help", f"{MODELS} --prompts good.jsonl"])
def test_a_full_standard_output_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # what is buffered is tried again at exit
    with Path("/dev/full").open("w") as full:
        process = start(root, line, stdout=full)
    assert process.communicate()[1] == "error: cannot write the output: No space left on device\n"
    assert process.returncode == 2


def test_the_script_reports_errors(root: Path) -> None:
    process = start(root, "generate --base nowhere/at/all --prompt x", stdout=subprocess.PIPE)
    assert process.communicate() == ("", "error: base: no such folder: 'nowhere/at/all'\n")
    assert process.returncode == 2


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, genarm.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
