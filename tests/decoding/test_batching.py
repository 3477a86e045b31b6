"""Rows retired and admitted, weights shared, memory short, the host behind the device: a prompt's tokens stay."""

import logging

import pytest
import torch

from genarm import GenarmError, GuidedDecoder, bundled, world
from genarm.decoding import linears, lora, provision
from genarm.decoding import scheduler as batching
from genarm.decoding.engine import Begin, Drawn, Engine
from genarm.decoding.forwards import StaticForward
from genarm.decoding.request import Request
from genarm.models import loading
from genarm_kernels.backends import available_backends, interpreted, triton
from test_decoder import SMALL, byte_tokenizer, make_model

INTERPRETER = "triton" in available_backends() and interpreted("triton")
PROMPTS = ["abcdefgh"[: 1 + i % 7] * (1 + i % 5) for i in range(21)]
LIMITS = [1 + (5 * i) % 17 for i in range(21)]
SAMPLING = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 3}]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def endless(model):
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def decoder(tokenizer):
    return GuidedDecoder(
        endless(make_model("qwen3")), tokenizer, {"a": make_model(seed=1), "b": make_model("gpt2", seed=2)}
    )


def decode(decoder, **options):
    arguments = {"weights": {"a": 0.7}, "max_new_tokens": LIMITS, **options}
    return decoder.generate(PROMPTS, **arguments)


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batch_size_and_admission_change_no_token(decoder, sampling, batch_size):
    together = decode(decoder, **sampling)
    apart = decode(decoder, batch_size=batch_size, **sampling)
    assert (apart.tokens, apart.texts, apart.finish_reasons) == (
        together.tokens, together.texts, together.finish_reasons,
    )  # fmt: skip
    assert [len(tokens) for tokens in apart.tokens] == LIMITS
    for mine, other in zip(apart.logprobs, together.logprobs, strict=True):
        assert mine == pytest.approx(other, abs=1e-4)


def test_a_slot_is_never_idle_while_prompts_wait(decoder, monkeypatch):
    """Every step covers as many rows as are left; the rows of all steps and prefills together are the tokens drawn."""
    sizes = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, n, covered: sizes.append(n) or step(self, n, covered))
    decode(decoder, batch_size=4)
    assert sum(sizes) + len(PROMPTS) == sum(LIMITS)
    assert max(sizes) == 4


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.versions
def test_which_models_have_static_caches(tokenizer, kind, caplog):
    decoder = GuidedDecoder(make_model(kind), tokenizer)
    with caplog.at_level(logging.WARNING, "genarm"):
        for _ in range(2):
            decoder.generate("a", max_new_tokens=2)
    plain = kind in ("bloom", "mamba")
    assert caplog.text.count("plain loop") == plain  # said once
    assert ("the base: its forward takes no" in caplog.text) == plain


@pytest.mark.versions
def test_eager_attention_and_half_precision_are_kept(tokenizer):
    for kind, dtype in (("llama", torch.bfloat16), ("gemma2", torch.float16), ("gpt2", torch.bfloat16)):
        model = make_model(kind).to(dtype)
        model.set_attn_implementation("eager")
        decoder = GuidedDecoder(model, tokenizer)
        result = decoder.generate(["abc", "a"], max_new_tokens=9, temperature=0.0)
        assert decoder._provider._kept.refill
        assert model.config._attn_implementation == "eager"
        ids = torch.tensor([tokenizer("abc")["input_ids"] + result.tokens[0]])
        expected = model(ids).logits[0, 2:-1].float().log_softmax(-1)
        drawn = expected.gather(1, torch.tensor(result.tokens[0])[:, None])[:, 0]
        assert result.logprobs[0] == pytest.approx(drawn.tolist(), abs=0.3)


