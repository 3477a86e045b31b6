"""What models make of lengths, padding and positions: whatever it is, a prompt gets the tokens of a loop that has no
cache and no batch, on the fastest path that gives them.
"""

import logging
import math

import pytest
import torch
from torch import nn

import oracle
from genarm import GenarmError, GuidedDecoder
from genarm.decoding import checks, provision
from genarm.decoding import scheduler as batching
from genarm.decoding.forwards import StaticForward, StaticModels
from genarm.models import transformers_api
from test_batching import adapter, endless, late
from test_decoder import SMALL, byte_tokenizer, forward_of, make_model

pytestmark = pytest.mark.versions
__all__ = ["late"]  # a fixture
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24,
    "short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
ENCODER_DECODER = {
    "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "encoder_layers": 2,
}  # fmt: skip
HYBRID = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 2}  # fmt: skip
MODELS = {
    "phi3": {**HYBRID, "sliding_window": None, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 24},
    "llama": {**HYBRID, "max_position_embeddings": 24, "rope_parameters": DYNAMIC},
    "bart": ENCODER_DECODER,
    "marian": {**ENCODER_DECODER, "decoder_vocab_size": 258, "decoder_start_token_id": 0},
    "mamba": SMALL["mamba"],
    "mamba2": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16,
               "n_groups": 2, "chunk_size": 8},
    "minimax": {**HYBRID, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2,
                "num_experts_per_tok": 1, "block_size": 8},
    "lfm2": {**HYBRID, "layer_types": ["conv", "full_attention"]},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 256},
    "llama4_text": {**HYBRID, "head_dim": 16, "attention_chunk_size": 8, "num_local_experts": 2,
                    "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0]},
}  # fmt: skip
# Of 3, 24 and 41 tokens: one crosses 24 while it grows, one has crossed it before.
PROMPTS = ["abc", "a prompt of 24 tokens ..", "one that is longer than all the thresholds"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def model_of(kind, seed=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SMALL, kind, MODELS[kind])
        return endless(make_model(kind, seed))


def uncached(decoder, models, ids, weights, steps):
    """Greedy, so that nothing but the logits decides."""
    forwards = [forward_of(model) for model in models]
    return oracle.decode(forwards, ids, weights, steps, vocab_size=decoder.vocab_size, eos=(), temperature=0.0)


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_are_those_of_a_loop_without_cache_or_batch(tokenizer, kind):
    """Batched and alone, base and ARM of the kind."""
    models = [model_of(kind), model_of(kind, seed=1)]
    decoder = GuidedDecoder(models[0], tokenizer, {"a": models[1]})
    options = {"weights": {"a": 0.7}, "max_new_tokens": 20, "temperature": 0.0}
    together = decoder.generate(PROMPTS, **options).tokens
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        fresh = [model_of(kind), model_of(kind, seed=1)]  # dynamic frequencies depend on what came before
        assert tokens == uncached(decoder, fresh, [ids] * 2, [0.7], 20)
        assert decoder.generate(prompt, **options).tokens == [tokens]


@pytest.mark.parametrize(
    ("kind", "path", "how"),
    [
        ("phi3", "static", None),
        ("llama", "static", None),
        ("mamba", "plain", "a batch at a time"),
        ("lfm2", "plain", "a batch at a time"),
        ("bart", "plain", "one prompt at a time and without CUDA"),
        ("rwkv", "plain", "without a cache"),
    ],
)
def test_the_path_is_the_fastest_that_is_right_and_is_told(tokenizer, kind, path, how, caplog):
    decoder = GuidedDecoder(model_of(kind), tokenizer, {"a": make_model(seed=1)})
    with caplog.at_level(logging.WARNING, "genarm"):
        decoder.generate("abc", max_new_tokens=2)
    base, arm = decoder.paths
    assert (base.model, base.path, base.why is None) == ("the base", path, how is None)
    assert (arm.model, arm.path, arm.why) == ("ARM 'a'", path, None)
    assert not (base.shared or arm.shared or base.compiled or base.captured)
    if how is None:
        assert caplog.text == ""
        decoder.require_fast_path()
    else:
        assert caplog.text.count("plain loop") == 1
        assert how in caplog.text and transformers_api.versions() in caplog.text and base.why in caplog.text
        with pytest.raises(GenarmError, match="not the fast path") as raised:
            decoder.require_fast_path()
        assert base.why in str(raised.value)


def test_paths_tell_what_is_shared(tokenizer):
    base = make_model()
    decoder = GuidedDecoder(base, tokenizer, {"a": adapter(base, 1), "b": make_model(seed=1)})
    assert [one.shared for one in decoder.paths] == [False, True, False]


def test_operands_cross_a_threshold_on_their_own(tokenizer):
    """The ARM's prompt is longer than the base's, in one pass with it and apart."""
    base = model_of("phi3")
    arm = adapter(base, 1)
    for share in (True, False):
        decoder = GuidedDecoder(base, tokenizer, {"a": arm}, share_weights=share)
        assert decoder.paths[1].shared == share
        result = decoder.generate(
            PROMPTS[:2], arm_prompts={"a": PROMPTS[1:]}, weights={"a": 1.0}, max_new_tokens=24, temperature=0.0
        )
        for b, tokens in enumerate(result.tokens):
            ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[b : b + 2]]
            assert tokens == uncached(decoder, [base, arm], ids, [1.0], 24)


