"""The CPU core's linear layers and whole steps in decoding: which models get them, and that no token shows it."""

import copy

import pytest
import torch

from genarm import GenarmError, GuidedDecoder, bundled, world
from genarm.decoding import fused, linears
from genarm_kernels import available_backends
from genarm_kernels.backends import cpu
from genarm_kernels.layers import quantize_int8
from test_batching import adapter
from test_decoder import PROMPTS, byte_tokenizer, make_model

pytestmark = [
    pytest.mark.versions,
    pytest.mark.skipif("cpu" not in available_backends(), reason=f"no CPU core: {cpu.why_unavailable()}"),
]
BIASED = {"attention_bias": True, "mlp_bias": True}
FUSED = {
    "llama": lambda: make_model("llama", num_attention_heads=4, num_key_value_heads=2, head_dim=16, **BIASED),
    "tied": lambda: make_model("llama", tie_word_embeddings=True),
    "mistral": lambda: make_model("mistral", sliding_window=8),
    "qwen2": lambda: qwen2(),
    "qwen3": lambda: make_model("qwen3"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def qwen2():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(make_model.__globals__["SMALL"], "qwen2", {**sizes, "num_key_value_heads": 1})
        return make_model("qwen2")


def kinds(decoder):
    return [path.linear for path in decoder.paths]


@pytest.mark.parametrize("name", FUSED)
@torch.inference_mode()
def test_fused_steps_draw_the_tokens_of_the_models_own_layers(tokenizer, name):
    """Long prompts too, which are padded and go through torch's products, and rows that begin as others end."""
    base, arm = FUSED[name](), make_model(seed=1)
    for model in (base, arm):
        for parameter in model.parameters():
            if parameter.dim() == 1 and parameter.abs().sum() == 0:  # biases begin as zeros
                parameter.normal_(std=0.3)
    prompts = [*PROMPTS, "long " * 30]
    options = {"max_new_tokens": [30, 12, 25, 7, 40, 20], "temperature": 0.8, "top_p": 0.9, "seed": 3, "batch_size": 2}
    results = {}
    for linear, expected in (("torch", "torch"), ("auto", "fused")):
        decoder = GuidedDecoder(base, tokenizer, {"a": arm}, linear=linear)
        assert kinds(decoder) == [expected] * 2
        results[linear] = decoder.generate(prompts, weights={"a": 0.7}, **options)
    assert results["auto"].tokens == results["torch"].tokens
    for one, other in zip(results["auto"].logprobs, results["torch"].logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("kind", ["gemma2", "opt"])
def test_other_models_get_the_cores_linear_layers(tokenizer, kind):
    base = make_model(kind)
    own, core = (GuidedDecoder(base, tokenizer, linear=linear) for linear in ("torch", "auto"))
    assert (kinds(own), kinds(core)) == (["torch"], ["core"])
    options = {"max_new_tokens": 20, "seed": 3, "batch_size": 3}
    assert own.generate(PROMPTS, **options).tokens == core.generate(PROMPTS, **options).tokens


@torch.inference_mode()
def test_bfloat16_is_more_exact_than_torchs_own(tokenizer):
    """Log-probabilities against a model in float64 with the same rounded weights. What the core rounds are the caches
    alone; torch rounds after every layer.
    """
    model = make_model("llama", hidden_size=64, intermediate_size=176, num_hidden_layers=4).bfloat16()
    exact = copy.deepcopy(model).double()
    errors = {}
    for linear in ("auto", "torch"):
        decoder = GuidedDecoder(model, tokenizer, linear=linear)
        assert kinds(decoder) == ["fused" if linear == "auto" else "torch"]
        result = decoder.generate(PROMPTS, max_new_tokens=24, seed=2)
        found = []
        for prompt, tokens, logprobs in zip(PROMPTS, result.tokens, result.logprobs, strict=True):
            ids = tokenizer(prompt)["input_ids"]
            logits = exact(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            found.append((logits.gather(1, torch.tensor(tokens)[:, None])[:, 0] - torch.tensor(logprobs)).abs())
        errors[linear] = float(torch.cat(found).mean())
    assert errors["auto"] < errors["torch"] / 2  # 0.019 and 0.067 were seen


def test_a_model_that_somebody_watches_or_changes_is_not_fused(tokenizer):
    model, seen = make_model(), []
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append("mlp"))
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: seen.append("q"))
    decoder = GuidedDecoder(model, tokenizer)
    assert kinds(decoder) == ["core"]
    seen.clear()
    decoder.generate("a", max_new_tokens=5)
    assert seen == ["q", "mlp"] * 5
    changed = make_model()
    changed.model.layers[0].mlp.forward = lambda x: 0 * x
    assert kinds(GuidedDecoder(changed, tokenizer)) == ["core"]


def test_a_description_that_gives_other_logits_is_not_used(tokenizer, monkeypatch):
    describe = fused.describe

    def wrong(*args):
        decoder = describe(*args)
        return decoder._replace(attention_scale=decoder.attention_scale * 1.2)

    monkeypatch.setattr(fused, "describe", wrong)
    assert kinds(GuidedDecoder(make_model(), tokenizer)) == ["core"]
    monkeypatch.setattr(linears.SharedLinear, "forward", lambda self, x: 1.1 * self.linear(x))
    assert kinds(GuidedDecoder(make_model(), tokenizer)) == ["torch"]


def test_a_model_that_is_converted_is_planned_anew(tokenizer):
    model = make_model()
    decoder = GuidedDecoder(model, tokenizer)
    before = decoder.generate("abc", max_new_tokens=12, temperature=0.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)  # in place: seen without more ado
    turned = decoder.generate("abc", max_new_tokens=12, temperature=0.0)
    assert turned.tokens != before.tokens
    model.double().float()  # other memory
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert decoder.generate("abc", max_new_tokens=12, temperature=0.0).tokens == before.tokens


def test_norms_that_are_written_to_are_seen(tokenizer):
    """Which the core has in float32, so that a bfloat16 model's are copies."""
    model = make_model().bfloat16()
    decoder = GuidedDecoder(model, tokenizer)
    before = decoder.generate("abc", max_new_tokens=12, temperature=0.0)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.mul_(-3)
    after = decoder.generate("abc", max_new_tokens=12, temperature=0.0)
    assert after.tokens != before.tokens
    assert after.tokens == GuidedDecoder(model, tokenizer).generate("abc", max_new_tokens=12, temperature=0.0).tokens


def test_linear_names_what_it_takes(tokenizer):
    with pytest.raises(GenarmError, match="linear: expected 'auto' or 'torch', got 'fast'"):
        GuidedDecoder(make_model(), tokenizer, linear="fast")


# --- int8 -------------------------------------------------------------------------------------------------------------


def rounded(model):
    """The model with the weights that int8 stands for."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            int8, scales = quantize_int8(module.weight)
            module.weight = torch.nn.Parameter(int8 * scales[:, None])
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_int8_decodes_what_its_weights_stand_for(tokenizer, kind):
    base, arm = make_model(kind), make_model(seed=1)
    before = {name: x.clone() for name, x in base.state_dict().items()}
    decoder = GuidedDecoder(base, tokenizer, {"a": arm}, quantize="int8")
    options = {"max_new_tokens": 20, "seed": 5, "temperature": 0.8}
    expected = GuidedDecoder(rounded(base), tokenizer, {"a": rounded(arm)}, linear="torch").generate(PROMPTS, **options)
    assert decoder.generate(PROMPTS, **options).tokens == expected.tokens
    assert kinds(decoder) == ["fused" if kind == "llama" else "core", "fused"]
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items())


def test_int8_is_shared_with_adapters(tokenizer):
    base = make_model()
    decoder = GuidedDecoder(base, tokenizer, {"a": adapter(base, 1)}, quantize="int8")
    assert [path.shared for path in decoder.paths] == [False, True]
    own = GuidedDecoder(base, tokenizer, {"a": adapter(base, 1)}, quantize="int8", share_weights=False)
    options = {"max_new_tokens": 20, "seed": 5, "temperature": 0.8}
    assert decoder.generate(PROMPTS, **options).tokens == own.generate(PROMPTS, **options).tokens


def test_int8_layers_of_one_weight_keep_their_own_biases():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
            self.b.weight = self.a.weight

    model, x = Two(), torch.randn(2, 4)
    twin = linears.quantized(model, {})
    for name in ("a", "b"):
        assert torch.allclose(getattr(twin, name)(x), getattr(model, name)(x), atol=0.05)
    # Models such as Mamba ask a layer's weights for their dtype, and give x in it.
    assert torch.equal(twin.a(x.to(twin.a.weight.dtype)), twin.a(x))


def test_int8_names_what_it_cannot_do(tokenizer):
    with pytest.raises(GenarmError, match="quantize: expected None or 'int8', got 'int4'"):
        GuidedDecoder(make_model(), tokenizer, quantize="int4")
    with pytest.raises(GenarmError, match="quantize: 'int8' is for CPUs, got a model on 'meta'"):
        GuidedDecoder(make_model().to("meta"), tokenizer, quantize="int8")


def test_int8_keeps_the_bundled_models_quality():
    """Perplexity on the small world's own answers within 1 %, and the true reward of guided answers."""
    decoders = {
        quantize: GuidedDecoder.from_pretrained(
            bundled.path("base"), {"helpful": bundled.path("helpful")}, quantize=quantize
        )
        for quantize in (None, "int8")
    }
    chats = [[{"role": "user", "content": text}] for text in world.sample_prompts(48, seed=1)]
    rewards, surprise = {}, {}
    answers = decoders[None].generate(messages=chats, seed=1, max_new_tokens=64)
    for quantize, decoder in decoders.items():
        result = decoder.generate(messages=chats, weights={"helpful": 1.0}, seed=2, max_new_tokens=64)
        rewards[quantize] = sum(world.true_rewards(result.texts)["helpful"]) / len(chats)
        model = decoder._base.model
        total = count = 0.0
        for chat, tokens in zip(chats, answers.tokens, strict=True):
            ids = decoder.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            total -= float(logits.gather(1, torch.tensor(tokens)[:, None]).sum())
            count += len(tokens)
        surprise[quantize] = total / count
    assert abs(surprise["int8"] - surprise[None]) < 0.01
    assert rewards["int8"] > rewards[None] - 0.05 and rewards[None] > 0.8