@pytest.mark.versions
def test_a_model_whose_rows_depend_on_their_batch_runs_in_the_plain_loop(tokenizer, caplog):
    """Dynamic quantisation scales by the largest number of the whole batch."""
    from torch.ao.quantization import quantize_dynamic

    with pytest.warns(DeprecationWarning):
        model = quantize_dynamic(make_model(), {torch.nn.Linear}, torch.qint8)
    decoder = GuidedDecoder(model, tokenizer, {"a": make_model(seed=1)})
    token = model(torch.tensor([tokenizer("hello")["input_ids"]])).logits[0, -1].argmax()
    result = decoder.generate("hello", weights={"a": 0.0}, max_new_tokens=5, temperature=0.0)
    assert "its logits differ with static caches" in caplog.text
    assert model.lm_head.weight().dtype == torch.qint8
    assert result.tokens[0][0] == token


def adapter(base, seed, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options})
    return get_peft_model(loading.twin(base), config)


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.versions
def test_shared_weights_change_no_token(tokenizer, kind, sampling):
    base = make_model(kind)
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} if kind == "gpt2" else {}
    arms = {
        "a": adapter(base, 1, **targets),
        "b": make_model(seed=7),
        "c": adapter(base, 2, r=2, lora_alpha=16, use_rslora=True, **targets),
    }
    options = {
        "weights": {"a": 1.0, "b": 0.5, "c": -0.5},
        "arm_prompts": {"c": ["On the other hand, " + prompt for prompt in PROMPTS]},
        "batch_size": 4,
        **sampling,
    }
    together, apart = (GuidedDecoder(base, tokenizer, arms, share_weights=share) for share in (True, False))
    shared, separate = decode(together, **options), decode(apart, **options)
    assert [len(one.operands) for one in together._provider.passes] == [3, 1]
    assert [len(one.operands) for one in apart._provider.passes] == [1] * 4
    assert shared.tokens == separate.tokens
    for name in arms:
        for mine, other in zip(shared.rewards[name], separate.rewards[name], strict=True):
            assert mine == pytest.approx(other, abs=1e-4)
    unguided = decode(together, **{**options, "weights": {"b": 0.5}})
    assert unguided.tokens != shared.tokens


def assert_the_models_own_numbers(tokenizer, base, arms, result, tolerance):
    numbers = [(base, result.base_logprobs), *((model, result.rewards[name]) for name, model in arms.items())]
    for model, logprobs in numbers:
        for prompt, tokens, mine in zip(PROMPTS, result.tokens, logprobs, strict=False):
            ids = torch.tensor([tokenizer(prompt)["input_ids"] + tokens], device=model.device)
            expected = model(ids).logits[0, -1 - len(tokens) : -1].float().log_softmax(-1).cpu()
            drawn = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert mine == pytest.approx(drawn.tolist(), abs=tolerance)


@pytest.mark.skipif(not INTERPRETER, reason="no interpreter of Triton's: a GPU has a test of its own")
@pytest.mark.versions
def test_layers_in_one_launch_give_the_models_own_numbers(tokenizer, monkeypatch):
    """A GPU's step in 16 bits, which Triton's interpreter runs."""
    base = make_model("qwen3").half()
    arms = {"a": adapter(base, 1), "b": adapter(base, 2, target_modules=["q_proj", "down_proj"])}
    plain, steps = lora._plain, []

    def fits(x, layer):
        steps.append(x.shape[1] == 1)
        return steps[-1]

    monkeypatch.setattr(linears, "can_fuse", lambda weight: True)
    monkeypatch.setattr(triton, "suits_shared_linear", fits)
    monkeypatch.setattr(lora, "_plain", lambda layer: linears.LowRank(*(x.half() for x in plain(layer))))
    decoder = GuidedDecoder(base, tokenizer, arms, linear="torch")
    result = decoder.generate(PROMPTS[:3], weights={"a": 1.0, "b": -0.5}, max_new_tokens=4)
    assert [len(one.operands) for one in decoder._provider.passes] == [3]
    assert any(steps) and not all(steps)
    assert_the_models_own_numbers(tokenizer, base, arms, result, 0.02)