def test_a_threshold_is_crossed_while_the_host_is_behind(tokenizer, request):
    """Tokens on their way are read before a row begins again: none is lost and none comes twice."""
    decoder = GuidedDecoder(model_of("phi3"), tokenizer, {"a": model_of("phi3", seed=1)})
    options = {"max_new_tokens": [22, 30, 9], "temperature": 0.9, "seed": 5, "batch_size": 2}
    at_once = decoder.generate(PROMPTS, **options)
    in_flight = request.getfixturevalue("late")
    assert decoder.generate(PROMPTS, **options).tokens == at_once.tokens
    assert max(in_flight) == 5
    assert [len(tokens) for tokens in at_once.tokens] == [22, 30, 9]


def test_a_row_begins_again_once_and_not_at_every_token(tokenizer, monkeypatch):
    again, original = [], batching.Run._again
    monkeypatch.setattr(batching.Run, "_again", lambda self, slot: again.append(slot) or original(self, slot))
    GuidedDecoder(model_of("phi3"), tokenizer).generate(PROMPTS, max_new_tokens=40)
    assert len(again) == 2  # of 3 prompts one is beyond the threshold from the start


@pytest.mark.parametrize("fault", ["padding", "sliding window", "rope", "threshold"])
def test_the_check_at_loading_is_sharp_enough(monkeypatch, fault):
    """Faults that a check of a few short rows would pass over."""
    model = model_of("phi3") if fault in ("rope", "threshold") else make_model("mistral", sliding_window=8)
    assert not isinstance(checks.static_models(model), str)
    if fault == "padding":
        monkeypatch.setattr("genarm.decoding.forwards._left_padded", lambda rows: unmasked(rows))
    elif fault == "sliding window":
        monkeypatch.setattr(transformers_api, "sliding_windows", lambda model: [9] * 2)
    elif fault == "rope":
        monkeypatch.setattr(transformers_api, "embed_positions_by_row", lambda model: None)
    else:
        monkeypatch.setattr(transformers_api, "rope", lambda model: transformers_api.Rope(frozenset(), math.inf))
    assert checks.static_models(model) == "its logits differ with static caches"


