"""GuidedDecoder on small models of several architectures, against an independent loop."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import oracle
from genarm import GenarmError, GuidedDecoder, Request, bundled, world
from genarm.text import TextStream
from genarm_kernels import row_seed

PROMPTS = ["a", "How do I sleep better?", "Tell me about bread, please, and be quick.", "ok then", "é" * 9]


def byte_tokenizer(*extra, chat_template=None):
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *extra]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=chat_template)


SMALL = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "qwen3": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 16},
    "mistral": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "sliding_window": 16},
    "gemma2": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "opt": {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}  # fmt: skip


def make_model(kind="llama", seed=0, vocab_size=258, **changes):
    """A random model whose logits depend on the whole context, and are spread so that float noise decides nothing."""
    torch.manual_seed(seed)
    sizes = {"max_position_embeddings": 256, **SMALL[kind], **changes}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, vocab_size=vocab_size, **{**ids, **sizes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.5 if "embed" in name or "wte" in name else 0.3)
    return model


@pytest.mark.parametrize("kind", SMALL)
def test_the_models_see_their_context(kind):
    """What the tests below rest on: the first of ten tokens changes the last one's logits by more than noise."""
    first, other = (make_model(kind)(torch.tensor([[start, *range(20, 29)]])).logits[0, -1] for start in (5, 6))
    assert (first - other).abs().max() > 0.05


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def decoder(tokenizer):
    return GuidedDecoder(make_model(), tokenizer, {"a": make_model(seed=1), "b": make_model(seed=2)})


CHATS = [[{"role": "user", "content": prompt}] for prompt in world.sample_prompts(12, seed=3)]


@pytest.fixture(scope="module")
def trained():
    """The bundled models, which write text that ends."""
    return GuidedDecoder.from_pretrained(bundled.path("base"), {name: bundled.path(name) for name in world.ATTRIBUTES})


def forward_of(model):
    @torch.no_grad()
    def forward(ids):
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].numpy()

    return forward


def expected(decoder, models_, prompt_ids, weights, steps, **options):
    return oracle.decode(
        [forward_of(model) for model in models_], prompt_ids, weights, steps,
        vocab_size=decoder.vocab_size, eos=(1,), **options,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [24, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param({"temperature": 0.0}, marks=pytest.mark.versions),
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    ],
)
def test_equals_a_loop_without_cache_or_batch(tokenizer, kind, sampling, tokens):
    """5 ragged prompts; the sampled ones with a seed of their own each."""
    models_ = [make_model(kind), make_model(seed=1), make_model(kind, seed=2)]
    decoder = GuidedDecoder(models_[0], tokenizer, {"a": models_[1], "b": models_[2]})
    result = decoder.generate(PROMPTS, weights={"a": 0.7, "b": -0.4}, max_new_tokens=tokens, seed=11, **sampling)
    for b, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        assert result.tokens[b] == expected(
            decoder, models_, [ids] * 3, [0.7, -0.4], tokens, seed=row_seed(11, b), **sampling
        )


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_p": 0.95, "min_p": 0.01}])
@pytest.mark.versions
def test_trained_models_equal_the_loop(trained, sampling):
    result = trained.generate(messages=CHATS[:5], weights={"helpful": 1.0, "polite": 0.5}, seed=4, **sampling)
    forwards = [AutoModelForCausalLM.from_pretrained(bundled.path(name)) for name in bundled.NAMES]
    for b, chat in enumerate(CHATS[:5]):
        ids = trained.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        eos = (trained.tokenizer.eos_token_id,)
        assert result.finish_reasons[b] == "eos"
        assert result.tokens[b] == oracle.decode(
            [forward_of(model) for model in forwards], [ids] * 3, [1.0, 0.5], 128,
            vocab_size=trained.vocab_size, eos=eos, seed=row_seed(4, b), **sampling,
        )  # fmt: skip


