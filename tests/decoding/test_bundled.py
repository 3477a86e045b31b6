"""The shipped folders: complete, small, and one vocabulary for all three."""

import io
import json

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from bench import demo
from genarm import GenarmError, GuidedDecoder, bundled, world
from genarm.decoding import checks


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(bundled.path("base"))


def test_folders_hold_what_is_shipped_and_no_more() -> None:
    for name in bundled.NAMES:
        assert sorted(file.name for file in bundled.path(name).iterdir()) == sorted(bundled.SHIPPED)
    assert sum(file.stat().st_size for file in bundled.FOLDER.rglob("*")) < 8_000_000


def test_no_machine_paths_are_shipped() -> None:
    for file in bundled.FOLDER.glob("*/*.json"):
        settings = json.loads(file.read_text()) if file.name != "tokenizer.json" else {}
        assert not any(str(value).startswith(("/", "~")) for value in settings.values()), file


def test_sizes_of_the_models() -> None:
    parameters = {}
    for name in bundled.NAMES:
        model = AutoModelForCausalLM.from_pretrained(bundled.path(name))
        assert model.config.model_type == "llama"
        assert {str(tensor.dtype) for tensor in model.parameters()} == {"torch.float32"}
        parameters[name] = model.num_parameters()
    assert 1_000_000 <= parameters["base"] <= 3_000_000
    assert max(parameters[name] for name in world.ATTRIBUTES) * 3 <= parameters["base"]


@pytest.mark.versions
def test_one_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    assert 1000 <= len(tokenizer) <= 2000
    for name in world.ATTRIBUTES:
        assert AutoTokenizer.from_pretrained(bundled.path(name)).get_vocab() == tokenizer.get_vocab()
        assert AutoModelForCausalLM.from_pretrained(bundled.path(name)).config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("text", ["Dim the lamps 30 minutes before bedtime.", " naïve  日本\n\t€", "Don't!", ""])
@pytest.mark.versions
def test_tokenizer_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_answers_are_short_in_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    answers = world.sample_responses(world.sample_prompts(500))
    lengths = sorted(map(len, tokenizer(answers)["input_ids"]))
    assert lengths[50] >= 15
    assert lengths[450] <= 65


@pytest.mark.versions
def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    user, assistant = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}

    def render(messages: list[dict[str, str]], **options: bool) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    prompt = render([user], add_generation_prompt=True)
    assert prompt == "<bos>User: Hi?\nAssistant:"
    assert render([user, assistant]) == f"{prompt} Hello.<eos>"
    assert render([user, assistant, user]) == f"{prompt} Hello.<eos>User: Hi?\n"
    # the prompt's tokens are a prefix of the conversation's, which training on the response alone relies on
    ids = tokenizer.apply_chat_template([user, assistant], return_dict=False)
    start = tokenizer(prompt)["input_ids"]
    assert ids[: len(start)] == start
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="unknown bundled model 'large'; the bundled models are base, helpful, polite"):
        bundled.path("large")


@pytest.mark.versions
def test_they_decode_on_the_fast_path() -> None:
    decoder = GuidedDecoder.from_pretrained(
        bundled.path("base"), {name: bundled.path(name) for name in world.ATTRIBUTES}
    )
    decoder.require_fast_path()
    assert [str(path) for path in decoder.paths] == ["static caches, fused steps"] * 3


@pytest.mark.parametrize("show", [demo.show_texts, demo.show_speed])
def test_the_demo_shows_nothing_of_another_path(show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "static_models", lambda model, linear: "planted")
    screen = io.StringIO()
    with pytest.raises(GenarmError, match="the base: planted"):
        show(Console(file=screen))
    assert not screen.getvalue()
