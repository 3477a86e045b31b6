"""`genarm bench` on tiny models: every method runs, and its figures are what they are called."""

import functools
import json
import re
import subprocess
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
import typer
from transformers import LlamaForCausalLM

from genarm import GenarmError, GuidedDecoder
from genarm.benchmark import machine, naive
from genarm.benchmark import speed as benchmark
from genarm.cli.app import app
from genarm.decoding import checks
from genarm.decoding.engine import Engine
from genarm.decoding.forwards import StaticForward
from test_decoder import byte_tokenizer, make_model

TINY = {"model_type": "llama", "vocab_size": 300, **benchmark._sizes(32, 64, 2, 2)}
ON_A_CPU = ["transformers", "naive", "base", "genarm", "no-graph", "no-streams", "neither", "separate"]
ON_A_CPU += ["torch-linear", "int8-base"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", TINY)
    monkeypatch.setitem(benchmark.SHAPES, "wide", TINY | {"intermediate_size": 640, "vocab_size": 999})
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 10.0)


FORWARD, DRAW = 30e-6, 10e-6


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """In place of the machine's, whose load would be measured too: a forward takes FORWARD, a draw of ours DRAW."""
    clock = SimpleNamespace(now=0.0, draw=DRAW)
    draw = Engine._draw

    def timed(forward):
        @functools.wraps(forward)
        def call(*args, **kwargs):
            begun = clock.now
            outputs = forward(*args, **kwargs)
            clock.now = begun + FORWARD  # whatever forwards it has called
            return outputs

        return call

    def timed_draw(*args):
        clock.now += clock.draw
        return draw(*args)

    for kind, name in ((LlamaForCausalLM, "forward"), (StaticForward, "prefill"), (StaticForward, "step")):
        monkeypatch.setattr(kind, name, timed(getattr(kind, name)))
    monkeypatch.setattr(Engine, "_draw", timed_draw)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


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
    assert kept["genarm-kernels"] == version("genarm-kernels")
    paths = {row["method"]: row["paths"] for row in kept["results"]}
    assert paths["transformers"] is paths["naive"] is None
    assert paths["genarm"] == [
        {"model": model, "path": "static", "why": None, "shared": shared, "compiled": False, "captured": False}
        | {"linear": "fused"}
        for model, shared in {"the base": False, "ARM 'arm1'": False, "ARM 'arm2'": True}.items()
    ]
    assert {path["linear"] for path in paths["torch-linear"]} == {"torch"}
    assert not any(path["shared"] for path in paths["separate"]) and len(paths["base"]) == 1
    out = capsys.readouterr().out
    assert "paper, batch 1: not measured: No module named 'model_arithmetic'" in out
    forwards = {"transformers": 1, "naive": 3, "base": 1, "separate": 3, "int8-base": 1}
    layer = 4 * 32 * 32 + 2 * 32
    base, wide = (2 * (layer + 3 * 32 * size) + 32 + 32 * 300 for size in (64, 640))
    lora = 2 * 2 * (4 * (32 + 32) + 3 * (32 + 64))
    for one in results:
        # bfloat16, but float32 adapters; all weights less input embeddings.
        norms = 2 * 2 * 32 + 32
        alone = {"transformers": 2 * base, "base": 2 * base, "int8-base": base + norms}
        weights = alone.get(one.method, 2 * (base + wide) + 4 * lora)
        weights += 2 * base if one.method == "separate" else 0
        forward = FORWARD * forwards.get(one.method, 2)
        draw = 0 if one.method in ("transformers", "naive") else DRAW
        assert one.step_ms / 1e3 == pytest.approx(forward + draw)
        assert one.first_token_ms / 1e3 == pytest.approx(forward + draw)
        assert one.outside_percent == (pytest.approx(100 * draw / (forward + draw), abs=0.01) if draw else None)
        assert one.tokens_per_second == pytest.approx(1e3 * one.batch / one.step_ms, rel=1e-3)
        assert one.percent_of_floor == pytest.approx(100 * weights / 10e9 / (one.step_ms / 1e3), abs=0.06)
        assert one.synchronisations is None and one.memory_gib > 0


def test_time_outside_of_the_forwards_is_seen(clock):
    clock.draw = 9 * 2 * FORWARD
    (slow,) = bench(["wide"], methods=["genarm"], batches=[2], new_tokens=20)
    assert slow.outside_percent == pytest.approx(90)


def test_the_plain_loop_is_measured_only_where_allowed(monkeypatch):
    monkeypatch.setattr(checks, "static_models", lambda model, linear: "planted")
    message = r"transformers \d.*: the base: planted; ARM 'arm1': planted; --allow-plain measures all the same"
    with pytest.raises(GenarmError, match=message):
        bench(["wide"], methods=["transformers", "genarm"])
    assert bench(["wide"], methods=["transformers"], batches=[1])  # none of ours
    (found,) = bench(["wide"], methods=["genarm"], batches=[1], allow_plain=True)
    assert [(path.path, path.why) for path in found.paths] == [("plain", "planted")] * 2


def test_a_commit_is_the_package_s_own(tmp_path, monkeypatch):
    """Installed within a repository of its user's, it has none."""
    monkeypatch.delenv("GENARM_COMMIT", raising=False)
    for command in ("init --quiet", "-c user.name=a -c user.email=a@b commit --quiet --allow-empty --message=a"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    rev = ["git", "rev-parse", "--short=10", "HEAD"]
    head = subprocess.run(rev, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    for folder, commit in {"python/genarm": head, "venv/lib/python3/site-packages/genarm": "unknown"}.items():
        monkeypatch.setattr(machine, "__file__", str(tmp_path / folder / "benchmark/machine.py"))
        (tmp_path / folder).mkdir(parents=True)
        assert machine.commit() == commit


def test_the_command_line_names_every_method():
    (option,) = (one for one in typer.main.get_command(app).commands["bench"].params if one.name == "method")
    assert set(re.split(r"[,:;]? |\.$", option.help)) >= set(benchmark.METHODS)


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
