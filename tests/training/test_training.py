"""Training of reward models: the loss, the data, and runs that are killed and resumed."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")

from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from genarm import GuidedDecoder
from genarm.errors import GenarmError
from genarm.preferences.pairs import Preference, encode_preferences, read_preferences
from genarm.training import ArmTrainer, collate_pairs, preference_loss, response_logps, train_arm
from genarm.training.arm import _Progress
from published_rows import PUBLISHED

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer that has one merge: "a" + "b"."""
    folder = tmp_path_factory.mktemp("base")
    symbols = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    core.add_special_tokens([AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = token_decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture
def tokenizer(base: Path) -> Any:
    return AutoTokenizer.from_pretrained(base)


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs of ragged lengths that are told apart by a letter: "y" is preferred to "n"."""
    draw = random.Random(0)
    rows = []
    for _ in range(40):
        prompt = "".join(draw.choices("cdef", k=draw.randint(1, 6)))
        rows.append({"prompt": prompt, "chosen": "y" * draw.randint(1, 4), "rejected": "n" * draw.randint(1, 4)})
    return write_rows(tmp_path_factory.mktemp("data") / "prefs.jsonl", rows)


RAGGED = [
    {"prompt": [0, 10, 11, 12], "chosen": [20, 21, 1], "rejected": [30, 1]},
    {"prompt": [0, 13], "chosen": [22, 1], "rejected": [31, 32, 33, 34, 35, 1]},
    {"prompt": [0], "chosen": [1], "rejected": [36, 1]},
]


def loop_logp(model: Any, prompt: list[int], response: list[int]) -> float:
    """log pi(response | prompt), token by token: each is scored by a forward pass over what stands before it."""
    total, context = 0.0, list(prompt)
    for token in response:
        with torch.no_grad():
            logits = model.double()(input_ids=torch.tensor([context])).logits[0, -1]
        total += (logits[token] - torch.logsumexp(logits, 0)).item()
        context.append(token)
    return total


@pytest.mark.versions
def test_loss_is_the_papers(model: Any) -> None:
    batch = collate_pairs(RAGGED)
    with torch.no_grad():
        chosen, rejected = response_logps(model, **batch).chunk(2)
        loss = ArmTrainer.compute_loss(_Bare(beta=0.05), model, batch).item()
    margins = [
        loop_logp(model, p["prompt"], p["chosen"]) - loop_logp(model, p["prompt"], p["rejected"]) for p in RAGGED
    ]
    torch.testing.assert_close(chosen - rejected, torch.tensor(margins), atol=1e-4, rtol=1e-5)
    assert loss == pytest.approx(sum(math.log1p(math.exp(-0.05 * m)) for m in margins) / 3, rel=1e-5)


class _Bare(ArmTrainer):
    """Only what the loss needs of a trainer."""

    def __init__(self, beta: float) -> None:
        self.beta = beta


def test_padding_has_no_effect(model: Any) -> None:
    with torch.no_grad():
        together = response_logps(model, **collate_pairs(RAGGED)).view(2, -1).T
        single = torch.stack([response_logps(model, **collate_pairs([pair])) for pair in RAGGED])
        batch = collate_pairs(RAGGED)
        batch["input_ids"][batch["attention_mask"] == 0] = 77
        other_padding = response_logps(model, **batch).view(2, -1).T
    torch.testing.assert_close(together, single)
    torch.testing.assert_close(together, other_padding)


def test_only_response_tokens_are_scored() -> None:
    """With a model that ignores its context, log pi(y | x) does not depend on the prompt, and is a known number."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))

    def unigram(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return type("Output", (), {"logits": logits.expand(*input_ids.shape, -1)})

    first = response_logps(unigram, **collate_pairs([{"prompt": [0, 3, 4], "chosen": [5, 6], "rejected": [7]}]))
    other = response_logps(unigram, **collate_pairs([{"prompt": [9], "chosen": [5, 6], "rejected": [7]}]))
    logp = logits.log_softmax(0)
    torch.testing.assert_close(first, torch.stack([logp[5] + logp[6], logp[7]]))
    torch.testing.assert_close(first, other)


def test_loss_is_stable_far_out() -> None:
    assert preference_loss(torch.tensor([-1e6, 1e6]), 1.0).item() == 5e5


GOOD = '{"prompt": "p", "chosen": "c", "rejected": "r"}'
CHAT = '{"prompt": [{"role": "user", "content": "p"}], "chosen": %s, "rejected": "r"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", ', "is not JSON: Expecting property name enclosed in double quotes: column 17"),
        ("\udcff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["p", "c", "r"]', "is not an object"),
        ('{"prompt": "p", "rejected": "r"}', "has no chosen"),
        ('{"chosen": "c"}', "has no prompt and no rejected"),
        ('{"prompt": 3, "chosen": "c", "rejected": "r"}', "prompt is neither a string nor a list"),
        ('{"prompt": "p", "chosen": 7, "rejected": "r"}', "chosen is not a string"),
        ('{"prompt": "p", "chosen": "c", "rejected": "\\ud800"}', "rejected is not valid Unicode"),
        ('{"prompt": [], "chosen": "c", "rejected": "r"}', "prompt has no messages"),
        (CHAT % "7", "chosen is not a list of messages"),
        (CHAT % '[{"role": "\\ud800", "content": "c"}]', "chosen is not valid Unicode"),
        (CHAT % '["c"]', "chosen has a message that is not an object"),
        (CHAT % '[{"content": "c"}]', "chosen has a message whose role is missing"),
        (CHAT % '[{"role": "assistant", "content": null}]', "chosen has a message whose content is missing"),
    ],
)
def test_malformed_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prefs.jsonl"
    path.write_bytes("\n".join([GOOD, "", CHAT % '"c"', line, GOOD]).encode(errors="surrogateescape"))
    with pytest.raises(GenarmError) as caught:
        read_preferences(path)
    assert str(caught.value).startswith(f"{path}:4: {message}")


def test_files_without_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "folder").mkdir()
    folder = "cannot be read" if find_spec("datasets") else r"needs datasets: pip install 'gen.*\[train\]'"
    for path, message in [("missing.jsonl", "No such file"), ("empty.jsonl", "has no rows"), ("folder", folder)]:
        with pytest.raises(GenarmError, match=message):
            read_preferences(tmp_path / path)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.versions