def test_per_prompt_parameters_equal_separate_calls(decoder):
    each = {
        "weights": [{"a": 1.5}, {"b": -0.5, "a": 0.0}, {"a": 2.0, "b": 2.0}, {}, {"b": 1.0}],
        "max_new_tokens": [3, 30, 12, 20, 1],
        "temperature": [0.0, 0.7, 1.0, 1.4, 0.9],
        "top_k": [0, 5, 0, 40, 3],
        "top_p": [1.0, 0.9, 0.5, 1.0, 0.8],
        "min_p": [0.0, 0.1, 0.0, 0.02, 0.0],
        "seed": [5, 5, 2**63 - 1, -4, 0],
    }
    together = decoder.generate(PROMPTS, **each)
    for b, prompt in enumerate(PROMPTS):
        alone = decoder.generate(prompt, **{name: values[b] for name, values in each.items()})
        assert together.tokens[b] == alone.tokens[0]
        assert together.texts[b] == alone.texts[0]
        np.testing.assert_allclose(together.logprobs[b], alone.logprobs[0], atol=1e-4)
    by_column = {"a": [1.5, 0.0, 2.0, 0.0, 0.0], "b": [0.0, -0.5, 2.0, 0.0, 1.0]}
    assert decoder.generate(PROMPTS, **{**each, "weights": by_column}).tokens == together.tokens


def test_rewards_and_logprobs_are_the_models_own(decoder, tokenizer):
    prompt = PROMPTS[1]
    result = decoder.generate(prompt, weights={"a": 0.5}, max_new_tokens=12, temperature=0.7, seed=3)
    ids = tokenizer(prompt)["input_ids"] + result.tokens[0]
    n = len(result.tokens[0])
    logits = [
        model(torch.tensor([ids])).logits[0, -n - 1 : -1].double() for model in map(make_model, ["llama"] * 3, range(3))
    ]
    drawn = torch.tensor(result.tokens[0])[:, None]

    def picked(x):
        return x.log_softmax(-1).gather(1, drawn)[:, 0].detach().numpy()

    np.testing.assert_allclose(result.base_logprobs[0], picked(logits[0]), atol=1e-4)
    np.testing.assert_allclose(result.rewards["a"][0], picked(logits[1]), atol=1e-4)
    np.testing.assert_allclose(result.rewards["b"][0], picked(logits[2]), atol=1e-4)  # weight 0 still reports
    np.testing.assert_allclose(result.logprobs[0], picked((logits[0] + 0.5 * logits[1]) / 0.7), atol=1e-4)


def test_arm_prompts_share_only_the_continuation(decoder, tokenizer):
    own = ["Judge this. " + prompt for prompt in PROMPTS]
    result = decoder.generate(PROMPTS, arm_prompts={"b": own}, weights={"a": 0.0, "b": 1.0}, max_new_tokens=16, seed=2)
    models_ = [make_model(), make_model(seed=1), make_model(seed=2)]
    for b in range(len(PROMPTS)):
        ids = [tokenizer(text)["input_ids"] for text in (PROMPTS[b], PROMPTS[b], own[b])]
        assert result.tokens[b] == expected(decoder, models_, ids, [0.0, 1.0], 16, seed=row_seed(2, b))


def test_eos_ends_a_row_and_not_its_neighbours(trained):
    eos = trained.tokenizer.eos_token_id
    longest = max(map(len, trained.generate(messages=CHATS, seed=1).tokens))
    result = trained.generate(messages=CHATS, max_new_tokens=longest - 1, seed=1)
    assert {"eos", "length"} == set(result.finish_reasons)
    for text, tokens, reason in zip(result.texts, result.tokens, result.finish_reasons, strict=True):
        assert (tokens[-1] == eos) == (reason == "eos")
        assert eos not in tokens[:-1]
        assert trained.tokenizer.eos_token not in text
        assert reason == "eos" or len(tokens) == longest - 1
    # The end of a text may begin a stop string, until EOS shows that it does not.
    events = list(trained.stream(messages=CHATS[0], seed=1, stop=[". never"]))
    assert events[-1].finish_reason == "eos"
    assert "".join(event.text for event in events).endswith(".")


