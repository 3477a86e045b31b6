"""Adapters as people have them: the ARM is the model that was trained, and the base stays as it is to the last bit."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from genarm import GenarmError, GuidedDecoder
from genarm.decoding import lora
from genarm.models import adapters, loading
from test_decoder import byte_tokenizer, make_model

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.versions
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
LORA = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM", **TARGETS}
TABLES = r"embed_tokens|lm_head"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 8405006\n"


def make_base(**changes):
    return make_model("llama", attention_bias=True, **changes)


def lora_config(**options):
    return peft.LoraConfig(**{**LORA, **options})


def train(folder, config, model=None, **save):
    """An adapter of `make_base()` as if trained, saved in the folder."""
    trained = peft.get_peft_model(make_base() if model is None else model, config)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.1)
    trained.eval().save_pretrained(folder, **save)
    return trained


def load(source, base=None):
    base = make_base() if base is None else base
    return adapters.load_arm("a", source, loading.LoadedModel(base, byte_tokenizer()), None, "cpu", "auto").model


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 9, 200, 33, 41, 7]])).logits[..., :250]


def state(model):
    """All that loading an ARM must leave as it is."""
    weights = {name: x.clone() for name, x in [*model.named_parameters(), *model.named_buffers()]}
    modules = {name: (type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return weights, (modules, flags, model.config.to_dict(), model.generation_config.to_dict())


def assert_unchanged(before, model):
    after = state(model)
    assert after[1] == before[1]
    assert after[0].keys() == before[0].keys()
    assert [name for name, x in after[0].items() if not torch.equal(x, before[0][name])] == []


def resized(tokens):
    model = make_base()
    model.resize_token_embeddings(tokens)
    return model


def shifted():
    """As an embedding that was trained beside the adapter."""
    model = make_base()
    model.get_input_embeddings().weight.data += 0.1
    return model


# A case: (its configuration, the model it is trained on, options of saving, what of the base it replaces)
CASES = {
    "plain": (lambda: lora_config(), None, {}, None),
    "rsLoRA": (lambda: lora_config(use_rslora=True), None, {}, None),
    "patterns": (lambda: lora_config(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}), None, {}, None),
    "some layers": (lambda: lora_config(layers_to_transform=[1]), None, {}, None),
    "PiSSA": (lambda: lora_config(init_lora_weights="pissa"), None, {}, r"(q|down)_proj\.weight"),
    "OLoRA": (lambda: lora_config(init_lora_weights="olora"), None, {}, r"(q|down)_proj\.weight"),
    "orthogonal": (lambda: lora_config(init_lora_weights="orthogonal"), None, {}, None),
    "bias all": (lambda: lora_config(bias="all"), None, {}, r"\.bias"),
    "bias lora_only": (lambda: lora_config(bias="lora_only"), None, {}, r"q_proj\.bias"),
    "lora_bias": (lambda: lora_config(lora_bias=True), None, {}, None),
    "DoRA": (lambda: lora_config(use_dora=True), None, {}, None),
    "saved embeddings": (lambda: lora_config(), shifted, {"save_embedding_layers": True}, r"embed_tokens"),
    "more tokens": (lambda: lora_config(), lambda: resized(270), {"save_embedding_layers": True}, TABLES),
    "fewer tokens": (lambda: lora_config(), lambda: resized(250), {"save_embedding_layers": True}, TABLES),
    "more tokens, trained": (lambda: lora_config(modules_to_save=["embed_tokens"]), lambda: resized(270), {}, TABLES),
    "more tokens, a head": (lambda: lora_config(modules_to_save=["lm_head"]), lambda: resized(270), {}, TABLES),
    "more tokens, adapted": (lambda: lora_config(target_modules=["embed_tokens"]), lambda: resized(270), {}, TABLES),
    "modules_to_save": (lambda: lora_config(modules_to_save=["lm_head", "norm"]), None, {}, None),
    "token indices": (lambda: lora_config(trainable_token_indices=[5, 9]), None, {}, None),
    "embeddings": (lambda: lora_config(target_modules=["embed_tokens", "lm_head"]), None, {}, None),
    "replicated layers": (lambda: lora_config(layer_replication=[[0, 2], [1, 2]]), None, {}, None),
    "parameters": (lambda: lora_config(target_modules=[], target_parameters=["q_proj.weight"]), None, {}, None),
    "IA3": (lambda: peft.IA3Config(feedforward_modules=["down_proj"], **TARGETS), None, {}, None),
    "LoHa": (lambda: peft.LoHaConfig(**TARGETS), None, {}, None),
    "LoKr": (lambda: peft.LoKrConfig(**TARGETS), None, {}, None),
    "OFT": (lambda: peft.OFTConfig(oft_block_size=8, **TARGETS), None, {}, None),
    "HRA": (lambda: peft.HRAConfig(r=4, **TARGETS), None, {}, None),
}  # fmt: skip
LOW_RANK = {"plain", "rsLoRA", "patterns", "some layers", "orthogonal"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_the_arm_is_what_was_trained_and_the_base_stays(case, tmp_path):
    config, model, save, replaced = CASES[case]
    expected = logits(train(tmp_path, config(), model and model(), **save))
    if case == "bias lora_only" and not any(key.endswith(".bias") for key in peft.load_peft_weights(tmp_path)):
        pytest.skip("this version of PEFT does not save these biases")
    base = make_base().train()
    base.model.norm.weight.requires_grad = False
    before = state(base)
    arm = load(tmp_path, base)
    assert_unchanged(before, base)
    torch.testing.assert_close(logits(arm), expected)
    assert not torch.allclose(logits(arm), logits(base), atol=0.1)
    shares = {id(parameter) for parameter in arm.parameters()}
    own = {name for name, parameter in base.named_parameters() if id(parameter) not in shares}
    assert own == {name for name, _ in base.named_parameters() if replaced and re.search(replaced, name)}
    assert (lora.low_rank_parts(base, arm) is not None) == (case in LOW_RANK)


@pytest.mark.parametrize("case", ["plain", "PiSSA", "bias all", "saved embeddings"])
def test_decoding_with_such_an_adapter(case, tmp_path):
    config, model, save, _ = CASES[case]
    trained = train(tmp_path / "arm", config(), model and model(), **save)
    base, tokenizer = make_base(), byte_tokenizer()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    decoder = GuidedDecoder.from_pretrained(tmp_path / "base", {"a": tmp_path / "arm"})
    result = decoder.generate("How?", weights={"a": 0.7}, max_new_tokens=8, temperature=0.0)
    ids = torch.tensor([tokenizer("How?")["input_ids"] + result.tokens[0]])
    for one, logprobs in ((base, result.base_logprobs[0]), (trained, result.rewards["a"][0])):
        lines = one(ids).logits[0, 3:-1].log_softmax(-1)
        assert logprobs == pytest.approx(lines.gather(1, ids[0, 4:, None])[:, 0].tolist(), abs=1e-3)
    passes = [len(one.operands) for one in decoder._provider.passes]
    assert passes == ([2] if case == "plain" else [1, 1])


def test_a_change_of_the_base_is_noticed_and_named(tmp_path, monkeypatch):
    train(tmp_path, lora_config(init_lora_weights="pissa", layers_to_transform=[1]))
    monkeypatch.setattr(adapters, "_written", lambda *_: [])  # as if nobody knew that PiSSA rewrites weights
    base = make_base(attention_dropout=0.5).train()
    with pytest.raises(GenarmError, match=r"changed the base's layer model\.layers\.1\.self_attn\.q_proj while"):
        load(tmp_path, base)


def test_a_base_whose_passes_differ_anyway_is_not_accused(tmp_path):
    class Noisy(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.rand(())

    train(tmp_path, lora_config())
    base = make_base()
    base.lm_head.__class__ = Noisy
    load(tmp_path, base)


def test_an_initialisation_at_random_is_taken_only_if_it_repeats_itself(tmp_path):
    """After 100 iterations the singular vectors are exact where singular values are well apart, as in these layers."""
    for model in (make_base(), base := make_base()):
        for layer in model.model.layers:
            scale = 0.5 ** torch.arange(32.0)
            layer.self_attn.q_proj.weight.data = torch.linalg.qr(layer.self_attn.q_proj.weight.data)[0] * scale
        config = lora_config(init_lora_weights="pissa_niter_100", target_modules=["q_proj"])
        if model is not base:
            expected = logits(train(tmp_path / "apart", config, model))
    torch.testing.assert_close(logits(load(tmp_path / "apart", base)), expected, atol=1e-3, rtol=1e-3)
    train(tmp_path / "near", lora_config(init_lora_weights="pissa_niter_2"))
    base = make_base()
    before = state(base)
    with pytest.raises(GenarmError, match="'pissa_niter_2', which rewrites the base at random"):
        load(tmp_path / "near", base)
    assert_unchanged(before, base)


def test_converted_to_plain_lora_such_an_adapter_shares_the_base(tmp_path):
    model = peft.get_peft_model(make_base(), lora_config(init_lora_weights="pissa_niter_2"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa_niter_2"
    with torch.no_grad():
        for layer in model.get_base_model().model.layers:
            layer.mlp.down_proj.lora_B["default"].weight += 0.1
    model.save_pretrained(tmp_path / "arm", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    base = make_base()
    arm = load(tmp_path / "arm", base)
    torch.testing.assert_close(logits(arm), logits(model), atol=1e-3, rtol=1e-3)
    assert lora.low_rank_parts(base, arm) is not None


def edit_config(folder, **changes):
    """None takes a key out."""
    file = Path(folder) / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_configurations_with_few_keys_or_new_ones(tmp_path):
    expected = logits(train(tmp_path, lora_config()))
    file = tmp_path / "adapter_config.json"
    needed = ("peft_type", "r", "lora_alpha", "target_modules")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: config[key] for key in needed} | {"base_model_name_or_path": None}))
    torch.testing.assert_close(logits(load(tmp_path)), expected)
    edit_config(tmp_path, use_tomorrow=False)
    with pytest.warns(UserWarning, match="use_tomorrow"):
        torch.testing.assert_close(logits(load(tmp_path)), expected)


@pytest.fixture
def named(tmp_path):
    """A folder with the adapters helpful and polite, and their models' logits."""
    model = peft.get_peft_model(make_base(), lora_config(init_lora_weights=False), adapter_name="helpful")
    model.add_adapter("polite", lora_config(init_lora_weights=False))
    model.save_pretrained(tmp_path / "named")
    expected = {}
    for name in ("helpful", "polite"):
        model.set_adapter(name)
        expected[name] = logits(model)
    return tmp_path / "named", expected