def test_strings_are_tokenised_with_bos_and_eos(tokenizer: Any) -> None:
    rows = [Preference("xy", "z<eos>", "w", "f:1"), Preference("xa", "bz", "w", "f:2")]
    (first, second), counts = encode_preferences(rows, tokenizer, 64)
    assert first == {"prompt": [0, *ids(tokenizer, "xy")], "chosen": [*ids(tokenizer, "z"), 1], "rejected": [
        *ids(tokenizer, "w"), 1]}  # fmt: skip
    # "xabz" as a whole has the token "ab" across the boundary; the prompt's tokens stay as they are in decoding
    assert len(ids(tokenizer, "xabz")) == 3
    assert second["prompt"] == [0, *ids(tokenizer, "xa")]
    assert second["chosen"] == [*ids(tokenizer, "bz"), 1]
    assert counts == {"prompts": 2, "prompts_truncated": 0, "responses": 4, "responses_truncated": 0}


@pytest.mark.versions
def test_chat_rows_go_through_the_template(tokenizer: Any) -> None:
    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = [Preference([{"role": "user", "content": "hi"}], answer("yes"), answer("no"), "f:1")]
    (pair,), _ = encode_preferences(rows, tokenizer, 99)
    assert tokenizer.decode(pair["prompt"]) == "<user>hi<eos>\n<assistant>"
    assert tokenizer.decode(pair["chosen"]) == "yes<eos>"  # no second one, and nothing after it: decoding stops there
    assert tokenizer.decode(pair["rejected"]) == "no<eos>"
    tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", ".")
    (pair,), _ = encode_preferences(rows, tokenizer, 99)
    assert tokenizer.decode(pair["chosen"]) == "yes.\n<eos>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages | length }}", "renders the prompt differently"),
        ("constant", "renders the prompt differently"),
    ],
)
@pytest.mark.versions
def test_unusable_chat_template_names_the_row(tokenizer: Any, template: str | None, message: str) -> None:
    tokenizer.chat_template = template
    chat = [{"role": "user", "content": "hi"}]
    rows = [Preference("p", "c", "r", "f:1"), Preference(chat, chat, [*chat, *chat], "f:2")]
    with pytest.raises(GenarmError, match=rf"^f:2: .*{message}"):
        encode_preferences(rows, tokenizer, 99)