def test_shared_weights_are_read_once(tokenizer):
    base = make_model()
    arms = {"a": adapter(base, 1), "b": adapter(base, 2)}
    decoder = GuidedDecoder(base, tokenizer, arms, linear="torch")
    rows = []
    (one,) = decoder._provider.passes
    models = (one.models.prefill, one.models.step)
    for model in models:
        model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    decoder.generate(["a", "bc"], max_new_tokens=3)
    assert rows == [6, 6, 6]
    assert all(model.lm_head.weight is base.lm_head.weight for model in models)
    (fused,) = GuidedDecoder(base, tokenizer, arms)._provider.passes
    assert fused.models.decoder.head.weight.data_ptr() == base.lm_head.weight.data_ptr()


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}, {"lora_bias": True}],
)
@pytest.mark.versions
def test_adapters_that_are_more_than_low_rank_run_apart(tokenizer, options):
    base = make_model()
    decoder = GuidedDecoder(base, tokenizer, {"a": adapter(base, 1, **options)})
    assert len(decoder.generate("a", max_new_tokens=3).tokens[0]) == 3
    assert [len(one.operands) for one in decoder._provider.passes] == [1, 1]


@pytest.mark.versions
def test_layers_that_see_rows_in_another_shape_run_apart(tokenizer, caplog):
    """OPT flattens rows and tokens before its linear layers: rows of an operand cannot be told from them."""
    base = endless(make_model("opt"))
    arms = {"a": adapter(base, 1, target_modules=["fc1", "fc2"]), "c": adapter(base, 2, target_modules=["q_proj"])}
    for name, passes in (("a", [1, 1]), ("c", [2])):
        decoder = GuidedDecoder(base, tokenizer, {name: arms[name]})
        decode(decoder, weights={name: 1.0})
        assert [len(one.operands) for one in decoder._provider.passes] == passes
    assert caplog.text.count("adapters run apart") == 1


def test_a_joint_pass_that_gives_other_logits_is_not_used(tokenizer, monkeypatch, caplog):
    base = make_model()
    share = lora.share
    monkeypatch.setattr(lora, "share", lambda base, parts, core: share(base, [{} for _ in parts], core))  # forgets them
    decoder = GuidedDecoder(base, tokenizer, {"a": adapter(base, 1)})
    assert [len(one.operands) for one in decoder._provider.passes] == [1, 1]
    assert "its logits differ there" in caplog.text


def test_what_runs_a_joint_pass_keeps_one_copy_of_the_adapters(tokenizer):
    base = make_model()
    arms = {"a": adapter(base, 1)}
    (joint,) = GuidedDecoder(base, tokenizer, arms, linear="torch")._provider.passes
    prefill, step = (
        {x.data_ptr() for x in (*model.parameters(), *model.buffers())}
        for model in (joint.models.prefill, joint.models.step)
    )
    assert prefill == step
    # The CPU core's layers have the very weights of the base, and no copy of the adapters either.
    (joint,) = GuidedDecoder(base, tokenizer, arms)._provider.passes
    own = {x.data_ptr() for x in (*joint.models.prefill.parameters(), *joint.models.prefill.buffers())}
    weights = {x.data_ptr() for x in base.parameters()}
    for described, module in zip(joint.models.decoder.layers, joint.models.prefill.model.layers, strict=True):
        for layer in (described.q, described.down, module.self_attn.q_proj.layer, module.mlp.down_proj.layer):
            assert layer.weight.data_ptr() in weights
            assert {x.data_ptr() for part in layer.parts for x in (part.down, part.up)} <= own


@pytest.mark.versions
def test_local_attention_runs_in_the_plain_loop(tokenizer, caplog):
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SMALL, "gpt_neo", sizes)
        decoder = GuidedDecoder(make_model("gpt_neo"), tokenizer)
    decoder.generate("a", max_new_tokens=2)
    assert "local attention" in caplog.text