def test_adapters_with_names(named):
    folder, expected = named
    for name, one in expected.items():
        for source in (f"{folder}#{name}", Path(f"{folder}#{name}"), folder / name):
            torch.testing.assert_close(logits(load(source)), one)
    with pytest.raises(GenarmError, match=r"adapters in subfolders, 'helpful', 'polite': give one as .*#SUBFOLDER"):
        load(folder)
    with pytest.raises(GenarmError, match="holds no adapter 'rude'; it holds 'helpful', 'polite'"):
        load(f"{folder}#rude")
    with pytest.raises(GenarmError, match=r"base: .*adapters in subfolders, 'helpful', 'polite'"):
        GuidedDecoder.from_pretrained(folder)
    with pytest.raises(GenarmError, match=r"no such folder: '.*nowhere'"):
        load(f"{folder}/nowhere#polite")


def test_a_folder_whose_name_has_the_mark(tmp_path):
    expected = logits(train(tmp_path / "run#3", lora_config()))
    torch.testing.assert_close(logits(load(tmp_path / "run#3")), expected)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def as_bin(folder):
    (folder / "adapter_model.safetensors").unlink()
    return folder / "adapter_model.bin"


BROKEN = {
    "no kind": (lambda d: edit_config(d, peft_type=None), 'lacks "peft_type"; a LoRA\'s is "LORA"'),
    "kind of tomorrow": (lambda d: edit_config(d, peft_type="LORA9"), "is a LORA9 adapter, which PEFT .* not know"),
    "kind no text": (lambda d: edit_config(d, peft_type=["LORA"]), "adapter, which PEFT .* does not know"),
    "task of tomorrow": (lambda d: edit_config(d, task_type="GUESS"), "no usable adapter_config.json: Invalid task"),
    "other task": (lambda d: edit_config(d, task_type="TOKEN_CLS"), "is one of a TOKEN_CLS model; an ARM is CAUSAL_LM"),
    "no JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "no usable adapter_config.json: Expecting"),
    "no mapping": (lambda d: (d / "adapter_config.json").write_text("[1]"), "no usable adapter_config.json"),
    "no bytes": (lambda d: (d / "adapter_config.json").write_bytes(b"\xff"), "no usable adapter_config.json"),
    "rank no number": (lambda d: edit_config(d, r="four"), "does not fit the base|no usable"),
    "other rank": (lambda d: edit_config(d, r=3), r"does not fit the base: size mismatch for .*q_proj.lora_A"),
    "no such layer": (lambda d: edit_config(d, target_modules=["qkv"]), "does not fit the base: .*qkv"),
    "fewer layers": (lambda d: edit_config(d, target_modules=["q_proj"]), "4 weights without a counterpart.*down_proj"),
    "a module unsaved": (lambda d: edit_config(d, modules_to_save=["norm"]), "does not fit the base: .*norm"),
    "no weights": (lambda d: as_bin(d), "neither adapter_model.safetensors nor adapter_model.bin"),
    "half of safetensors": (lambda d: truncate(d / "adapter_model.safetensors"), "weights cannot be read"),
    "empty safetensors": (lambda d: (d / "adapter_model.safetensors").write_bytes(b""), "weights cannot be read"),
    "half of a bin": (lambda d: torch.save({"a": torch.ones(999)}, as_bin(d)) or truncate(d / "adapter_model.bin"),
                      "weights cannot be read"),
    "empty bin": (lambda d: as_bin(d).write_bytes(b""), "weights cannot be read"),
    "bin of text": (lambda d: as_bin(d).write_text("<html>"), "weights cannot be read"),
    "bin of a list": (lambda d: torch.save([1], as_bin(d)), "weights cannot be read: expected tensors by name"),
    "pointer": (lambda d: (d / "adapter_model.safetensors").write_text(POINTER), "safetensors' is a Git LFS pointer"),
    "pointer bin": (lambda d: as_bin(d).write_text(POINTER), "bin' is a Git LFS pointer"),
    "pointer config": (lambda d: (d / "adapter_config.json").write_text(POINTER), "json' is a Git LFS pointer"),
    "LoRA-GA": (lambda d: edit_config(d, init_lora_weights="lora_ga"), "initialised by 'lora_ga'.*plain LoRA"),
    "CorDA": (lambda d: edit_config(d, init_lora_weights="corda"), "initialised by 'corda'.*plain LoRA"),
    "unknown start": (lambda d: edit_config(d, init_lora_weights="luck"), "does not fit the base: .*luck"),
    "aLoRA": (lambda d: edit_config(d, alora_invocation_tokens=[5]), "activated LoRA"),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    train(folder, lora_config())
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters_say_what_is_wrong_and_leave_the_base(case, plain, tmp_path):
    damage, message = BROKEN[case]
    shutil.copytree(plain, tmp_path / "arm")
    damage(tmp_path / "arm")
    base = make_base()
    before = state(base)
    with pytest.raises(GenarmError, match=rf"^ARM 'a': .*{message}") as raised:
        load(tmp_path / "arm", base)
    assert "\n" not in str(raised.value)
    assert_unchanged(before, base)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 64}, r"trained on 'big', does not fit the base: size mismatch for .*q_proj.*32.*64"),
        ({"num_hidden_layers": 3}, r"does not fit the base: 4 weights without a counterpart.*layers\.2\."),
    ],
)
def test_an_adapter_of_another_base_is_named_with_what_does_not_fit(other, message, tmp_path):
    model = peft.get_peft_model(make_base(), lora_config())
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, base_model_name_or_path="big")
    if "num_hidden_layers" in other:
        train(tmp_path, lora_config(), make_base(**other))
        other = {}
    with pytest.raises(GenarmError, match=message):
        load(tmp_path, make_base(**other))