def test_truncation_is_counted(tokenizer: Any) -> None:
    rows = [
        Preference("cdef", "yy", "n", "f:1"),  # 5 + 3 tokens fit
        Preference("cdefg", "yyyy", "n", "f:2"),  # 6 + 5: the prompt loses its left, but for BOS
        Preference("cd", "yzyzyzyzyz", "n" * 7, "f:3"),  # 11 and 8 tokens: the prompt keeps one, both responses are cut
        Preference("cd", "yzyzyz", "n", "f:4"),  # 3 + 7: one prompt token
    ]
    pairs, counts = encode_preferences(rows, tokenizer, 8)
    assert counts == {"prompts": 4, "prompts_truncated": 3, "responses": 8, "responses_truncated": 2}
    assert pairs[0]["prompt"] == [0, *ids(tokenizer, "cdef")]
    assert pairs[1]["prompt"] == [0, *ids(tokenizer, "fg")]
    assert pairs[2] == {
        "prompt": ids(tokenizer, "d"),
        "chosen": ids(tokenizer, "yzyzyzy"),
        "rejected": ids(tokenizer, "n" * 7),
    }
    assert pairs[3]["prompt"] == ids(tokenizer, "d")
    assert pairs[3]["chosen"] == [*ids(tokenizer, "yzyzyz"), 1]


SETTINGS: dict[str, Any] = {"lora_r": 4, "lora_dropout": 0.3, "lr": 5e-3, "epochs": 3, "batch_size": 4}
SETTINGS |= {"gradient_accumulation_steps": 2, "save_steps": 4, "eval_fraction": 0.1, "verbose": False}