@pytest.mark.versions
def test_several_eos_ids_of_the_generation_config(tokenizer):
    model = make_model()
    plain = GuidedDecoder(model, tokenizer).generate("a", max_new_tokens=20, temperature=0.0)
    model.generation_config.eos_token_id = [1, plain.tokens[0][4]]
    result = GuidedDecoder(model, tokenizer).generate("a", max_new_tokens=20, temperature=0.0)
    first = plain.tokens[0].index(plain.tokens[0][4])
    assert result.tokens[0] == plain.tokens[0][: first + 1]
    assert result.finish_reasons == ["eos"]


def test_stop_strings_span_tokens(trained):
    whole = trained.generate(messages=CHATS, max_new_tokens=40, seed=7)
    stops = [text[n : n + 5] for n, text in enumerate(whole.texts, start=20)]
    result = trained.generate(messages=CHATS, max_new_tokens=40, seed=7, stop=stops)
    for b, text in enumerate(whole.texts):
        cut = min(text.find(stop) for stop in stops if stop in text)
        assert result.texts[b] == text[:cut]
        assert result.finish_reasons[b] == "stop"
        n = len(result.tokens[b])
        assert result.tokens[b] == whole.tokens[b][:n]
        shorter = trained.tokenizer.decode(whole.tokens[b][: n - 1], skip_special_tokens=True)
        assert not any(stop in shorter for stop in stops)  # ended at the first token that could end it


def test_text_stream_joins_bytes_and_holds_back_possible_stops():
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer, tokenizer("x")["input_ids"], stop=["END", "Nie"])
    shown = [stream.push(token) for token in tokenizer("aéE€ENxNEND..")["input_ids"]]
    assert shown == ["a", "", "é", "", "", "", "E€", "", "", "ENx", "", "N", "", "", "", ""]
    assert "".join(shown) == "aéE€ENxN" == stream.text
    assert stream.stopped
    stream = TextStream(tokenizer, [], stop=["END"])
    shown = [stream.push(token) for token in tokenizer("aEN")["input_ids"]]
    assert shown == ["a", "", ""]
    assert stream.push(last=True) == "EN"


def test_stream_gives_what_generate_gives(decoder):
    options = {
        "weights": {"a": 0.5, "b": 0.5},
        "max_new_tokens": 25,
        "temperature": 0.8,
        "seed": 9,
        "stop": ["q", "é!"],
    }
    result = decoder.generate(PROMPTS[2], **options)
    events = list(decoder.stream(PROMPTS[2], **options))
    assert [event.token for event in events] == result.tokens[0]
    assert "".join(event.text for event in events) == result.texts[0]
    assert [event.rewards["b"] for event in events] == pytest.approx(result.rewards["b"][0], abs=1e-4)
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + result.finish_reasons


def test_weights_changed_while_streaming(decoder, tokenizer):
    ids = tokenizer(PROMPTS[1])["input_ids"]
    models_ = [make_model(), make_model(seed=1), make_model(seed=2)]
    stream = decoder.stream(PROMPTS[1], weights={"a": 2.0, "b": 1.0}, max_new_tokens=12, temperature=0.0)
    tokens = [next(stream).token for _ in range(6)]
    stream.set_weights({"a": -2.0})  # b keeps its weight
    tokens += [event.token for event in stream]
    first = expected(decoder, models_, [ids] * 3, [2.0, 1.0], 6, temperature=0.0)
    rest = expected(decoder, models_, [ids + first] * 3, [-2.0, 1.0], 6, temperature=0.0)
    assert tokens == first + rest
    with pytest.raises(GenarmError, match="'c'"):
        stream.set_weights({"c": 1.0})


def test_operands_of_different_width(tokenizer):
    """Padding columns of either model are never drawn, however likely."""
    base, arm = make_model(vocab_size=300), make_model(seed=1, vocab_size=280)
    with torch.no_grad():
        base.lm_head.weight[258:] *= 100
    decoder = GuidedDecoder(base, tokenizer, {"a": arm})
    assert decoder.vocab_size == 258
    result = decoder.generate(PROMPTS, max_new_tokens=20)
    assert max(map(max, result.tokens)) < 258