def test_biases_that_were_trained_and_not_saved(tmp_path):
    """As PEFT 0.20 saves bias="lora_only"."""
    train(tmp_path, lora_config(bias="lora_only"))
    weights = {key: x for key, x in peft.load_peft_weights(tmp_path).items() if not key.endswith(".bias")}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(GenarmError, match="bias='lora_only', and its weights lack the biases"):
        load(tmp_path)
    train(tmp_path, lora_config(bias="lora_only"), make_model())
    load(tmp_path, make_model())  # which has none


def test_a_reward_models_adapter_is_named(tmp_path):
    from transformers import LlamaForSequenceClassification

    train(tmp_path, lora_config(task_type="SEQ_CLS"), LlamaForSequenceClassification(make_base().config))
    with pytest.raises(GenarmError, match="SEQ_CLS model, a classic reward model with a score head"):
        load(tmp_path)
    edit_config(tmp_path, task_type=None)
    with pytest.raises(GenarmError, match=r"without a counterpart, such as .*\.score\."):
        load(tmp_path)


def test_a_merged_model_beside_what_is_left_of_its_adapter(tmp_path):
    """Whether the adapter is merged into the model, or has lost its weights, only its owner knows."""
    model = train(tmp_path, lora_config())
    expected = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path)), expected)  # the adapter, which is the same as the merged model
    for _ in range(2):
        with pytest.raises(GenarmError, match=r"base: .*LoRA adapter; give it as --arm .*remove adapter_config\.json"):
            GuidedDecoder.from_pretrained(tmp_path)
        (tmp_path / "adapter_model.safetensors").unlink(missing_ok=True)
    with pytest.raises(GenarmError, match=r"has no weights: .*if it is merged .* remove adapter_config\.json"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    byte_tokenizer().save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path, make_base(seed=3))), expected)