def test_an_adapter_of_other_weights_runs_apart(tokenizer):
    base, other = make_model(), make_model(seed=5)
    decoder = GuidedDecoder(base, tokenizer, {"a": adapter(other, 1)})
    assert [len(one.operands) for one in decoder._provider.passes] == [1, 1]


def test_engines_are_kept_and_grow(tokenizer):
    decoder = GuidedDecoder(make_model(), tokenizer)
    expected = decoder.generate("abc", max_new_tokens=9, seed=4).tokens
    first = decoder._provider._kept
    assert decoder.generate("abc", max_new_tokens=9, seed=4).tokens == expected
    assert decoder._provider._kept is first
    streams = [decoder.stream("abc", max_new_tokens=9, seed=4) for _ in range(2)]  # side by side: an engine each
    both = list(zip(*streams, strict=True))
    assert [[event.token for event in events] for events in zip(*both, strict=True)] == expected * 2
    decoder.generate(["abc"] * 3, max_new_tokens=99)
    assert decoder._provider._kept.slots == 3 and decoder._provider._kept.length >= 102
    abandoned = decoder.stream("abc")
    next(abandoned)
    del abandoned
    assert decoder._provider._kept is not None
    assert decoder.generate("abc", max_new_tokens=9, seed=4).tokens == expected


def test_an_engine_that_met_nan_is_not_used_again(tokenizer):
    model = make_model()
    decoder = GuidedDecoder(model, tokenizer)
    expected = decoder.generate(["abc", "a"], max_new_tokens=9).tokens
    weight = model.model.layers[0].self_attn.v_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = float("nan")
    with pytest.raises(GenarmError, match="NaN"):
        decoder.generate(["abc", "a"], max_new_tokens=9)
    with torch.no_grad():
        weight.copy_(kept)
    assert decoder.generate(["abc", "a"], max_new_tokens=9).tokens == expected


def test_generate_each_gives_what_generate_gives(decoder):
    whole = decode(decoder, seed=5)
    each = dict(decoder.generate_each(PROMPTS, weights={"a": 0.7}, max_new_tokens=LIMITS, seed=5, batch_size=3))
    assert sorted(each) == list(range(len(PROMPTS)))
    for b, result in each.items():
        assert (result.tokens, result.texts) == ([whole.tokens[b]], [whole.texts[b]])
        assert result.rewards["a"][0] == pytest.approx(whole.rewards["a"][b], abs=1e-4)
    with pytest.raises(GenarmError, match="batch_size"):
        decoder.generate_each(PROMPTS, batch_size=0)


def test_memory_decides_how_many_prompts_at_once(decoder, monkeypatch):
    expected = decode(decoder).tokens
    length = max(len(prompt) + limit for prompt, limit in zip(PROMPTS, LIMITS, strict=True))
    token = sum(one.bytes_per_token() for one in decoder._provider.passes)
    monkeypatch.setattr(provision, "_free_bytes", lambda device: 4 * length * token)
    decoder._provider._kept = None
    assert decode(decoder).tokens == expected
    kept = decoder._provider._kept
    assert 2 <= kept.slots <= 5
    decode(decoder)
    assert decoder._provider._kept is kept  # though more slots were wanted
    decoder._provider._kept = None
    monkeypatch.setattr(provision, "_free_bytes", lambda device: 16 * token)
    calls = []
    monkeypatch.setattr(Engine, "begin", lambda *args: calls.append(args))
    with pytest.raises(GenarmError, match=r"needs [\d.]+ KiB of KV caches; of the [\d.]+ KiB free on cpu"):
        decode(decoder)
    assert not calls


