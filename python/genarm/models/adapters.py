"""ARMs that are PEFT adapters of the base: found, read, checked, and put on a twin of the base, which stays as it is.

PEFT writes into the model that it is given, and more than the adapter's own layers: some initialisations rewrite the
layers' weights, and biases, embeddings and heads that were trained along are loaded over the base's. The twin shares
the base's weights, except those that the adapter may write.
"""

import copy
import json
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import GenarmError
from . import loading
from .folders import Place, check_folder

# Initialisations of a LoRA that leave the weights of its layers as they are.
_KEEP_WEIGHTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Those that rewrite them by data which is not saved with the adapter: PEFT cannot rewrite the base's the same way.
_FROM_DATA = ("corda", "lora_ga")
_AS_PLAIN_LORA = "save it as a plain LoRA, by PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
# Adapters whose part of a token's logits is no function of the tokens alone, one after the other, as decoding needs it.
_NOT_TOKEN_BY_TOKEN = ("ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA")
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_SCORE = ", a classic reward model with a score head"


def load_arm(
    name: str, source: loading.Source, base: loading.LoadedModel, tokenizer: Any, device: str, dtype: str | torch.dtype
) -> loading.LoadedModel:
    """An ARM from a folder, a hub name or a loaded model, or a PEFT adapter of the base from a folder or the hub.

    `"DIR#polite"` is the adapter in the subfolder `polite` of `DIR`, where PEFT saves an adapter of that name.
    """
    label = f"ARM {name!r}"
    if isinstance(source, torch.nn.Module):
        return loading.LoadedModel(source, tokenizer or base.tokenizer)
    place = Place.of(source)
    loading.check_exists(label, type(source)(place.root))
    file = loading.adapter_config(place.root, place.subfolder)
    if file is None and place.subfolder:
        found = ", ".join(map(repr, loading.named_adapters(place.root)))
        raise GenarmError(f"{label}: {place.root!r} holds no adapter {place.subfolder!r}; it holds {found or 'none'}")
    if file is None:
        model = loading.load_model(label, place.root, dtype).to(device)
        return loading.LoadedModel(model, tokenizer or loading.arm_tokenizer(label, place.root, base))
    check_folder(label, file.parent)
    if tokenizer is None and (file.parent / "tokenizer_config.json").is_file():
        tokenizer = loading.load_tokenizer(label, file.parent)
    return loading.LoadedModel(_load_adapter(label, place, file.parent, base.model), tokenizer or base.tokenizer)


def check_models(base: Any, arms: Mapping[str, Any]) -> None:
    """GenarmError when loaded models have adapters that decoding cannot run, or an ARM's adapter is in the base."""
    if "peft" not in sys.modules:  # which alone makes such models, and takes seconds to import
        return
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    for label, model in {"base": base, **{f"ARM {name!r}": arm for name, arm in arms.items()}}.items():
        if isinstance(model, PeftModel | PeftMixedModel):
            for adapter in model.active_adapters:
                _check_kind(f"{label}: its adapter {adapter!r}", model.peft_config[adapter])
    of_base = {id(module) for module in base.modules() if isinstance(module, BaseTunerLayer)}
    for name, arm in arms.items():
        if any(id(module) in of_base for module in arm.modules()):
            raise GenarmError(
                f"base: PEFT has put the adapter of ARM {name!r} into this very model, which so gives the ARM's "
                "logits; load the base once more, or give the adapter's folder as the ARM"
            )


