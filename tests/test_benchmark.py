"""`genarm bench` on tiny models: every method runs, and its figures are what they are called."""

import json
import time

import pytest
import torch

from genarm import GenarmError, GuidedDecoder, benchmark, naive
from genarm.engine import Engine
from test_decoder import byte_tokenizer, make_model

TINY = {"model_type": "llama", "vocab_size": 300, **benchmark._sizes(32, 64, 2, 2)}
ON_A_CPU = ["transformers", "naive", "base", "genarm", "no-graph", "no-streams", "neither", "separate"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", TINY)
    monkeypatch.setitem(benchmark.SHAPES, "wide", TINY | {"intermediate_size": 640, "vocab_size": 999})
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 10.0)


def bench(arms, **options):
    defaults = {"batches": [1, 2], "prompt_tokens": 9, "new_tokens": 5, "rounds": 1, "device": "cpu"}
    return benchmark.bench("tiny", arms, **{**defaults, **options})


def test_every_method_is_measured(tmp_path, capsys):
    results = bench(["wide", "lora:2"], methods=[*ON_A_CPU, "paper"], out=tmp_path)
    assert [(one.batch, one.method) for one in results] == [(batch, name) for batch in (1, 2) for name in ON_A_CPU]
    kept = json.loads((tmp_path / "tokens_per_second-tiny+wide+lora-2.json").read_text())
    assert (tmp_path / "tokens_per_second-tiny+wide+lora-2.png").stat().st_size > 1000
    assert [row["method"] for row in kept["results"]] == ON_A_CPU * 2
    assert kept["arms"] == ["wide", "lora:2"] and kept["commit"] and kept["machine"]
    out = capsys.readouterr().out
    assert "paper, batch 1: not measured: No module named 'model_arithmetic'" in out
    layer = 4 * 32 * 32 + 2 * 32
    base, wide = (2 * (layer + 3 * 32 * size) + 32 + 32 * 300 for size in (64, 640))
    lora = 2 * 2 * (4 * (32 + 32) + 3 * (32 + 64))
    for one in results:
        # bfloat16, but float32 adapters; all weights less input embeddings.
        weights = {"transformers": 2 * base, "base": 2 * base}.get(one.method, 2 * (base + wide) + 4 * lora)
        weights += 2 * base if one.method == "separate" else 0
        assert one.tokens_per_second == pytest.approx(1e3 * one.batch / one.step_ms, rel=1e-3)
        assert one.percent_of_floor == pytest.approx(100 * weights / 10e9 / (one.step_ms / 1e3), abs=0.06)
        assert (one.outside_percent is None) == (one.method in ("transformers", "naive"))
        assert one.synchronisations is None and one.first_token_ms > 0 and one.memory_gib > 0


def test_time_outside_of_the_forwards_is_seen(monkeypatch):
    (quick,) = bench(["wide"], methods=["genarm"], batches=[2], new_tokens=20)
    draw = Engine._draw
    monkeypatch.setattr(Engine, "_draw", lambda *args: time.sleep(0.05) or draw(*args))
    (slow,) = bench(["wide"], methods=["genarm"], batches=[2], new_tokens=20)
    assert 0 < quick.outside_percent < 60 < slow.outside_percent < 100


def test_what_cannot_be_measured_is_said():
    with pytest.raises(GenarmError, match="no method is called 'fast'"):
        bench(["wide"], methods=["fast"])
    with pytest.raises(GenarmError, match="base: no such folder"):
        benchmark.bench("./nowhere", ["wide"], device="cpu")


def test_a_method_of_ours_that_fails_loses_nothing_and_is_not_overlooked(tmp_path, monkeypatch):
    measure = benchmark._Bench.measure

    def failing(self, method, *rest):
        if method == "base":
            raise RuntimeError("planted")
        return measure(self, method, *rest)

    monkeypatch.setattr(benchmark._Bench, "measure", failing)
    with pytest.raises(RuntimeError, match="planted"):
        bench(["wide"], methods=["base"], batches=[1], out=tmp_path)
    with pytest.raises(RuntimeError, match="planted"):
        bench(["wide"], methods=["base", "genarm"], batches=[1], new_tokens=4, out=tmp_path)
    kept = json.loads((tmp_path / "tokens_per_second-tiny+wide.json").read_text())
    assert [one["method"] for one in kept["results"]] == ["genarm"]


def test_shapes_are_the_models_they_are_called():
    sizes = {"llama-58m": 58, "llama-271m": 271, "llama-1b": 1236, "llama-7b": 6738, "llama-8b": 8030,
             "mistral-7b": 7242, "qwen3-0.6b": 596, "qwen3-8b": 8191, "gpt2": 124}  # fmt: skip
    for name, millions in sizes.items():
        with torch.device("meta"):
            model = benchmark._random(benchmark.SHAPES[name], "meta", torch.bfloat16, 0)
        assert sum(x.numel() for x in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01), name
    assert set(sizes) == set(benchmark.SHAPES) - {"tiny", "wide"}


def test_the_naive_loop_draws_what_the_decoder_draws():
    """The baseline does the same job: with one token to choose from, the same tokens, for prompts of any length."""
    base, arm = make_model(), make_model(seed=1)
    base.generation_config.eos_token_id = None
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"
    prompts = ["How do I", "a", "bread, please"]
    slow = naive.generate(base, tokenizer, prompts, {arm: 0.7}, 12, top_k=1)
    fast = GuidedDecoder(base, tokenizer, {"a": arm}).generate(
        prompts, weights={"a": 0.7}, max_new_tokens=12, temperature=0.0
    )
    assert slow.tolist() == fast.tokens