def test_a_base_in_which_peft_has_put_an_adapter(tmp_path):
    """It is decoded as it behaves; what an ARM's adapter is to mean on top of it, nobody says."""
    train(tmp_path, lora_config())
    tokenizer = byte_tokenizer()
    inside = make_base()
    wrapped = peft.get_peft_model(inside, lora_config(init_lora_weights=False))
    injected = peft.inject_adapter_in_model(lora_config(init_lora_weights=False), make_base())
    for base in (wrapped, inside, injected):
        before = logits(base.eval())
        with pytest.raises(GenarmError, match=r"'a': the adapter .* needs a base without adapters.*merge_and_unload"):
            GuidedDecoder.from_pretrained(base, {"a": tmp_path}, tokenizer=tokenizer)
        assert torch.equal(logits(base), before)
    result = GuidedDecoder(wrapped, tokenizer, {"b": make_model(seed=1)}).generate(
        "ab", weights={"b": 0.0}, max_new_tokens=5, temperature=0.0
    )
    ids = torch.tensor([tokenizer("ab")["input_ids"] + result.tokens[0]])
    assert wrapped(ids).logits[0, 1:-1].argmax(-1).tolist() == result.tokens[0]
    with pytest.raises(GenarmError, match=r"base: PEFT has put the adapter of ARM 'a' into this very model"):
        GuidedDecoder(inside, tokenizer, {"a": wrapped})