def unmasked(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    places = torch.arange(width) - torch.tensor([[width - len(row)] for row in rows])
    return ids, torch.ones_like(ids, dtype=torch.bool), places.clamp_min(0)


def test_thresholds_are_tried_as_far_as_they_can_be_afforded(monkeypatch):
    model = make_model("gemma2", sliding_window=48)
    assert checks._lengths([model]) == [8, 48]
    monkeypatch.setattr(checks, "_AFFORDABLE_ELSEWHERE", 47 * sum(x.numel() for x in model.parameters()))
    assert checks._lengths([model]) == [8]


class Strange(nn.Module):
    """A model that is a Llama but for what it raises when it is given a cache."""

    def __init__(self, error):
        super().__init__()
        self.inner, self.error = make_model(), error
        self.config, self.generation_config = self.inner.config, self.inner.generation_config
        self.device, self.dtype = self.inner.device, self.inner.dtype

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=True):
        if past_key_values is not None:
            raise self.error
        return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)


def test_an_error_of_the_models_is_its_reason_and_one_of_ours_speaks(monkeypatch):
    strange = Strange(AttributeError("no layer 7"))
    assert checks.static_models(strange) == "static caches fail in it: AttributeError: no layer 7"
    with pytest.raises(KeyboardInterrupt):
        checks.static_models(Strange(KeyboardInterrupt()))

    monkeypatch.setattr(StaticForward, "_by_operand", None)
    with pytest.raises(TypeError, match="not callable"):
        checks.static_models(make_model())


def test_a_model_that_refuses_its_own_cache_is_decoded_without_one(tokenizer, caplog):
    strange = endless(Strange(TypeError("never")))
    decoder = GuidedDecoder(strange, tokenizer)
    tokens = decoder.generate(PROMPTS[:2], max_new_tokens=6, temperature=0.0).tokens
    for prompt, own in zip(PROMPTS, tokens, strict=False):
        assert own == uncached(decoder, [strange], [tokenizer(prompt)["input_ids"]], [], 6)
    assert "static caches fail in it: TypeError: never" in caplog.text and "without a cache" in caplog.text


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_the_cache_is_found_by_any_of_its_names(name):
    """A release of transformers, or a model of the user's own, may use either."""
    inner = make_model()

    class Renamed(nn.Module):
        def forward(self, input_ids, **arguments):
            raise NotImplementedError

    model = Renamed()
    exec(f"def forward(self, input_ids, {name}=None, use_cache=True): ...", namespace := {})
    Renamed.forward = namespace["forward"]
    assert transformers_api.cache_argument(model) == name
    assert transformers_api.cache_of({"logits": 1, name: inner}) is inner
    assert transformers_api.cache_of({"logits": 1, name: None}) is None


def test_the_base_is_as_it_was_after_the_checks(tokenizer):
    """Its attention, its rotary embedding and its frequencies."""
    model = model_of("phi3")
    rope, before = model.model.rotary_emb, model(torch.arange(1, 30)[None]).logits
    attention = model.config._attn_implementation
    GuidedDecoder(model, tokenizer).generate(PROMPTS, max_new_tokens=9)
    assert model.model.rotary_emb is rope and model.config._attn_implementation == attention
    assert torch.equal(model(torch.arange(1, 30)[None]).logits, before)


def test_static_models_of_one_base_do_not_share_frequencies():
    """They run on streams of their own, and one that is at its long factors must not change the other's."""
    model = model_of("phi3")
    first, second = StaticModels(model, []), StaticModels(model, [])
    ropes = [one.model.rotary_emb.rope for models in (first, second) for one in (models.prefill, models.step)]
    assert len({one.inv_freq.data_ptr() for one in (*ropes, model.model.rotary_emb)}) == 5


def test_provision_names_the_slowest_way(tokenizer, caplog):
    decoder = GuidedDecoder(model_of("mamba"), tokenizer, {"a": model_of("bart", seed=1)})
    assert [one.plain for one in decoder._provider.passes] == [
        provision.PlainKind.MASKED_PROMPTS, provision.PlainKind.ALONE,
    ]  # fmt: skip
    assert "one prompt at a time" in caplog.text