def _load_adapter(label: str, place: Place, folder: Path, base: Any) -> Any:
    """The PEFT model of an adapter over the weights of `base`, but for those that the adapter writes."""
    try:
        import peft
    except ImportError as error:
        raise GenarmError(f"{label}: an adapter needs PEFT: {loading.INSTALL_TRAIN}") from error
    if any(isinstance(module, peft.PeftModel | peft.tuners.tuners_utils.BaseTunerLayer) for module in base.modules()):
        raise GenarmError(
            f"{label}: the adapter {place} needs a base without adapters, and PEFT has put one into this base: make it "
            "part of the base's weights by merge_and_unload(), or load the base once more"
        )
    where = f"{label}: the adapter {place}"
    config = _read_config(where, place, folder)
    weights = _read_weights(where, place, folder, base.device)
    before = _outputs(base)

    def build() -> tuple[Any, list[tuple[Tensor, Tensor]]]:
        model = loading.twin(base, own=_written(config, weights, base))
        copies = {
            id(mine): (mine, theirs)
            for mine, theirs in zip(_tensors(model), _tensors(base), strict=True)
            if mine is not theirs
        }
        if tokens := _other_vocabulary(weights, base):
            model.resize_token_embeddings(tokens, mean_resizing=False)
        model = peft.get_peft_model(model, copy.deepcopy(config))
        loaded = model.load_adapter(
            place.root, "default", torch_device=str(base.device), subfolder=place.subfolder or None
        )
        if wrong := [*loaded.missing_keys, *loaded.unexpected_keys]:
            raise ValueError(f"{len(wrong)} weights without a counterpart, such as {wrong[0]}")
        if _lacks_biases(config, weights, model):
            raise GenarmError(
                f"{where} was trained with bias='lora_only', and its weights lack the biases, which PEFT 0.20 did not "
                "save: save it again by a newer PEFT"
            )
        return model, _give_back(model, copies)

    try:
        with _flags_kept(base):
            model, changed = build()
            if "niter" in str(getattr(config, "init_lora_weights", "")):
                _check_repeatable(where, config, changed, build()[1])
    except (GenarmError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, TypeError, LookupError, RuntimeError) as error:
        of = f", trained on {config.base_model_name_or_path!r}," if config.base_model_name_or_path else ""
        raise GenarmError(f"{where}{of} does not fit the base: {_reason(error)}") from error
    if layer := _first_difference(before, base):
        raise GenarmError(
            f"{where} has changed the base's {layer} while it was loaded: load the base once more, and the ARM as a "
            "whole model, which PEFT's merge_and_unload() makes of base and adapter"
        )
    return model


def _read_config(where: str, place: Place, folder: Path) -> Any:
    """The adapter's configuration; GenarmError where it cannot be read, or is of a kind that decoding cannot run."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, __version__

    try:
        raw = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind = raw.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise GenarmError(f"{where} has no usable adapter_config.json: {loading.first_line(error)}") from error
    if kind is None:
        raise GenarmError(f'{where}: its adapter_config.json lacks "peft_type"; a LoRA\'s is "LORA"')
    if str(kind) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise GenarmError(f"{where} is a {kind} adapter, which PEFT {__version__} does not know: pip install -U peft")
    try:
        config = PeftConfig.from_pretrained(place.root, subfolder=place.subfolder or None)
    except (ValueError, TypeError, LookupError) as error:
        raise GenarmError(f"{where} has no usable adapter_config.json: {loading.first_line(error)}") from error
    _check_kind(where, config)
    if (initialised := getattr(config, "init_lora_weights", None)) in _FROM_DATA:
        raise GenarmError(
            f"{where} was initialised by {initialised!r}, which rewrites the base by data that is not saved: "
            f"{_AS_PLAIN_LORA}"
        )
    config.inference_mode = True
    return config


def _check_kind(where: str, config: Any) -> None:
    """GenarmError for adapters that give no log-probability of the next token, or not by each token fed."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or kind in _NOT_TOKEN_BY_TOKEN or getattr(config, "arrow_config", None):
        raise GenarmError(f"{where} is of kind {kind}, which cannot be decoded token by token; LoRA and its kind can")
    if getattr(config, "alora_invocation_tokens", None):
        raise GenarmError(
            f"{where} is an activated LoRA (alora_invocation_tokens), which acts on part of a text only; a LoRA can be "
            "decoded"
        )
    if config.task_type not in (None, "CAUSAL_LM"):
        task = getattr(config.task_type, "value", config.task_type)
        raise GenarmError(
            f"{where} is one of a {task} model{_SCORE if task == 'SEQ_CLS' else ''}; an ARM is CAUSAL_LM: it scores "
            "every next token (`genarm train` makes one)"
        )


