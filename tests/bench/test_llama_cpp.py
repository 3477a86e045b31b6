"""llama.cpp as a baseline of `genarm bench`: it decodes what the models themselves do, or says why it cannot."""

import copy
import importlib.util
import sys
from unittest.mock import MagicMock

import pytest
import torch

from genarm import GenarmError
from genarm.benchmark import llama_cpp, naive
from genarm.benchmark import speed as benchmark
from test_decoder import byte_tokenizer, make_model

MISSING = [name for name in ("gguf", "llama_cpp") if importlib.util.find_spec(name) is None]
needs_gguf = pytest.mark.skipif("gguf" in MISSING, reason=f"gguf is not installed: {llama_cpp.INSTALL}")
needs_llama_cpp = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: {llama_cpp.INSTALL}")
TINY = {"model_type": "llama", "vocab_size": 300, **benchmark._sizes(32, 64, 2, 2)}
SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
GREEDY = {"temperature": 1.0, "top_p": 0.0}
KINDS = {"llama": {"num_key_value_heads": 1}, "qwen3": {"tie_word_embeddings": True}}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", TINY)
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 10.0)


def bench(**options):
    return benchmark.bench("tiny", ["tiny"], batches=[2], prompt_tokens=9, new_tokens=5, rounds=1, **options)


def lora(base, rank=2):
    peft = pytest.importorskip("peft", reason="adapters need PEFT")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


@needs_llama_cpp
@pytest.mark.parametrize("arms", ["alone", "model", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(kind, arms):
    """In float32, for prompts of different lengths; twice, as the benchmark runs it."""
    base = make_model(kind, **KINDS[kind])
    guides = {"alone": lambda: [], "model": lambda: [make_model(kind, seed=1)], "lora": lambda: [lora(base)]}[arms]()
    base.generation_config.eos_token_id = None
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"
    prompts = ["How do I", "a", "bread, please"]
    theirs = naive.generate(base, tokenizer, prompts, dict.fromkeys(guides, 1.0), 16, top_k=1)
    with llama_cpp.generation([base, *guides], tokenizer(prompts)["input_ids"], 16, **GREEDY) as generate:
        assert generate(16) == theirs.tolist()
        assert generate(5) == theirs[:, :5].tolist()


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_it_draws_by_temperature_and_top_p(dtype):
    """Of 20 tokens drawn at once: one kind at a low temperature or where top-p leaves one, many at a high one."""
    base = make_model().to(getattr(torch, dtype))
    prompts = [[5, 6, 7]] * 20
    kinds = []
    for temperature, top_p in ((0.01, 1.0), (100.0, 0.001), (100.0, 1.0)):
        with llama_cpp.generation([base], prompts, 1, temperature=temperature, top_p=top_p) as generate:
            kinds.append(len({row[0] for row in generate(1)}))
    assert kinds[:2] == [1, 1] and kinds[2] > 10


@needs_gguf
@pytest.mark.parametrize(
    ("dtype", "quantize", "kind"),
    [("float32", False, "F32"), ("float16", False, "F16"), ("bfloat16", False, "BF16"), ("bfloat16", True, "Q8_0")],
)
def test_a_file_has_the_weights_in_their_precision(dtype, quantize, kind, tmp_path):
    import gguf

    model = make_model("qwen3", tie_word_embeddings=False).to(getattr(torch, dtype))
    llama_cpp.write_gguf(model, tmp_path / "a.gguf", quantize)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert len(found) == len(list(model.parameters()))
    wanted = {
        "output.weight": model.lm_head.weight,
        "token_embd.weight": model.model.embed_tokens.weight,
        "blk.1.attn_q.weight": model.model.layers[1].self_attn.q_proj.weight,
        "blk.1.ffn_down.weight": model.model.layers[1].mlp.down_proj.weight,
    }
    for name, weight in wanted.items():
        assert found[name].tensor_type.name == kind
        stored = torch.tensor(gguf.quants.dequantize(found[name].data, found[name].tensor_type))
        bound = weight.detach().float().abs().max() / 127 if quantize else 0  # half a step, and its scale in float16
        assert (stored - weight.detach().float()).abs().max() <= bound
    assert {x.tensor_type.name for name, x in found.items() if "norm" in name} == {"F32"}


@needs_llama_cpp
def test_it_is_measured_beside_the_others(tiny, capsys):
    alone, guided, rounded, _ = bench(device="cpu", methods=["llama.cpp-base", "llama.cpp", "llama.cpp-int8", "base"])
    assert [(one.method, one.batch, one.new_tokens) for one in (alone, guided, rounded)] == [
        ("llama.cpp-base", 2, 5),
        ("llama.cpp", 2, 5),
        ("llama.cpp-int8", 2, 5),
    ]
    norms, matrices = 2 * 2 * 32 + 32, 2 * (4 * 32 * 32 + 3 * 32 * 64) + 32 * 300  # less input embeddings
    bfloat16, int8 = 2 * (matrices + norms), matrices + 2 * norms
    for one, weights in ((alone, bfloat16), (guided, 2 * bfloat16), (rounded, 2 * int8)):
        floor_ms = 1e3 * weights / 10e9
        assert one.percent_of_floor == pytest.approx(100 * floor_ms / one.step_ms, abs=0.06)
        assert one.paths is one.outside_percent is None
    assert "│ llama.cpp-base │" in capsys.readouterr().out  # though the table is narrow


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ({"llama_cpp": None}, "llama.cpp: import of llama_cpp halted"),
        ({"llama_cpp": MagicMock(), "gguf": None}, "llama.cpp: import of gguf halted"),
        ({"llama_cpp": MagicMock(llama_backend_init=MagicMock(side_effect=OSError("planted")))}, "planted"),
    ],
    ids=["llama-cpp-python", "gguf", "broken"],
)
def test_where_it_does_not_run_the_others_are_measured(modules, reason, tiny, monkeypatch, capsys):
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    results = bench(device="cpu", methods=["llama.cpp", "base", "llama.cpp-base"])
    assert [one.method for one in results] == ["base"]
    said = " ".join(capsys.readouterr().out.split())
    for method in ("llama.cpp", "llama.cpp-base"):
        assert f"{method}, batch 2: not measured: {reason}" in said
    assert said.count(llama_cpp.INSTALL) == (0 if reason == "planted" else 2)


def test_only_models_on_a_cpu():
    with (
        pytest.raises(GenarmError, match=r"llama\.cpp is measured on a CPU only: expected device cpu, got meta"),
        llama_cpp.generation([make_model().to("meta")], [[1]], 1, **GREEDY),
    ):
        pass


@needs_gguf
@pytest.mark.parametrize(
    ("model", "got"),
    [
        (lambda: make_model("gpt2"), "got gpt2"),
        (lambda: make_model(rope_parameters=SCALED), "got llama"),
    ],
    ids=["gpt2", "scaled"],
)
def test_a_model_that_it_cannot_run_is_named(model, got, tmp_path):
    with pytest.raises(GenarmError, match=rf"expected a model of llama, mistral, qwen3 .*{got}"):
        llama_cpp.write_gguf(model(), tmp_path / "a.gguf")
