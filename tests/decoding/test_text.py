"""Text into tokens and back: prompts, vocabularies, the text of a continuation as its tokens arrive."""

import json
import random
from functools import partial

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from genarm import GenarmError, GuidedDecoder
from genarm.decoding.results import Decoded
from genarm.models.folders import check_folder
from genarm.text import TextStream
from genarm.tokens import encode_prompt
from test_decoder import byte_tokenizer, make_model

pytestmark = pytest.mark.versions
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 100\n"


def fast(core, *specials, **named):
    core.add_special_tokens([AddedToken(name, special=True) for name in specials])
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def in_bytes(*specials, **named):
    """A byte a token, and special tokens behind them."""
    core = Tokenizer(
        models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(core, *specials, **named)


def byte_fallback(*specials):
    """As Llama 2 has it: words with the space before them, letters, and bytes for all else."""
    words = ("▁", "▁hello", "▁world", "\ufffd", *map(chr, range(33, 127)))
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    core = Tokenizer(models.Unigram([(name, -1.0 - len(name) % 3) for name in names], 0, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return fast(core, *specials, unk_token="<unk>")


def of_words(decoder, words, *specials):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *words])}, "?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        core.decoder = decoder
    return fast(core, *specials, unk_token="?")


TOKENIZERS = {
    "bytes": in_bytes("<|a|>", "<|b|>"),
    "byte fallback": byte_fallback("<|a|>", "<|b|>"),
    "metaspace": of_words(decoders.Metaspace(), ["▁red", "▁fox", "es", "▁"], "<|a|>"),
    "word pieces": of_words(decoders.WordPiece(), ["red", "fox", "##es", ",", "'s", "."], "[SEP]"),
    "ends of words": of_words(decoders.BPEDecoder(), ["red</w>", "fox", "es</w>"], "<|a|>"),
    "no decoder": of_words(None, ["red", "fox"], "<|a|>"),
}


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def streamed(tokenizer, prompt, ids, stop=()):
    """The pieces of a stream, which a last call ends."""
    stream = TextStream(tokenizer, prompt, stop)
    pieces = [stream.push(token) for token in ids] + [stream.push(last=True)]
    assert "".join(pieces) == stream.text
    return pieces, stream


def whole(tokenizer, prompt, ids):
    """At once, as `generate` has it."""
    stream = TextStream(tokenizer, prompt)
    stream.push(*ids, last=True)
    return stream.text


@pytest.mark.parametrize("prompt_length", [0, 1, 9])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_stream_is_what_the_tokenizer_decodes(kind, prompt_length):
    tokenizer, rng = TOKENIZERS[kind], random.Random(prompt_length)
    specials = sorted(tokenizer.added_tokens_decoder)
    for _ in range(20):
        if kind == "byte fallback":  # only whole characters: of others see below
            text = "".join(
                rng.choice([" hello", " world", " ", "a", "é", "สว", "😀", "😀😀", "\ufffd"]) for _ in range(30)
            )
            ids = encode(tokenizer, text)
            for _ in range(3):
                ids.insert(rng.randrange(len(ids)), rng.choice(specials))
            cut = min(prompt_length, next(i for i in range(len(ids)) if ids[i] not in range(1, 257)))
        else:
            ids, cut = [rng.randrange(len(tokenizer)) for _ in range(40)], prompt_length
        if kind == "bytes":
            ids[:cut] = encode(tokenizer, "a prompt of bytes"[:cut])
        decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        expected = decode(ids)[len(decode(ids[:cut])) :]
        assert whole(tokenizer, ids[:cut], ids[cut:]) == expected
        pieces, stream = streamed(tokenizer, ids[:cut], ids[cut:])
        assert stream.text == expected
        shown = ""
        for n, piece in enumerate(pieces[:-1], start=cut + 1):  # nothing that is certain waits
            shown += piece
            sure = decode(ids[:n])[len(decode(ids[:cut])) :].rstrip("\ufffd")
            assert shown.startswith(sure)


def byte_ids(*values):
    """Of byte_fallback: `<unk>` comes first."""
    return [1 + value for value in values]


HELLO, WORLD, A = 258, 259, 355
SMILE = tuple("😀".encode())