def _read_weights(where: str, place: Place, folder: Path, device: torch.device) -> dict[str, Tensor]:
    from peft import load_peft_weights

    if Path(place.root).is_dir() and not any((folder / name).is_file() for name in _WEIGHTS):
        raise GenarmError(
            f"{where} has no weights: neither {' nor '.join(_WEIGHTS)} lies there (if it is merged into a model that "
            "does, remove adapter_config.json)"
        )
    try:
        weights = load_peft_weights(place.root, device=str(device), subfolder=place.subfolder or None)
    except (OSError, ValueError, RuntimeError, EOFError, LookupError, pickle.PickleError, SafetensorError) as error:
        raise GenarmError(
            f"{where}: its weights cannot be read: {loading.first_line(error)}; fetch or save them again"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise GenarmError(f"{where}: its weights cannot be read: expected tensors by name; save them by PEFT")
    return weights


def _written(config: Any, weights: dict[str, Tensor], base: Any) -> list[Tensor]:
    """Those of the base's tensors that loading the adapter may write: for a LoRA that keeps its layers' weights, what
    is saved beside it under the names of the base's own; for others, which may write any, all.
    """
    parameters = dict(base.named_parameters(remove_duplicate=False))
    names = [
        key.removeprefix("base_model.model.").replace(".base_layer.", ".") for key in weights if ".lora_" not in key
    ]
    keeps = config.peft_type == "LORA" and config.init_lora_weights in _KEEP_WEIGHTS
    if not keeps or getattr(config, "kasa_config", None) or not set(names) <= set(parameters):
        return _tensors(base)
    tables = (base.get_input_embeddings(), base.get_output_embeddings()) if _other_vocabulary(weights, base) else ()
    return [parameters[name] for name in names] + [x for table in tables if table for x in table.parameters()]


def _other_vocabulary(weights: dict[str, Tensor], base: Any) -> int | None:
    """How many tokens the saved embeddings or head have, if not as many as the base's: they were resized."""
    names = {module: name for name, module in base.named_modules()}
    for table in (base.get_input_embeddings(), base.get_output_embeddings()):
        for layer in ("", ".base_layer"):
            saved = weights.get(f"base_model.model.{names.get(table)}{layer}.weight")
            if saved is not None and saved.shape != table.weight.shape and saved.shape[1:] == table.weight.shape[1:]:
                return len(saved)
    return None


def _lacks_biases(config: Any, weights: dict[str, Tensor], model: Any) -> bool:
    """Whether biases of the adapted layers were trained and not saved, as PEFT 0.20 does by bias="lora_only"."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trained = any(getattr(layer, "bias", None) is not None for layer in layers)
    saved = any(key.endswith(".bias") and ".lora_" not in key for key in weights)
    return getattr(config, "bias", "none") == "lora_only" and trained and not saved


def _tensors(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _give_back(model: Any, copies: dict[int, tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Puts the base's own tensors in place of copies that are as they were; the pairs (copy, base's) of the others."""
    written = []
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if id(tensor) not in copies:
                    continue
                mine, theirs = copies[id(tensor)]
                if mine.shape == theirs.shape and torch.equal(mine, theirs):
                    table[name] = theirs
                else:
                    written.append((mine, theirs))
    return written


def _check_repeatable(where: str, config: Any, once: list[tuple[Tensor, Tensor]], again: list[Any]) -> None:
    """GenarmError unless an initialisation that draws random numbers rewrites the base twice in the same way."""
    for (one, base), (other, _) in zip(once, again, strict=True):
        if one.shape == base.shape and (one - other).norm() > 1e-3 * (one - base).norm():
            raise GenarmError(
                f"{where} was initialised by {config.init_lora_weights!r}, which rewrites the base at random, each "
                f"time otherwise: {_AS_PLAIN_LORA}"
            )


@contextmanager
def _flags_kept(base: Any) -> Iterator[None]:
    """PEFT freezes all parameters of its model, and so those that the twin shares with the base."""
    flags = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad = flag


@torch.inference_mode()
def _outputs(base: Any) -> dict[str, Tensor]:
    """What each innermost layer of the base gives for a few tokens, in the order of the forward, and its logits."""
    model = loading.twin(base).eval()  # hooks and evaluation mode are the twin's alone
    outputs: dict[str, Tensor] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda module, inputs, output: outputs.update({f"layer {name}": output}))

    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            watch(name, module)
    tokens = torch.arange(2, 7, device=base.device)[None] % loading.embeddings(base)
    logits = model(input_ids=tokens, use_cache=False).logits
    return {name: output for name, output in outputs.items() if isinstance(output, Tensor)} | {"logits": logits}


def _first_difference(before: dict[str, Tensor], base: Any) -> str | None:
    """The first layer whose outputs are not what they were; None as well where two passes do not agree anyway."""
    after = _outputs(base)
    changed = [name for name, output in after.items() if not torch.equal(before[name], output)]
    if not changed:
        return None
    again = _outputs(base)
    return next((name for name in changed if torch.equal(after[name], again[name])), None)


def _reason(error: BaseException) -> str:
    """PyTorch lists the weights whose shapes differ below a heading."""
    lines = str(error).splitlines()
    return next((line.strip() for line in lines if "size mismatch" in line), loading.first_line(error))