@pytest.mark.versions
def test_tokenizers_that_differ_are_named(tokenizer):
    swapped = byte_tokenizer()
    vocab = swapped.get_vocab()
    ids = sorted(vocab, key=vocab.get)
    ids[70], ids[71] = ids[71], ids[70]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(ids)}, merges=[]))
    other = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    with pytest.raises(GenarmError, match=r"ARM 'a'.*token 70 is"):
        GuidedDecoder(make_model(), tokenizer, {"a": make_model()}, arm_tokenizers={"a": other})
    wider = byte_tokenizer("<more>")  # as released ARMs have it: one token more
    assert GuidedDecoder(make_model(), tokenizer, {"a": make_model()}, arm_tokenizers={"a": wider}).vocab_size == 258


@pytest.mark.versions
def test_messages_need_a_template_and_equal_its_text(decoder):
    chat = [{"role": "user", "content": "hi"}]
    with pytest.raises(GenarmError, match="no chat template"):
        decoder.generate(messages=chat)
    template = (
        "<s>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    chatting = GuidedDecoder(make_model(), byte_tokenizer(chat_template=template), {"a": make_model(seed=1)})
    one = chatting.generate(messages=chat, max_new_tokens=10)
    assert one.tokens == chatting.generate("<s>[user]hi>", max_new_tokens=10).tokens
    assert chatting.generate(messages=[chat, chat], max_new_tokens=10, seed=[0, 0]).tokens == one.tokens * 2


@pytest.mark.versions
def test_adapter_folder_shares_the_base_and_equals_a_merged_copy(tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    trained = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    trained.save_pretrained(tmp_path / "arm")
    decoder = GuidedDecoder.from_pretrained(tmp_path / "base", {"a": tmp_path / "arm"}, device="cpu")
    result = decoder.generate(PROMPTS, weights={"a": 1.0}, max_new_tokens=12, seed=1)
    merged = GuidedDecoder(make_model(), tokenizer, {"a": trained.merge_and_unload()})
    assert result.tokens == merged.generate(PROMPTS, weights={"a": 1.0}, max_new_tokens=12, seed=1).tokens
    unguided = GuidedDecoder(make_model(), tokenizer).generate(PROMPTS, max_new_tokens=12, seed=1)
    assert unguided.tokens == decoder.generate(PROMPTS, weights={"a": 0.0}, max_new_tokens=12, seed=1).tokens
    assert result.tokens != unguided.tokens
    base, arm = decoder._base.model, decoder._arms["a"].model
    assert (
        arm.get_base_model().get_input_embeddings().weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()
    )


def test_finished_rows_do_not_run_off_a_position_table(tokenizer):
    decoder = GuidedDecoder(make_model("gpt2", max_position_embeddings=128), tokenizer)
    result = decoder.generate(["x" * 120, "x"], max_new_tokens=[8, 100], seed=4)
    assert [len(tokens) for tokens in result.tokens] == [8, 100]


def test_requests_stand_for_arguments(decoder):
    """One object per prompt, in `generate`, `generate_each`, `check` and `stream`; also with an ARM's own prompt."""
    own = {
        "max_new_tokens": [5, 6],
        "temperature": [0.7, 0.0],
        "top_k": [0, 5],
        "top_p": [0.9, 1.0],
        "min_p": [0.0, 0.1],
    }
    weights, seeds = [{"a": 1.0}, {"a": -0.5, "b": 2.0}], [3, 9]
    arm_prompts = {"b": ["another", "prompt"]}
    expected = decoder.generate(PROMPTS[:2], weights=weights, seed=seeds, stop="e", arm_prompts=arm_prompts, **own)
    requests = [
        Request(
            prompt=PROMPTS[b],
            weights=weights[b],
            seed=seeds[b],
            stop=("e",),
            arm_prompts={"b": arm_prompts["b"][b]},
            **{name: values[b] for name, values in own.items()},
        )
        for b in range(2)
    ]
    assert decoder.generate(requests) == expected
    each = dict(decoder.generate_each(requests, batch_size=1))
    assert [each[b].tokens[0] for b in range(2)] == expected.tokens
    assert [event.token for event in decoder.stream(requests[1])] == expected.tokens[1]
    assert decoder.generate(requests[1]).tokens == expected.tokens[1:]
    defaults = decoder.generate(PROMPTS[0], max_new_tokens=4)
    assert decoder.generate(Request(prompt=PROMPTS[0], max_new_tokens=4)) == defaults
    assert ["".join(pieces) for pieces in expected.pieces] == expected.texts
    json.dumps(dataclasses.asdict(expected))  # plain data
    assert pickle.loads(pickle.dumps(expected)).pieces == expected.pieces


def test_events_are_those_of_a_stream(decoder, tokenizer):
    """Also where text is held back, as the beginning of a stop string, until EOS comes."""
    prompt, options = PROMPTS[1], {"weights": {"a": 0.5}, "max_new_tokens": 40, "temperature": 1.5}
    whole = decoder.generate([prompt] * 8, seed=list(range(8)), **options)
    for b in range(8):
        text = whole.texts[b]
        for stop in ((), (text[-1:] + "never",), (text[5:7],)):
            stop = tuple(filter(None, stop))
            result = decoder.generate(prompt, seed=b, stop=stop, **options)
            assert list(result.events(0)) == list(decoder.stream(prompt, seed=b, stop=stop, **options))


@pytest.mark.parametrize(
    ("requests", "arguments", "match"),
    [
        ([Request(prompt="x"), "x"], {}, "prompt 1: expected a Request"),
        ([Request(prompt="x")], {"top_p": 0.5}, "top_p: expected as a field of each Request"),
        ([Request(prompt="x")], {"weights": {"a": 1.0}}, "weights: expected as a field"),
        ([Request(prompt="x")], {"arm_prompts": {"a": ["x"]}}, "arm_prompts: expected as a field"),
        ([Request(prompt="x"), Request(prompt="x", top_p=2.0)], {}, "prompt 1: top_p: expected a number from 0 to 1"),
        ([Request(prompt="x", weights={"c": 1.0})], {}, "prompt 0: weights: no ARM is called 'c'"),
        ([Request(prompt="x", weights=1.0)], {}, "prompt 0: weights: expected a mapping"),
        ([Request(prompt="x", stop="e")], {}, "prompt 0: stop: expected a sequence"),
        ([Request(prompt="x", arm_prompts=None)], {}, "prompt 0: arm_prompts: expected a mapping"),
        ([Request(prompt="x")], {"seed": [1]}, "seed: expected as a field"),
        ([], {"stop": [""]}, "stop: expected a sequence"),
        ([], {"weights": {"c": 1.0}}, "weights: no ARM is called 'c'"),
        ("x", {"arm_prompts": {"c": None}}, "arm_prompts: no ARM is called 'c'"),
    ],
)
def test_bad_requests(decoder, requests, arguments, match):
    for call in (decoder.generate, decoder.check):
        with pytest.raises(GenarmError, match=match):
            call(requests, **arguments)


BAD = {
    "unknown ARM": ({"weights": {"c": 1.0}}, "no ARM is called 'c'"),
    "weight no number": ({"weights": {"a": "much"}}, r"weights\['a'\]"),
    "weight nan": ({"weights": {"a": float("nan")}}, r"weights\['a'\]"),
    "weights of other length": ({"weights": {"a": [1.0, 2.0]}}, "expected a number or 1"),
    "too long": ({"prompts": ["a", "x" * 300]}, "prompt 1: 300 tokens"),
    "no room": ({"prompts": "ab", "max_new_tokens": 256}, "more than the 256 positions of the base"),
    "no new token": ({"max_new_tokens": 0}, "max_new_tokens"),
    "temperature": ({"temperature": -1.0}, "temperature"),
    "top_p": ({"top_p": 1.5}, "top_p"),
    "min_p": ({"min_p": -0.1}, "min_p"),
    "top_k": ({"top_k": 1.5}, "top_k"),
    "seed": ({"seed": "x"}, "seed"),
    "stop": ({"stop": [""]}, "stop"),
    "empty prompt": ({"prompts": ""}, "no tokens"),
    "huge weight": ({"weights": {"a": 10**400}}, r"weights\['a'\]"),
    "beyond float32": ({"temperature": 1e39}, "temperature"),
    "weights no mapping": ({"weights": 1.0}, "expected a mapping"),
    "weights of numbers": ({"weights": [1.0]}, "expected a mapping"),
    "seed beyond 64 bits": ({"seed": 2**64}, "seed"),
    "prompt no text": ({"prompts": ["a", 1]}, "prompt 1: expected a str"),
    "prompts bytes": ({"prompts": b"a"}, "prompts: expected"),
    "stop no text": ({"stop": 5}, "stop"),
    "both": ({"messages": [{"role": "user", "content": "x"}]}, "either prompts or messages"),
    "arm_prompts name": ({"arm_prompts": {"c": ["x"]}}, "'c'"),
    "arm_prompts length": ({"arm_prompts": {"a": ["x", "y"]}}, "expected 1 prompts"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_say_what_is_wrong(decoder, case):
    request, message = BAD[case]
    for refuses in (decoder.generate, decoder.check):
        with pytest.raises(GenarmError, match=message):
            refuses(**{"prompts": "a", **request})


def test_the_last_position_can_be_filled(decoder):
    assert len(decoder.generate("x" * 256, max_new_tokens=1).tokens[0]) == 1


def test_one_seed_makes_one_a_prompt_and_many_are_taken_as_they_are(decoder):
    options = {"max_new_tokens": 8, "temperature": 2.0}
    same = decoder.generate(["a"] * 3, seed=[5, 5, 5], **options).tokens
    assert same[0] == same[1] == same[2]
    up = decoder.generate(["a"] * 3, seed=np.int64(5), **options).tokens
    assert up == decoder.generate(["a"] * 3, seed=[row_seed(5, b) for b in range(3)], **options).tokens
    assert up[0] != up[1]
    huge = {"seed": 2**64 - 1, "top_k": [10**30, 10**30]}
    assert (
        decoder.generate(["a"] * 2, **huge, **options).tokens == decoder.generate(["a"] * 2, seed=-1, **options).tokens
    )


def test_tokens_that_a_model_lacks(tokenizer):
    narrow = GuidedDecoder(make_model(), tokenizer, {"a": make_model(seed=1, vocab_size=60)})
    with pytest.raises(GenarmError, match=r"prompt 1: its token \d+ lies outside the 60 tokens of ARM 'a'"):
        narrow.generate(["!", "é"])
    late_eos = make_model()
    late_eos.generation_config.eos_token_id = 200
    with pytest.raises(GenarmError, match=r"EOS \[200\]"):
        GuidedDecoder(late_eos, tokenizer, {"a": make_model(seed=1, vocab_size=60)})


def test_weights_change_all_or_none(decoder):
    stream = decoder.stream("a", weights={"a": 1.0, "b": 1.0}, max_new_tokens=4)
    with pytest.raises(GenarmError, match="'c'"):
        stream.set_weights({"a": 9.0, "c": 1.0})
    unchanged = decoder.generate("a", weights={"a": 1.0, "b": 1.0}, max_new_tokens=4).tokens[0]
    assert [event.token for event in stream] == unchanged


@pytest.mark.versions
def test_a_template_that_refuses(tokenizer):
    refusing = byte_tokenizer(chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(GenarmError, match="prompt 0: the chat template rejects the messages: no system role"):
        GuidedDecoder(make_model(), refusing).generate(messages=[{"role": "system", "content": "x"}])


def test_backends_are_checked_at_once(tokenizer, tmp_path):
    with pytest.raises(GenarmError, match="'nope'"):
        GuidedDecoder(make_model(), tokenizer, backend="nope")
    with pytest.raises(GenarmError, match="'cuda' cannot run"):  # before the missing folder is
        GuidedDecoder.from_pretrained(tmp_path / "missing", device="cpu", backend="cuda")


@pytest.mark.versions
def test_adapters_that_do_not_fit(tokenizer, tmp_path):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for layers in (1, 3):
        lora = LoraConfig(r=2, target_modules=["q_proj"])
        get_peft_model(make_model(num_hidden_layers=layers), lora).save_pretrained(tmp_path / "lora")
        with pytest.raises(GenarmError, match="does not fit the base"):
            GuidedDecoder.from_pretrained(tmp_path / "base", {"a": tmp_path / "lora"}, device="cpu")
    tuned = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(GenarmError, match="PROMPT_TUNING"):
        GuidedDecoder.from_pretrained(tmp_path / "base", {"a": tmp_path / "tuned"}, device="cpu")


def test_text_around_a_special_token_in_the_middle():
    """A tokenizer that writes spaces by the neighbours: the window must not begin at what decodes to nothing."""
    words = {"▁Hello": 0, "▁world": 1, "<tool>": 2, "!": 3, "<unk>": 4}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=["<tool>"])
    stream = TextStream(tokenizer, [], stop=["world wo"])
    shown = [stream.push(token) for token in (0, 1, 2, 1, 3)]
    assert tokenizer.decode([0, 1, 2, 1, 3], skip_special_tokens=True) == "Hello world world!"
    assert "".join(shown) == "Hello "
    assert stream.stopped


def test_nan_logits_are_reported_not_decoded(tokenizer):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[40] = float("nan")
    with pytest.raises(GenarmError, match="NaN"):
        GuidedDecoder(model, tokenizer).generate("a")


@pytest.mark.versions
def test_loading_errors(tokenizer, tmp_path):
    for missing in (tmp_path / "missing", str(tmp_path / "missing"), "my model", "-x", "a..b", "foo bar/baz"):
        with pytest.raises(GenarmError, match="no such folder"):
            GuidedDecoder.from_pretrained(missing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GenarmError, match="no causal language model"):
        GuidedDecoder.from_pretrained(tmp_path / "empty")
    config = AutoConfig.for_model("llama", vocab_size=258, **SMALL["llama"])
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "classifier")
    with pytest.raises(GenarmError, match="LlamaForSequenceClassification"):
        GuidedDecoder.from_pretrained(tmp_path / "classifier")
    make_model().save_pretrained(tmp_path / "base")
    with pytest.raises(GenarmError, match="no tokenizer"):
        GuidedDecoder.from_pretrained(tmp_path / "base")
    for content, said in (
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"no", "cannot be loaded"),
    ):
        (tmp_path / "base" / "model.safetensors").write_bytes(content)
        with pytest.raises(GenarmError, match=said):
            GuidedDecoder.from_pretrained(tmp_path / "base")
    with pytest.raises(GenarmError, match="device"):
        GuidedDecoder.from_pretrained(tmp_path / "base", device="warp")
    for dtype in ("float12", "float64", torch.float64):
        with pytest.raises(GenarmError, match="dtype"):
            GuidedDecoder.from_pretrained(tmp_path / "base", dtype=dtype)
    with pytest.raises(GenarmError, match="tokenizer"):
        GuidedDecoder.from_pretrained(make_model())


@pytest.mark.versions
def test_mixed_precision_operands(tokenizer):
    decoder = GuidedDecoder(make_model(), tokenizer, {"a": make_model(seed=1).bfloat16()})
    assert len(decoder.generate("a", max_new_tokens=5).tokens[0]) == 5


@pytest.mark.gpu
def test_a_gpu_gives_the_tokens_of_the_cpu():
    """In float32, sampled, for the bundled models; products differ in their last bits, so that a draw may too."""
    assert torch.cuda.is_available(), "needs an NVIDIA GPU"
    arms = {name: bundled.path(name) for name in ("helpful", "polite")}
    questions = [[{"role": "user", "content": question}] for question in ("How do I sleep better?", "How do I bake?")]
    results = [
        GuidedDecoder.from_pretrained(bundled.path("base"), arms=arms, device=device, dtype="float32").generate(
            messages=questions, weights={"helpful": 1.0, "polite": 0.5}, max_new_tokens=64, top_p=0.9, seed=3
        )
        for device in ("cpu", "cuda")
    ]
    assert results[0].texts == results[1].texts
    for name in arms:
        for mine, other in zip(*(result.rewards[name] for result in results), strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-3)