def test_loaded_models_whose_adapters_cannot_be_decoded():
    tokenizer, options = byte_tokenizer(), {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    prompted = peft.get_peft_model(make_base(), peft.PromptTuningConfig(**options))
    activated = peft.get_peft_model(make_base(), lora_config(alora_invocation_tokens=[5]))
    with pytest.raises(GenarmError, match="ARM 'a': its adapter 'default' is of kind PROMPT_TUNING"):
        GuidedDecoder(make_base(), tokenizer, {"a": prompted})
    with pytest.raises(GenarmError, match="base: its adapter 'default' is of kind PROMPT_TUNING"):
        GuidedDecoder(prompted, tokenizer)
    with pytest.raises(GenarmError, match="ARM 'a': its adapter 'default' is an activated LoRA"):
        GuidedDecoder(make_base(), tokenizer, {"a": activated})


def test_two_active_adapters_are_no_plain_lora():
    base = make_base()
    arm = peft.get_peft_model(loading.twin(base), lora_config(init_lora_weights=False))
    assert lora.low_rank_parts(base, arm) is not None
    arm.add_adapter("more", lora_config(init_lora_weights=False))
    arm.base_model.set_adapter(["default", "more"])
    assert lora.low_rank_parts(base, arm) is None


def test_a_twin_keeps_apart_what_bitsandbytes_keeps_beside_its_own_weights():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for layer in model:
        layer.state = [layer.weight]
    first, second = loading.twin(model, own=[model[0].weight])
    assert first.weight is not model[0].weight and first.state is not model[0].state
    assert second.weight is model[1].weight and second.state is model[1].state