@pytest.mark.parametrize("where", ["begin", "step"])
def test_out_of_memory_lowers_the_batch(decoder, monkeypatch, caplog, where):
    """A device with memory for 3 rows, which shows when a fourth begins or is decoded."""
    expected = decode(decoder, seed=1)
    original = getattr(Engine, where)
    sizes = []

    def limited(self, rows, other):
        size = rows if where == "step" else len(rows)
        sizes.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, rows, other)

    def begin(self):
        beginning(self)
        assert sum(row is not None for row in self._slots) <= self._usable

    beginning = batching.Run._begin
    monkeypatch.setattr(batching.Run, "_begin", begin)
    monkeypatch.setattr(Engine, where, limited)
    with caplog.at_level(logging.WARNING, "genarm"):
        result = decode(decoder, seed=1, batch_size=8)
    assert "out of memory: decoding at most" in caplog.text
    assert max(sizes) == 8 and sizes[-1] <= 3
    assert result.tokens == expected.tokens
    monkeypatch.setattr(Engine, where, lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(GenarmError, match="one prompt does not fit"):
        decode(decoder)


@pytest.fixture
def late(monkeypatch):
    """The host behind the device, as on a GPU: a step's tokens are there when asked for the third time."""
    asked, in_flight = {}, []

    def ready(self):
        _, times = asked.get(id(self.values), (None, 0))
        asked[id(self.values)] = self.values, times + 1  # with the tensor, lest another get its id
        return times >= 2

    begin = batching.Run.__init__

    def ahead(self, *args):
        begin(self, *args)
        self._ahead = 4

    def step(self):
        original(self)
        in_flight.append(len(self._flights))

    original = batching.Run._step
    monkeypatch.setattr(Drawn, "ready", ready)
    monkeypatch.setattr(batching.Run, "__init__", ahead)
    monkeypatch.setattr(batching.Run, "_step", step)
    return in_flight


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_host_that_is_behind_changes_no_token(decoder, sampling, request):
    options = {"batch_size": 4, "stop": ["q", "?"], **sampling}
    expected = decode(decoder, **options)
    in_flight = request.getfixturevalue("late")
    result = decode(decoder, **options)
    assert max(in_flight) == 5 and sum(in_flight) > 4 * len(in_flight)
    assert (result.tokens, result.texts, result.finish_reasons) == (
        expected.tokens, expected.texts, expected.finish_reasons,
    )  # fmt: skip


def test_what_is_batched_with_what_does_not_depend_on_how_fast_the_host_is(decoder, monkeypatch, request):
    in_flight = request.getfixturevalue("late")
    sizes, step = [], Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, n, covered: sizes.append(n) or step(self, n, covered))
    decode(decoder, batch_size=4)
    behind, sizes[:] = list(sizes), []
    monkeypatch.setattr(Drawn, "ready", lambda self: True)
    decode(decoder, batch_size=4)
    assert sizes == behind and max(in_flight) == 5


def test_rows_end_on_the_device(tokenizer):
    """At the limit and at EOS, without the host: their caches stop growing, whatever steps are queued behind."""
    model = endless(make_model())
    decoder = GuidedDecoder(model, tokenizer)
    prompts = [[5, 6, 7], [8, 9]]
    engine, _ = decoder._provider.take(2, 40, 2)
    parameters = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    for eos in (None, "second"):
        engine.reset(parameters)
        requests = [Request(prompt="", max_new_tokens=4 + b, temperature=0.0) for b in range(2)]
        drawn = [engine.begin([0, 1], [Begin(one, [ids], 0, []) for one, ids in zip(requests, prompts, strict=True)])]
        drawn += [engine.step(2, 32) for _ in range(8)]
        tokens = [integers[0] for integers, _ in (one.read()[1] for one in drawn)]
        assert not engine._live.any()
        ends = [4, 5] if eos is None else [4, 1 + tokens.index(engine._eos[0])]
        lengths = engine._offsets[:, 0] + engine._rows["position"]
        assert lengths.tolist() == [len(ids) + n - 1 for ids, n in zip(prompts, ends, strict=True)]
        engine._eos = torch.tensor([tokens[2]])
    assert ends[1] <= 3