@pytest.mark.parametrize(
    ("prompt", "ids", "pieces"),
    [
        # After whole characters of the prompt, and cut within one: the letters before stay.
        ([HELLO, *byte_ids(*SMILE)], byte_ids(*SMILE), ["", "", "", "😀", ""]),
        ([HELLO], byte_ids(*"éé".encode())[:3], ["", "é", "", "\ufffd"]),
        ([HELLO], byte_ids(*SMILE[:3]), ["", "", "", "\ufffd" * 3]),
        # Bytes that are no character, each for itself; the characters beside them stay.
        ([HELLO], byte_ids(*SMILE, 0xFF, *SMILE, 0x80), ["", "", "", "😀", "\ufffd", "", "", "", "😀", "\ufffd", ""]),
        ([HELLO], byte_ids(*SMILE[:2], 0x41), ["", "", "\ufffd\ufffdA", ""]),
        ([HELLO], [*byte_ids(*SMILE[:2]), WORLD], ["", "", "\ufffd\ufffd world", ""]),
        ([HELLO], [WORLD, *byte_ids(0xFF), WORLD, WORLD], [" world", "\ufffd", " world", " world", ""]),
        # A special token is not in the way of a character.
        ([HELLO], [*byte_ids(*SMILE[:2]), A, *byte_ids(*SMILE[2:])], ["", "", "", "", "😀", ""]),
        # The prompt's last bytes begin a character, or not.
        ([HELLO, *byte_ids(*SMILE[:3])], byte_ids(*SMILE[3:]), ["😀", ""]),
        ([HELLO, *byte_ids(*SMILE[:3])], [WORLD, *byte_ids(0xFF)], [" world", "\ufffd", ""]),
        ([HELLO, *byte_ids(*SMILE[:3])], byte_ids(0xFF), ["\ufffd", ""]),
        # The first word keeps its space after a prompt that ends in more special tokens than are decoded along.
        ([HELLO, *[A] * 9], [WORLD, WORLD], [" world", " world", ""]),
        ([A] * 9, [WORLD, WORLD], ["world", " world", ""]),
    ],
)
def test_byte_fallback(prompt, ids, pieces):
    tokenizer = TOKENIZERS["byte fallback"]
    assert tokenizer.convert_ids_to_tokens([HELLO, WORLD, A]) == ["▁hello", "▁world", "<|a|>"]
    assert streamed(tokenizer, prompt, ids)[0] == pieces
    assert whole(tokenizer, prompt, ids) == "".join(pieces)


def test_a_character_begun_by_the_prompts_bytes():
    """In a vocabulary of bytes; what is no character there is the prompt's, not the continuation's."""
    tokenizer = TOKENIZERS["bytes"]
    ids = encode(tokenizer, "x😀y")
    assert streamed(tokenizer, ids[:3], ids[3:])[0] == ["", "😀", "y", ""]
    assert streamed(tokenizer, ids[:3], ids[5:])[0] == ["y", ""]
    assert streamed(tokenizer, encode(tokenizer, "x\ufffd"), ids[5:])[0] == ["y", ""]


def test_names_of_bytes_in_a_vocabulary_that_means_none():
    tokenizer = of_words(None, [f"<0x{byte:02X}>" for byte in range(256)])
    assert streamed(tokenizer, [], [1 + 0x41, 1 + 0x42])[0] == ["<0x41>", " <0x42>", ""]


@pytest.mark.parametrize(
    ("kind", "token", "shown"),
    [
        ("bytes", "ÿ", 1),
        ("byte fallback", "<0xFF>", 1),
        ("byte fallback", "<|a|>", 0),
        ("bytes", "<|a|>", 0),
        ("bytes", "x", 1),
    ],
)
def test_the_work_grows_with_the_tokens(kind, token, shown, monkeypatch):
    tokenizer, asked = TOKENIZERS[kind], []
    decode = tokenizer.decode
    stream = TextStream(tokenizer, encode(tokenizer, "hello"), stop=["never"])
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: asked.append(len(ids)) or decode(ids, **options))
    pieces = [stream.push(tokenizer.convert_tokens_to_ids(token)) for _ in range(300)]
    assert sum(asked) <= 300 * 13
    assert len("".join(pieces)) >= shown * 299  # and is shown as it comes