@pytest.fixture(scope="session")
def finished(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "arm"
    train_arm(base, data, out, **SETTINGS)
    return out


def curve(out: Path) -> dict[int, list[float]]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {e["step"]: [e["loss"], e["grad_norm"], e["learning_rate"]] for e in entries}


KILLED = """
import json, os, signal, sys
from genarm.training import arm as training
class Killed(training.ArmTrainer):
    def log(self, logs, *args, **kwargs):
        super().log(logs, *args, **kwargs)
        if self.state.global_step == 14:
            os.kill(os.getpid(), signal.SIGKILL)
training.ArmTrainer = Killed
training.train_arm(*sys.argv[1:4], **json.loads(sys.argv[4]))
"""


@pytest.mark.versions
def test_a_killed_run_resumes_to_the_same_curve(
    base: Path, data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "arm"
    arguments = [str(base), str(data), str(out), json.dumps(SETTINGS)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-12", "checkpoint-8", "run.json"]
    (out / "checkpoint-13").mkdir()  # as if killed while writing it

    with pytest.raises(GenarmError, match="--resume"):
        train_arm(base, data, out, **SETTINGS)
    with pytest.raises(GenarmError, match=r"other settings: lr was 0\.005, is 0\.1"):
        train_arm(base, data, out, **{**SETTINGS, "lr": 0.1}, resume=True)
    other = write_rows(tmp_path / "other.jsonl", [json.loads(GOOD)] * 40)
    with pytest.raises(GenarmError, match="other settings: data_sha256"):
        train_arm(base, other, out, **SETTINGS, resume=True)

    steps = []
    log = ArmTrainer.log
    monkeypatch.setattr(ArmTrainer, "log", lambda self, *a: [log(self, *a), steps.append(self.state.global_step)])
    metrics = train_arm(base, data, out, **SETTINGS, resume=True)
    assert steps[0] == 13
    whole, resumed = curve(finished), curve(out)
    assert list(whole) == list(resumed) == list(range(1, 28))
    torch.testing.assert_close(
        torch.tensor(list(resumed.values())), torch.tensor(list(whole.values())), atol=1e-6, rtol=0
    )
    assert metrics == pytest.approx(json.loads((finished / "metrics.json").read_text()), abs=1e-6)


@pytest.mark.versions
def test_a_run_killed_after_its_last_step_resumes(
    base: Path, data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "epochs": 1}
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(ArmTrainer, "held_out_metrics", lambda self: 1 / 0)
        train_arm(base, data, tmp_path / "arm", **settings)
    metrics = train_arm(base, data, tmp_path / "arm", **settings, resume=True)
    assert metrics["steps"] == 9
    assert "preference_accuracy" in metrics


@pytest.mark.versions
def test_dropout_takes_part_in_the_curve(base: Path, data: Path, finished: Path, tmp_path: Path) -> None:
    """Else the test of resuming would not see random states that are not restored."""
    train_arm(base, data, tmp_path / "arm", **{**SETTINGS, "lora_dropout": 0.0, "epochs": 1})
    assert curve(tmp_path / "arm")[2][0] != curve(finished)[2][0]


def test_a_finished_run(base: Path, data: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert not list(finished.glob("checkpoint-*"))
    assert (metrics["train_pairs"], metrics["eval_pairs"], metrics["steps"]) == (36, 4, 27)
    assert metrics["reward_margin"] == pytest.approx(0.05 * metrics["reward_margin_nats"])
    assert train_arm(base, data, finished, **{**SETTINGS, "verbose": True}, resume=True) == metrics
    assert "finished" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(GenarmError, match="--resume"):
        train_arm(base, data, finished, **SETTINGS)
    assert before == {path: path.read_bytes() for path in finished.iterdir()}


@pytest.mark.versions
def test_held_out_metrics_are_those_of_the_saved_adapter(base: Path, data: Path, finished: Path, model: Any) -> None:
    from peft import PeftModel

    assert json.loads((finished / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    arm = PeftModel.from_pretrained(model, finished).eval()
    pairs, _ = encode_preferences(read_preferences(data), tokenizer, 1024)
    held_out = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:4].tolist()
    with torch.no_grad():
        margins = [
            loop_logp(arm, pairs[i]["prompt"], pairs[i]["chosen"])
            - loop_logp(arm, pairs[i]["prompt"], pairs[i]["rejected"])
            for i in held_out
        ]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["reward_margin_nats"] == pytest.approx(sum(margins) / 4, rel=1e-4)
    assert metrics["preference_accuracy"] == sum(m > 0 for m in margins) / 4
    assert metrics["eval_loss"] == pytest.approx(sum(math.log1p(math.exp(-0.05 * m)) for m in margins) / 4, rel=1e-4)


@pytest.mark.versions
def test_adapter_has_the_logits_of_the_trained_model(
    base: Path, data: Path, tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel

    from genarm.training import arm as training

    trained = {}

    class Kept(ArmTrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            trained["model"] = self.model

    monkeypatch.setattr(training, "ArmTrainer", Kept)
    train_arm(base, data, tmp_path / "arm", **{**SETTINGS, "epochs": 1})
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        plain = model(tokens).logits
        expected = trained["model"].eval().cpu()(tokens).logits
        loaded = PeftModel.from_pretrained(model, tmp_path / "arm").eval()(tokens).logits
    torch.testing.assert_close(loaded, expected)
    assert (loaded - plain).abs().max() > 0.01


@pytest.mark.versions
def test_full_fine_tuning_learns(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"lora_r": 0, "lr": 3e-3, "epochs": 4, "batch_size": 4, "eval_fraction": 0.25, "max_length": 8}
    metrics = train_arm(base, data, tmp_path / "arm", **settings)
    assert metrics["preference_accuracy"] > 0.9
    assert metrics["reward_margin"] > 0.2
    arm = AutoModelForCausalLM.from_pretrained(tmp_path / "arm")
    assert arm.config.use_cache
    assert metrics["prompts"] == 40
    assert metrics["prompts_truncated"] > 0
    printed = capsys.readouterr().out
    assert f"{metrics['prompts_truncated']} of 40 prompts, 0 of 80 responses" in printed
    assert "preference_accuracy" in printed


@pytest.mark.versions
def test_bf16_trains(base: Path, data: Path, tmp_path: Path) -> None:
    metrics = train_arm(base, data, tmp_path / "arm", **{**SETTINGS, "epochs": 0.2}, bf16=True)
    assert math.isfinite(metrics["eval_loss"])


@pytest.mark.versions
def test_no_held_out_rows(base: Path, data: Path, tmp_path: Path) -> None:
    metrics = train_arm(base, data, tmp_path / "arm", **{**SETTINGS, "epochs": 0.2, "eval_fraction": 0}, resume=True)
    assert metrics["train_pairs"] == 40
    assert "preference_accuracy" not in metrics


@pytest.mark.versions
def test_a_loss_that_is_not_finite_stops(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(GenarmError, match=r"training stopped: \w+ is (nan|inf) at step"):
        train_arm(base, data, tmp_path / "arm", **{**SETTINGS, "lora_r": 0, "lr": 1e30, "warmup_steps": 0})
    assert not (tmp_path / "arm" / "metrics.json").exists()


def not_causal(tmp_path: Path) -> Path:
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def folder_with_a_file(tmp_path: Path) -> Path:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    return tmp_path / "full"


def file_as_folder(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file" / "arm"


def one_row(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "one.jsonl", [json.loads(GOOD)])


def long_row(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "long.jsonl", [{"prompt": "p" * 300, "chosen": "c", "rejected": "r"}] * 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": lambda path: path / "nowhere"}, "no such folder: .*nowhere"),
        ({"base": lambda path: path}, "holds no causal language model: no usable config.json"),
        ({"base": not_causal}, "holds no causal language model but t5"),
        ({"data": one_row}, "leave none to train on"),
        ({"data": long_row}, "303 tokens, but the model takes 256; lower --max-length"),
        ({"out": folder_with_a_file}, "is not empty and holds no training run"),
        ({"out": folder_with_a_file, "resume": True}, "is not empty and holds no training run"),
        ({"out": lambda path: file_as_folder(path).parent}, "file: is not a folder that can be written to"),
        ({"out": file_as_folder}, "file: is not a folder that can be written to"),
        ({"lora_r": -1}, "lora_r: expected an integer of at least 0, got -1"),
        ({"batch_size": 2.5}, "batch_size: expected an integer of at least 1, got 2.5"),
        ({"beta": 0.0}, "beta: expected a finite number above 0"),
        ({"lr": math.nan}, "lr: expected a finite number above 0"),
        ({"eval_fraction": 1.0}, "eval_fraction: expected a number from 0 to below 1"),
        ({"batch_size": 4, "gradient_accumulation_steps": 3}, "must be a multiple"),
        ({"seed": 2**32}, "seed: expected an integer of at least 0 below 4294967296"),
        ({"save_steps": 0}, "save_steps: expected an integer of at least 1"),
    ],
)
@pytest.mark.versions
def test_errors_come_in_one_line(
    base: Path, data: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    given = {"base": base, "data": data, "out": tmp_path / "arm", "verbose": False}
    given |= {k: v(tmp_path) if isinstance(v, Callable) else v for k, v in arguments.items()}  # type: ignore[arg-type]
    with pytest.raises(GenarmError, match=message) as caught:
        train_arm(**given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "arm").exists()


@pytest.mark.versions
def test_a_nested_configuration_limits_the_length() -> None:
    """Models of text and images keep max_position_embeddings one level down."""
    from types import SimpleNamespace

    from genarm.training.arm import _check_fits

    text = SimpleNamespace(max_position_embeddings=3)
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text),
        get_input_embeddings=lambda: SimpleNamespace(num_embeddings=9),
    )
    _check_fits(model, [{"prompt": [1], "chosen": [2, 3], "rejected": [4]}])
    with pytest.raises(GenarmError, match="a sequence has 4 tokens, but the model takes 3"):
        _check_fits(model, [{"prompt": [1], "chosen": [2, 3, 4], "rejected": [4]}])


# --- data as published, from the file to the decoded text


# Of each shape one; test_preferences.py reads them all.
TRAINED = ["texts", "HH-RLHF", "PKU-SafeRLHF, safer", "UltraFeedback binarized", "ShareGPT", "Orca", "Nectar"]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.versions
def test_a_published_format_trains_and_decodes(base: Path, tmp_path: Path, name: str, model: Any) -> None:
    one = PUBLISHED[name]
    data = write_rows(tmp_path / "rows.jsonl", [one.row] * 3)
    settings = {"lora_r": 1, "batch_size": 2, "max_length": 200, "verbose": False, "objective": one.objective}
    metrics = train_arm(base, data, tmp_path / "arm", **settings)
    assert (metrics["prompts"], metrics["train_pairs"], metrics["prompts_truncated"]) == (3, 2, 0)
    assert json.loads((tmp_path / "arm" / "run.json").read_text())["objective"] == one.objective
    decoder = GuidedDecoder.from_pretrained(base, {"arm": tmp_path / "arm"})
    if isinstance(one.prompt, str):
        result = decoder.generate(one.prompt, max_new_tokens=2, temperature=0)
    else:
        messages = [{"role": "user", "content": content} for content in one.prompt]
        result = decoder.generate(messages=messages, max_new_tokens=2, temperature=0)
    assert all(math.isfinite(reward) for reward in result.rewards["arm"][0])


def test_what_was_recognised_and_left_out_is_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = PUBLISHED["PKU-SafeRLHF"].row
    alike = {"response_0": "y<eos>", "response_1": "y"}  # which become the same tokens
    data = write_rows(tmp_path / "rows.jsonl", [row] * 3 + [row | {"response_1": ""}, row | alike])
    metrics = train_arm(base, data, tmp_path / "arm", batch_size=2, lora_r=1)
    printed = capsys.readouterr().out
    assert f"{data}: PKU-SafeRLHF; 4 of 5 rows, left out: 1 with an empty response\n" in printed
    assert "left out: 1 pairs whose responses are equal as tokens\n" in printed
    assert (metrics["prompts"], metrics["dropped_empty"], metrics["dropped_equal_tokens"]) == (3, 1, 1)
    for rows, message in ((data, "an empty response in row 4"), ([row, row, row | alike], "equal as tokens in row 3")):
        data = rows if isinstance(rows, Path) else write_rows(tmp_path / "other.jsonl", rows)
        with pytest.raises(GenarmError, match=f"strict: there are rows to be left out: .*{message}"):
            train_arm(base, data, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_dry_run_shows_the_tokens_with_loss(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from genarm.models import loading

    monkeypatch.setattr(loading, "load_model", None)  # the model is not needed
    rows = [{"prompt": f"q\n{i}", "chosen": "é\t[ab]", "rejected": "no"} for i in range(5)]
    counts = train_arm(base, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "arm", dry_run=True)
    assert counts["prompts"] == 5
    printed = capsys.readouterr().out
    assert not (tmp_path / "arm").exists()
    assert [line for line in printed.splitlines() if line.startswith("---")] == [
        f"--- example {i} of 5" for i in (1, 2, 3)
    ]
    first = printed[printed.index("--- example 1") : printed.index("--- example 2")].splitlines()[1:]
    assert first == [r"prompt:   <bos>q\n0", r"chosen:   [é][\t][[][ab][]][<eos>]", "rejected: [n][o][<eos>]"]


# --- long runs


def test_a_second_training_in_the_folder_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    from genarm.training import arm as training

    out, refused = tmp_path / "arm", []

    class Meanwhile(ArmTrainer):
        def held_out_metrics(self) -> dict[str, float]:
            for resume in (False, True):
                with pytest.raises(GenarmError, match="another training runs in this folder") as caught:
                    train_arm(base, data, out, **SETTINGS, resume=resume)
                refused.append(caught.value)
            return super().held_out_metrics()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ArmTrainer", Meanwhile)
        train_arm(base, data, out, **{**SETTINGS, "epochs": 0.2})
    assert len(refused) == 2
    train_arm(base, data, out, **{**SETTINGS, "epochs": 0.2}, resume=True)  # the lock is gone with the run


def test_two_trainings_begun_at_once(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sees the other's folder when it looks; the second comes to make it when the first has finished."""
    from genarm.models import loading

    load, out = loading.load_model, tmp_path / "arm"

    def first_the_other(*arguments: Any) -> Any:
        monkeypatch.setattr(loading, "load_model", load)
        train_arm(base, data, out, **{**SETTINGS, "epochs": 0.2})
        return load(*arguments)

    monkeypatch.setattr(loading, "load_model", first_the_other)
    with pytest.raises(GenarmError, match="another training has begun there meanwhile"):
        train_arm(base, data, out, **{**SETTINGS, "epochs": 0.2, "lr": 1e-4})
    assert json.loads((out / "run.json").read_text())["lr"] == SETTINGS["lr"]


def test_a_run_belongs_to_the_base_and_not_to_its_path(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "epochs": 0.2}
    shutil.copytree(base, tmp_path / "base")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(ArmTrainer, "held_out_metrics", lambda self: 1 / 0)
        train_arm(tmp_path / "base", data, tmp_path / "arm", **settings)
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.lm_head.weight[3, 3] += 1
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(GenarmError, match=r"holds a run with other settings: base_identity was [0-9a-f]+, is "):
        train_arm(tmp_path / "base", data, tmp_path / "arm", **settings, resume=True)
    train_arm(base, data, tmp_path / "arm", **settings, resume=True)  # moved, but the same


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from genarm.training import arm as training
from genarm.errors import GenarmError
class Full(training.ArmTrainer):
    def log(self, logs, *args, **kwargs):
        super().log(logs, *args, **kwargs)
        if self.state.global_step == step:
            files = sorted(Path(self.args.output_dir).glob(f"checkpoint-*/{file}"))
            room = files[-1].stat().st_size * 3 // 4 if files else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
training.ArmTrainer = Full
base, data, settings, *cases = map(json.loads, sys.argv[1:])
for out, step, file in cases:
    try:
        training.train_arm(base, data, out, **settings)
    except GenarmError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the size of files cannot be limited")
def test_a_full_disk_ends_in_one_line_and_leaves_a_run_to_go_on_with(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files stands for it, so that a file of a checkpoint loses its end, or nothing is written.

    After step 9 that is the last checkpoint.
    """
    settings = {**SETTINGS, "epochs": 1}
    where = [(6, "adapter_model.safetensors"), (6, "optimizer.pt"), (9, "optimizer.pt"), (6, "none"), (1, "none")]
    cases = [(str(tmp_path / f"arm-{i}"), *one) for i, one in enumerate(where)]
    arguments = map(json.dumps, (str(base), str(data), settings, *cases))
    run = subprocess.run([sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True, check=False)
    assert len(run.stdout.splitlines()) == len(cases), run.stdout + run.stderr
    for (out, step, file), line in zip(cases, run.stdout.splitlines(), strict=True):
        assert re.fullmatch(f"{out}: cannot be written to: .+; make room and go on by --resume", line)
        whole = [i for i in (4, 8) if i <= step]
        assert sorted(path.name for path in Path(out).glob("checkpoint-*")) == [f"checkpoint-{i}" for i in whole], file
        steps: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(_Progress, "on_log", lambda *a, to=steps, **_: to.append(a[2].global_step))
            assert train_arm(base, data, out, **settings, resume=True)["steps"] == 9
        assert steps[0] == max(whole, default=0) + 1


# --- bases of other kinds

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 259, "bos_token_id": 0}
SMALL |= {"eos_token_id": 1, "pad_token_id": 1}
ATTENTION = {**SMALL, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXTURE = {**ATTENTION, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
BASES: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    # by type: the configuration, layers that take a LoRA, some that do not
    "gpt2": ({**SMALL, "n_embd": 32, "n_layer": 2, "n_head": 4}, {"c_attn", "c_proj", "c_fc"}, {"lm_head"}),
    "mixtral": ({**ATTENTION, "num_local_experts": 4}, {"q_proj", "o_proj"}, {"gate", "experts"}),
    "qwen3_moe": (
        {**MIXTURE, "num_experts": 4, "mlp_only_layers": [0]}, {"q_proj", "o_proj"}, {"gate", "experts", "gate_proj"}
    ),
    "phimoe": ({**ATTENTION, "num_local_experts": 4}, {"q_proj", "o_proj"}, {"router", "experts"}),
    "mamba2": ({**SMALL, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1}, {"in_proj"}, {"out_proj"}),
    "bart": (
        {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 259,
         "is_decoder": True, "is_encoder_decoder": False, "max_position_embeddings": 64},
        {"q_proj", "out_proj", "fc1", "fc2"}, {"lm_head"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.versions
def test_bases_of_other_kinds_train_with_the_defaults(
    base: Path, data: Path, tmp_path: Path, tokenizer: Any, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, taken, left_out = BASES[kind]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    train_arm(tmp_path / "base", data, tmp_path / "arm", max_length=32, epochs=0.1)
    assert re.search(r"LoRA of rank 8 on \d+ linear layers, which hold \d+% of the weights", capsys.readouterr().out)
    names = safe_open(tmp_path / "arm" / "adapter_model.safetensors", "pt").keys()
    layers = {part for name in names for part in name.split(".")}
    assert taken <= layers and not left_out & layers
    decoder = GuidedDecoder.from_pretrained(tmp_path / "base", {"arm": tmp_path / "arm"})
    assert decoder.generate("cd", max_new_tokens=2, temperature=0).rewards["arm"][0]


@pytest.mark.versions
def test_a_base_without_linear_layers_says_what_to_set(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genarm.training import arm as training

    monkeypatch.setattr(training, "_adaptable", lambda model: [])
    with pytest.raises(GenarmError, match="no linear layers that take a LoRA; train all its weights with --lora-r 0"):
        train_arm(base, data, tmp_path / "arm", verbose=False)


def test_missing_extra_is_named(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from genarm.training import arm as training

    monkeypatch.setattr(training, "find_spec", lambda name: None if name == "peft" else name)
    with pytest.raises(GenarmError, match=r"peft: pip install 'gen.*, or in a checkout pip install '\.\[train\]'"):
        train_arm(base, data, tmp_path / "arm")