def test_eos_is_seen_late_and_nothing_after_it(request):
    trained = GuidedDecoder.from_pretrained(bundled.path("base"), {"polite": bundled.path("polite")}, device="cpu")
    chats = [[{"role": "user", "content": prompt}] for prompt in world.sample_prompts(9, seed=3)]
    expected = trained.generate(messages=chats, seed=2, batch_size=3)
    request.getfixturevalue("late")
    result = trained.generate(messages=chats, seed=2, batch_size=3)
    assert result.tokens == expected.tokens
    assert set(result.finish_reasons) == {"eos"}


def test_weights_changed_while_the_host_is_behind(decoder, request):
    def steered():
        stream = decoder.stream("How do I", weights={"a": 2.0, "b": 1.0}, max_new_tokens=16, temperature=0.0)
        tokens = []
        for i, event in enumerate(stream):
            tokens.append(event.token)
            if i in (0, 5):
                stream.set_weights({"a": -2.0 if i else 1.0})
        return tokens

    expected = steered()
    in_flight = request.getfixturevalue("late")
    assert steered() == expected
    assert max(in_flight) > 1


def test_memory_is_flat_over_many_prompts(tokenizer):
    """2,000 prompts of random lengths: nothing grows after the first hundred, and no cache is made anew."""
    import gc
    import random
    import resource
    from pathlib import Path

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    chance = random.Random(0)
    prompts = ["x" * chance.randint(1, 60) for _ in range(2000)]
    limits = [chance.randint(1, 16) for _ in prompts]
    decoder = GuidedDecoder(endless(make_model()), tokenizer, {"a": make_model(seed=1)})
    seen = []
    for _, result in decoder.generate_each(prompts, max_new_tokens=limits, seed=0):
        seen.append((len(result.tokens[0]), resident()))
        waiting = len(prompts) - len(seen)
        if waiting % 500 == 0:  # no row that has been given out is held
            assert sum(isinstance(one, batching.Row) for one in gc.get_objects()) <= waiting + 40
    assert sorted(tokens for tokens, _ in seen) == sorted(limits)
    after_100, most = seen[100][1], max(size for _, size in seen[100:])
    assert most - after_100 < 8 * 2**20, (after_100, most)


class ReplayedStep:
    """What a CUDA graph is to the engine: a step with the numbers and sizes that it was captured with."""

    def __init__(self, engine, n, covered):
        self.engine, self.numbers, self.sizes, self.replays = engine, dict(engine._numbers), (n, covered), 0
        self.values = torch.empty(n, 4 + engine._arms, dtype=torch.int32)

    def replay(self):
        self.engine._numbers, kept = self.numbers, self.engine._numbers
        self.values.copy_(self.engine._step(*self.sizes))
        self.engine._numbers = kept
        self.replays += 1


def test_graphs_are_chosen_by_all_that_they_hold(decoder, monkeypatch):
    """On a CPU, with steps that are captured as far as the engine can tell."""
    graphs, begin = [], Engine.__init__

    def capturing(self, *args, **options):
        begin(self, *args, **options)
        self.cuda_graph = True

    def capture(self, n, covered):
        graphs.append(ReplayedStep(self, n, covered))
        return graphs[-1], graphs[-1].values

    settings = [{"temperature": 0.0}, {"top_k": 5, "seed": 1}, {"temperature": [0.5 + i / 20 for i in range(21)]}]
    expected = [decode(decoder, batch_size=4, **one).tokens for one in settings]
    monkeypatch.setattr(Engine, "__init__", capturing)
    monkeypatch.setattr(Engine, "_capture", capture)
    decoder._provider._kept = None
    for one, tokens in zip(settings * 2, expected * 2, strict=True):
        assert decode(decoder, batch_size=4, **one).tokens == tokens
    assert len({id(graph.engine) for graph in graphs}) == 1
    assert len({(graph.sizes, *graph.numbers.items()) for graph in graphs}) == len(graphs)  # none was captured twice
    assert sum(graph.replays for graph in graphs) > 10 * len(graphs)