END = "<|end|>"


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [
        (END, f"Sure.{END}more", "Sure."),
        (f"{END}\n", f"Sure.{END}more{END}\nmore", "Sure.more"),
        (f"\n{END}", f"a\nb{END}c\n{END}d", "a\nbc"),
        (f"{END}ab", f"x{END}ac{END}ab", "xac"),
        (f"{END}<|a|>", f"a{END}b<|a|>{END}c{END}<|a|>d", "abc"),
        ("end", f"a{END}bend", "ab"),  # not within a name
        ("<|en", f"a{END}b<|en", "ab"),
        ("ab", f"a{END}b", ""),  # special tokens that no stop string names are not in the way
        ("é" + END, f"é<|a|>{END}", ""),
    ],
)
def test_stop_strings_name_special_tokens(stop, text, shown):
    tokenizer = in_bytes("<|a|>", END)
    pieces, stream = streamed(tokenizer, encode(tokenizer, "x"), encode(tokenizer, text), [stop, "never"])
    assert (stream.stopped, stream.text, "".join(pieces)) == (True, shown, shown)


def test_stop_strings_that_do_not_come():
    tokenizer = in_bytes("<|a|>", END)
    pieces, stream = streamed(tokenizer, [], encode(tokenizer, f"a{END}b\n<|a|>"), [f"{END}\n", f"\n{END}"])
    assert pieces == ["a", "", "b", "", "", "\n"] and not stream.stopped
    # A name that is spelled in letters, and one that is a part of another.
    letters = [token for letter in f"a{END}" for token in encode(tokenizer, letter)]
    assert streamed(tokenizer, [], letters, [END])[1].text == "a"
    nested = in_bytes("<x>", "<<x>>")
    ids = [encode(nested, "a")[0], *nested.convert_tokens_to_ids(["<x>", "<<x>>"])]
    assert streamed(nested, [], [*ids[:2], ids[0], ids[2], ids[0]], ["<<x>>"])[1].text == "aa"


def test_a_stop_string_loses_nothing_before_it():
    tokenizer = in_bytes(END)
    ids = [encode(tokenizer, "é")[0], *encode(tokenizer, END)]
    assert streamed(tokenizer, [], ids, [END])[1].text == "\ufffd"


def test_a_special_token_stops_a_row():
    tokenizer, model = byte_tokenizer(), make_model()
    model.generation_config.eos_token_id = None
    free = GuidedDecoder(model, tokenizer).generate("a", max_new_tokens=12, temperature=0.0).tokens[0]
    name = tokenizer.convert_ids_to_tokens(free[5])
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [name]})
    result = GuidedDecoder(model, tokenizer).generate("a", max_new_tokens=12, temperature=0.0, stop=name)
    assert result.finish_reasons == ["stop"]
    assert result.tokens[0] == free[: free.index(free[5]) + 1]
    assert result.texts[0] == tokenizer.decode(result.tokens[0][:-1])


def with_template(tokenizer, template):
    names = {name: tokenizer.convert_tokens_to_ids(name) for name in template.split() if name != "$A"}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(names.items())
    )
    return tokenizer


def plain(bos="<s>", eos="</s>"):
    return in_bytes("<s>", "</s>", "[SEP]", bos_token=bos, eos_token=eos)


BOS, EOS, SEP = plain().convert_tokens_to_ids(["<s>", "</s>", "[SEP]"])
B = encode(plain(), "b")[0]


@pytest.mark.parametrize(
    ("template", "text", "ids"),
    [
        ("$A", "b", [B]),
        ("<s> $A", "b", [BOS, B]),
        ("<s> <s> $A", "b", [BOS, B]),
        ("<s> $A </s>", "b", [BOS, B]),
        ("$A </s> </s>", "b", [B]),
        ("<s> $A </s>", "b</s>", [BOS, B, EOS]),  # what the text spells stays
        ("<s> $A </s>", "<s>b", [BOS, B]),
        ("<s> $A", "<s>b", [BOS, B]),
        ("$A", "<s><s>b", [BOS, BOS, B]),
        ("<s> $A </s>", "", [BOS]),
        ("$A </s>", "", []),
        ("$A", "", []),
        ("<s> $A [SEP]", "b", [BOS, B, SEP]),  # only EOS says that a text has ended
    ],
)
def test_a_prompt_begins_once_and_has_not_ended(template, text, ids):
    assert encode_prompt(with_template(plain(), template), text, special=True) == ids


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
def test_what_a_chat_template_made_is_left_as_it_is(template):
    tokenizer = with_template(plain(), template)
    assert encode_prompt(tokenizer, "<s>b</s>", special=False) == [BOS, B, EOS]


def test_one_token_for_both_begins_a_prompt():
    tokenizers = [with_template(plain("<s>", "<s>"), template) for template in ("$A", "<s> $A", "<s> $A <s>", "$A <s>")]
    assert [encode_prompt(one, "b", special=True) for one in tokenizers] == [[B], [BOS, B], [BOS, B], [B]]
    assert [encode_prompt(one, "b<s>", special=True)[-2:] for one in tokenizers] == [[B, BOS]] * 4
    assert [encode_prompt(one, "", special=True) for one in tokenizers] == [[], [BOS], [BOS], [BOS]]


def test_add_eos_token_of_transformers():
    core = plain().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", add_bos_token=True, add_eos_token=True
    )
    assert tokenizer("b")["input_ids"] == [BOS, B, EOS]
    assert encode_prompt(tokenizer, "b", special=True) == [BOS, B]


def test_a_decoder_continues_a_prompt_that_has_not_ended():
    model, appending = make_model(), with_template(byte_tokenizer(), "<s> $A </s>")
    adding = with_template(byte_tokenizer(), "<s> $A")
    one, other = (GuidedDecoder(model, tokenizer, {"a": make_model(seed=1)}) for tokenizer in (appending, adding))
    options = {"max_new_tokens": 6, "temperature": 0.0}
    assert one.generate(["hi", ""], **options).tokens == other.generate(["hi", ""], **options).tokens
    with pytest.raises(GenarmError, match=r"prompt 1: has no tokens: .* no BOS"):
        GuidedDecoder(model, byte_tokenizer()).generate(["hi", ""])


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