@pytest.mark.slow
@pytest.mark.versions
def test_compiled_forwards_change_no_token(tokenizer):
    base = make_model("qwen3")
    arms = {"a": adapter(base, 1), "b": make_model(seed=1)}
    options = {"weights": {"a": 1.0, "b": 0.5}, "batch_size": 2, "max_new_tokens": 6}
    plain, compiled = (GuidedDecoder(base, tokenizer, arms, compile=on) for on in (False, True))
    assert compiled.generate(PROMPTS[:4], **options).tokens == plain.generate(PROMPTS[:4], **options).tokens


@pytest.mark.versions
def test_static_forward_rows_do_not_see_each_other(tokenizer):
    """What lies beyond a row's tokens, other rows' or an earlier row's, has no weight: exactly."""
    model = make_model("mistral")
    provider = GuidedDecoder(model, tokenizer)._provider
    (one,) = provider.passes
    with torch.inference_mode():
        logits = []
        for noise in (0.0, 9.0, float("nan")):
            forward = StaticForward(one.models, one.shapes, slots=3, length=32)
            for layer in forward._cache.layers:
                layer.keys.fill_(noise), layer.values.fill_(noise)
            forward.prefill([1], [[[5, 6, 7, 8]]])
            logits.append(forward.step(torch.tensor([[9]] * 3), torch.tensor([[0], [4], [0]]), 16)[1])
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.versions
def test_a_row_that_has_ended_stays_within_what_is_covered_and_the_position_table(tokenizer):
    """What it has reached may lie beyond what the others have left; it is computed with them, and must be finite."""
    for kind in ("gpt2", "gemma2"):
        provider = GuidedDecoder(make_model(kind, max_position_embeddings=40), tokenizer)._provider
        engine, _ = provider.take(2, 64, 2)
        limits, prompts = [Request(prompt="", max_new_tokens=n) for n in (1, 9)], [[5] * 40, [6, 7]]
        engine.begin([0, 1], [Begin(one, [ids], 0, []) for one, ids in zip(limits, prompts, strict=True)])
        assert engine._live.tolist() == [False, True]
        with torch.inference_mode():
            (logits,) = engine._forward(torch.tensor([[9], [9]]), 16)
        assert logits.isfinite().all()
        (forward,) = engine._forwards
        assert all(layer.keys.isfinite().all() for layer in forward._cache.layers)


GPU_SWITCHES = [
    {"streams": bool(streams), "cuda_graph": bool(graph), "compile": bool(compiled)}
    for streams, graph, compiled in ((1, 1, 0), (0, 1, 0), (1, 0, 0), (1, 1, 1))
]


@pytest.fixture(scope="module")
def gpu_models():
    assert torch.cuda.is_available(), "needs an NVIDIA GPU"
    return [model.cuda() for model in (endless(make_model("qwen3")), make_model(seed=1), make_model("gpt2", seed=2))]


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("switches", GPU_SWITCHES, ids=str)
def test_streams_graphs_and_compilation_change_no_token(tokenizer, gpu_models, switches, sampling):
    """Rows retired and admitted on the way, twice, so that graphs are captured and then replayed."""
    base, *arms = gpu_models
    named = dict(zip("ab", arms, strict=True))
    plain = GuidedDecoder(base, tokenizer, named, streams=False, cuda_graph=False)
    expected = decode(plain, **sampling)
    other = GuidedDecoder(base, tokenizer, named, **switches)
    for batch_size in (8, 8, 3):
        assert decode(other, batch_size=batch_size, **sampling).tokens == expected.tokens
    captured = [graph for graph in other._provider._kept._graphs.values() if graph is not None]
    assert bool(captured) == switches["cuda_graph"]


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLING)
def test_shared_weights_on_a_gpu(tokenizer, gpu_models, sampling):
    pytest.importorskip("peft", reason="adapters need PEFT")
    base = gpu_models[0]
    arms = {"a": adapter(base, 1), "c": adapter(base, 2, r=2)}
    together, apart = (GuidedDecoder(base, tokenizer, arms, share_weights=share) for share in (True, False))
    options = {"weights": {"a": 1.0, "c": -0.5}, **sampling}
    assert decode(together, **options).tokens == decode(apart, **options).tokens


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("switches", GPU_SWITCHES, ids=str)
def test_layers_in_one_launch_on_a_gpu(tokenizer, switches, dtype, monkeypatch):
    """In 16 bits a step's layers are Triton launches: up to 5 prompts, 15 rows; beyond, PyTorch's."""
    pytest.importorskip("peft", reason="adapters need PEFT")
    from genarm_kernels.backends.triton import shared_linear as kernel

    base = endless(make_model("qwen3")).to("cuda", dtype)
    arms = {"a": adapter(base, 1), "b": adapter(base, 2, target_modules=["q_proj", "down_proj"])}
    launches, launch = [], kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda y, *rest: launches.append(len(y)) or launch(y, *rest))
    decoder = GuidedDecoder(base, tokenizer, arms, **switches)
    for count in (5, 8, 5):
        result = decoder.generate(PROMPTS[:count], weights={"a": 1.0, "b": -0.5}, max_new_tokens=12)
        assert_the_models_own_numbers(tokenizer, base, arms, result, 0.3)
    assert [len(one.operands) for one in decoder._provider.passes] == [3]
    assert switches["compile"] or (launches and max(launches) <= 16)


@pytest.mark.gpu
@pytest.mark.parametrize("switches", GPU_SWITCHES[:3], ids=str)
def test_no_step_waits_for_the_device(tokenizer, gpu_models, switches):
    """By torch's own watch over synchronisations, and by the profiler's count."""
    from genarm.benchmark.speed import _waits

    base, arm, _ = gpu_models
    decoder = GuidedDecoder(base, tokenizer, {"a": arm}, **switches)

    def run(new):
        return decoder.generate(PROMPTS[:8], max_new_tokens=new, top_p=0.9)

    run(64)
    run(64)
    assert _waits(lambda: run(64)) == _waits(lambda: run(32))
    engine = decoder._provider._kept
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            engine.step(8, 256)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_weights_changed_while_a_gpu_is_ahead(tokenizer, gpu_models):
    def steered(**switches):
        decoder = GuidedDecoder(gpu_models[0], tokenizer, {"a": gpu_models[1]}, **switches)
        stream = decoder.stream("How do I", weights={"a": 2.0}, max_new_tokens=40, temperature=0.0)
        tokens = []
        for i, event in enumerate(stream):
            tokens.append(event.token)
            if i == 20:
                stream.set_weights({"a": -2.0})
        return tokens

    assert steered() == steered(streams=False, cuda_graph=False)


@pytest.mark.gpu
def test_memory_of_a_gpu_is_flat_and_short_memory_lowers_the_batch(tokenizer, gpu_models, caplog):
    decoder = GuidedDecoder(gpu_models[0], tokenizer, {"a": gpu_models[1]})
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(500)]
    finished = decoder.generate_each(prompts, max_new_tokens=12, batch_size=32)
    allocated = [torch.cuda.memory_allocated() for _ in finished]
    assert max(allocated[100:]) <= max(allocated[:100]) + 2**20
    expected = decode(decoder)
    begin = Engine.begin

    def hungry(self, slots, rows):
        torch.empty(len(rows) * torch.cuda.get_device_properties(0).total_memory // 3, dtype=torch.uint8, device="cuda")
        return begin(self, slots, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "begin", hungry)
        assert decode(decoder).tokens == expected.tokens
    assert "out of memory" in caplog.text