def test_a_base_or_its_tokenizer_in_name_only(tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(POINTER)
    with pytest.raises(GenarmError, match=r"^base: .*tokenizer.json' is a Git LFS pointer"):
        GuidedDecoder.from_pretrained(tmp_path, device="cpu")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Nope"}}')
    with pytest.raises(GenarmError, match=r"^base: no tokenizer can be loaded"):
        GuidedDecoder.from_pretrained(tmp_path, device="cpu")


def test_folders_without_a_tokenizer(tmp_path, caplog):
    """transformers makes up a tokenizer of four names for Gemma."""
    make_model("gemma2", vocab_size=258).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(GenarmError, match=r"^base: no tokenizer lies in '.*model': .*--tokenizer DIR"):
        GuidedDecoder.from_pretrained(tmp_path / "model", device="cpu")
    with pytest.raises(GenarmError, match=r"^tokenizer: no such folder"):
        GuidedDecoder.from_pretrained(tmp_path / "model", tokenizer=tmp_path / "nowhere", device="cpu")
    assert not caplog.records
    arms = {"a": tmp_path / "model"}
    decoder = GuidedDecoder.from_pretrained(
        tmp_path / "model", arms, tokenizer=str(tmp_path / "tokenizer"), device="cpu"
    )
    assert decoder.vocab_size == 258
    (warning,) = caplog.messages
    assert warning.startswith("ARM 'a': no tokenizer lies in") and warning.endswith("are taken to be the base's")
    caplog.clear()
    folder = str(tmp_path / "tokenizer")
    GuidedDecoder.from_pretrained(
        tmp_path / "model", arms, tokenizer=folder, arm_tokenizers={"a": folder}, device="cpu"
    )
    assert not caplog.records
    # As made up.
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    with pytest.raises(GenarmError, match=r"^base: its tokenizer has \d tokens, the model 258"):
        GuidedDecoder.from_pretrained(tmp_path / "model", device="cpu")
    with pytest.raises(GenarmError, match=r"^ARM 'a': its tokenizer has \d tokens, the model 258"):
        GuidedDecoder.from_pretrained(make_model(), arms, tokenizer=folder, device="cpu")


@pytest.mark.parametrize(
    ("ours", "theirs", "accepted"),
    [
        ("<|reserved_special_token_2|>", "<|finetune_right_pad_id|>", True),
        ("<|python_tag|>", "<|reserved_special_token_5|>", True),
        ("<unused5>", "<|tool|>", True),
        ("<pad>", "[PAD]", True),
        ("<|tool|>", "<pad>", True),
        ("<|im_start|>", "<|im_end|>", False),
        ("<|vision_pad|>", "<|tool|>", False),
        ("reserved", "<|tool|>", False),
        ("<eos>", "<pad>", False),  # an EOS to one, padding to the other
        ("<eos>", "<|reserved_special_token_0|>", False),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_reserved_tokens_may_have_other_names(ours, theirs, accepted, swapped, caplog):
    if swapped:
        ours, theirs = theirs, ours
    own, other = (in_bytes(name, **({"eos_token": name} if name == "<eos>" else {})) for name in (ours, theirs))
    model = make_model(vocab_size=257)
    create = partial(GuidedDecoder, model, own, {"base": model}, arm_tokenizers={"base": other})
    if accepted:
        assert create().vocab_size == 257
        assert f"256 is {theirs!r}, not {ours!r}" in caplog.text
    else:
        with pytest.raises(GenarmError, match="ARM 'base': its tokenizer differs from the base's: token 256 is"):
            create()


def test_reserved_names_of_ordinary_tokens_are_no_excuse():
    own, other = of_words(None, ["red", "<unused1>", "fox"]), of_words(None, ["red", "hare", "fox"])
    model = make_model(vocab_size=4)
    with pytest.raises(GenarmError, match="token 2 is 'hare', not '<unused1>'"):
        GuidedDecoder(model, own, {"a": model}, arm_tokenizers={"a": other})


def test_an_eos_that_is_never_drawn_is_named(caplog):
    small, large = byte_tokenizer(), byte_tokenizer("<|im_end|>")
    base = make_model(vocab_size=259)
    base.generation_config.eos_token_id = [1, 258]
    assert GuidedDecoder(base, large)._eos == {1, 258} and not caplog.records
    decoder = GuidedDecoder(base, large, {"a": make_model(seed=1)}, arm_tokenizers={"a": small})
    assert decoder._eos == {1}
    (warning,) = caplog.messages
    assert warning.startswith("EOS 258 ('<|im_end|>') lies outside the models' shared vocabulary, 258 tokens")


@pytest.mark.parametrize("where", ["generation_config", "config", "nowhere"])
def test_eos_is_that_of_transformers_generate(where, tmp_path):
    model = make_model(eos_token_id=None if where == "nowhere" else 7)
    if where == "generation_config":
        model.generation_config.eos_token_id = [5, 6]
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    if where == "config":
        (tmp_path / "generation_config.json").unlink()
    decoder = GuidedDecoder.from_pretrained(tmp_path, device="cpu")
    assert decoder._eos == {"generation_config": {5, 6}, "config": {7}, "nowhere": set()}[where]


@pytest.mark.parametrize(
    ("prompt", "stop", "text"),
    [
        ([1], (), " red red fox"),
        ([], (), "red red fox"),
        ([1], ("fox",), " red red "),
        ([1], ("d f",), " red re"),
        ([1], ("red",), " "),
        ([1], (" ",), ""),
        ([1], ("foxes",), " red red fox"),
    ],
)
def test_pieces_are_the_text(prompt, stop, text):
    """Also where the tokenizer drops the space that a text begins with, and where a stop string cuts the text."""
    core = Tokenizer(models.WordLevel({"▁red": 0, "▁fox": 1, "?": 2}, "?"))
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    decoded = Decoded(tokenizer, prompt, stop, ended=False)
    pieces = decoded.pieces([0, 0, 1])
    assert len(pieces) == 3 and "".join(pieces) == text
    if text == " red red fox" and not stop:
        assert pieces == [" red", " red", " fox"]
    ended = decoded._replace(ended=True).pieces([0, 0, 1, 2])
    assert len(ended) == 4 and "".join(ended) == text
