"""Models and tokenizers from folders or the hub, and the check that they share a vocabulary."""

import copy
import re
from collections.abc import Iterable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from genarm_kernels.validation import OPERAND_DTYPES

from ..errors import GenarmError
from ..tokens import added_tokens
from . import transformers_api
from .folders import check_folder
from .transformers_api import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, find_adapter_config_file

_LOGGER = getLogger("genarm")

Source = str | Path | torch.nn.Module
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
# What tokenizers call tokens that have no use yet, and padding: <|reserved_special_token_2|>, <unused5>, [PAD], ...
_UNUSED = re.compile(r"[<\[](.*(reserved|unused|extra|dummy|control|place.?holder).*|\W*pad\W*)[>\]]", re.IGNORECASE)
INSTALL_TRAIN = "pip install 'genarm-kernels[train]', or in a checkout pip install '.[train]'"


class LoadedModel(NamedTuple):
    """A causal language model, ready to decode, and its tokenizer."""

    model: Any
    tokenizer: Any


def load_base(source: Source, tokenizer: Any, device: str, dtype: str | torch.dtype) -> LoadedModel:
    """The base from a folder, a hub name or a loaded model (whose tokenizer must then be given)."""
    if isinstance(source, torch.nn.Module):
        if tokenizer is None:
            raise GenarmError("base: a loaded model needs its tokenizer: pass tokenizer=")
        return LoadedModel(source, tokenizer)
    return LoadedModel(load_model("base", source, dtype).to(device), tokenizer or load_tokenizer("base", source))


def load_model(label: str, source: str | Path, dtype: str | torch.dtype) -> Any:
    """A causal language model on the CPU, all its weights from the source; GenarmError otherwise."""
    config = load_config(label, source)
    progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(source), config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise GenarmError(f"{label}: {str(source)!r} cannot be loaded: {first_line(error)}") from error
    finally:
        if progress:
            logging.enable_progress_bar()
    if info["missing_keys"]:  # transformers would decode with random weights in their place
        missing = sorted(info["missing_keys"])
        raise GenarmError(f"{label}: {str(source)!r} lacks {len(missing)} weights of its model, such as {missing[0]}")
    if model.dtype == torch.float64:
        raise GenarmError(f"{label}: {str(source)!r} is stored as {model.dtype}; give dtype='float32'")
    return model


def load_tokenizer(label: str, source: str | Path) -> Any:
    """The tokenizer of a folder or hub name; GenarmError when there is none."""
    check_folder(label, source)
    if not _has_tokenizer(source):  # transformers would make up an empty one for some models
        reason = "put its files there, or, to decode, give their folder as tokenizer (--tokenizer DIR)"
        raise GenarmError(f"{label}: no tokenizer lies in {str(source)!r}: {reason}")
    try:
        return AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # tokenizers itself raises nothing narrower
        raise GenarmError(f"{label}: no tokenizer can be loaded from {str(source)!r}: {first_line(error)}") from error


def arm_tokenizer(label: str, source: str | Path, base: LoadedModel) -> Any:
    """The tokenizer that lies beside an ARM, or the base's, with a warning, where there is none."""
    if _has_tokenizer(source):
        return load_tokenizer(label, source)
    _LOGGER.warning("%s: no tokenizer lies in %r: its tokens are taken to be the base's", label, str(source))
    return base.tokenizer


def given_tokenizer(label: str, tokenizer: Any) -> Any:
    """A tokenizer that a call was given: itself, or what lies in its folder or behind its hub name."""
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    check_exists(label, tokenizer)
    return load_tokenizer(label, tokenizer)


def load_config(label: str, source: str | Path) -> Any:
    """The configuration of a causal language model; GenarmError when the source is missing or holds something else."""
    check_exists(label, source)
    check_folder(label, source)
    if adapter_config(source) is not None:
        raise GenarmError(
            f"{label}: {str(source)!r} is a LoRA adapter; give it as --arm NAME=DIR, and its base as --base (if it is "
            "merged into a model that lies there too, remove adapter_config.json and the adapter's weights)"
        )
    try:
        config = AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError, KeyError) as error:
        if found := ", ".join(map(repr, named_adapters(source))):
            raise GenarmError(
                f"{label}: {str(source)!r} holds no model but adapters in subfolders, {found}: give one as "
                "--arm NAME=DIR#SUBFOLDER, and its base as --base"
            ) from error
        reason = f"no usable config.json: {first_line(error)}"
        raise GenarmError(f"{label}: {str(source)!r} holds no causal language model: {reason}") from error
    kinds = {name.lower() for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _as_tuple(names)}
    architectures = config.architectures or []
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        architectures and not any(architecture.lower() in kinds for architecture in architectures)
    ):
        what = ", ".join(architectures) or config.model_type
        raise GenarmError(f"{label}: {str(source)!r} holds no causal language model but {what}")
    return config


def shared_vocabulary(base: LoadedModel, arms: Mapping[str, LoadedModel]) -> int:
    """The number of tokens that every model scores and every tokenizer names.

    GenarmError where the names differ. A warning is enough where one tokenizer reserves a token that a later version of
    it uses: the model that does not know the token scores it as it scores all that it has never seen.
    """
    names = [token_names(loaded.tokenizer) for loaded in (base, *arms.values())]
    widths = [_width(loaded.model) for loaded in (base, *arms.values())]
    sizes = [1 + max(strings, default=-1) for strings in names]
    for label, size, width in zip(["base", *(f"ARM {arm!r}" for arm in arms)], sizes, widths, strict=True):
        if 2 * size < width:  # a model pads its vocabulary by a fraction; some folders hold the stump of a tokenizer
            raise GenarmError(
                f"{label}: its tokenizer has {size} tokens, the model {width}: give the model's own as tokenizer"
            )
    shared = min(sizes + widths)
    for (arm, loaded), own in zip(arms.items(), names[1:], strict=True):
        differing = [token for token in range(shared) if token in own and names[0].get(token, own[token]) != own[token]]
        for token in differing:
            if not (_is_unused(token, base, loaded) or _is_unused(token, loaded, base)):
                raise GenarmError(
                    f"ARM {arm!r}: its tokenizer differs from the base's: "
                    f"token {token} is {own[token]!r}, not {names[0][token]!r}"
                )
        if differing:
            listed = ", ".join(f"{token} is {own[token]!r}, not {names[0][token]!r}" for token in differing[:3])
            _LOGGER.warning("ARM %r: %d reserved tokens differ from the base's: %s", arm, len(differing), listed)
    return shared


def embeddings(model: Any) -> int:
    """How many different tokens the model can be given."""
    table = model.get_input_embeddings()
    return int(getattr(table, "num_embeddings", None) or table.weight.shape[0])


def twin(model: Any, own: Iterable[torch.Tensor] = ()) -> Any:
    """A copy whose modules can be replaced, and which shares every weight but those in `own`: it takes no memory."""
    copied = {id(one) for one in own}
    shared = [one for one in (*model.parameters(), *model.buffers()) if id(one) not in copied]
    # bitsandbytes keeps its 8-bit weights a second time.
    shared += [one.state for one in model.modules() if hasattr(one, "state") and id(one.weight) not in copied]
    return copy.deepcopy(model, {id(one): one for one in shared})


def adapter_config(source: str | Path, subfolder: str = "") -> Path | None:
    """The adapter_config.json of a folder or hub name, or of a subfolder in it; None where it holds no adapter."""
    if Path(source).is_dir():  # in which transformers before 5.18 looks for no subfolders
        found = Path(source, subfolder, "adapter_config.json")
        return found if found.is_file() else None
    cached = find_adapter_config_file(str(source), subfolder=subfolder)
    return Path(cached) if cached else None


def named_adapters(source: str | Path) -> list[str]:
    """A folder's subfolders that hold an adapter each, as PEFT saves adapters that have names."""
    return sorted(file.parent.name for file in Path(source).glob("*/adapter_config.json"))


def resolve_device(device: str) -> str:
    """ "auto" is a GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        accelerator, n = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
        found = ", ".join(["cpu", *(f"{accelerator}:{i}" for i in range(n))])
        raise GenarmError(f"device {device!r} cannot be used; torch {torch.__version__} finds: {found}") from error
    return device


def resolve_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """ "auto" (as the checkpoint has it), a torch dtype, or the name of one."""
    if dtype == "auto":
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if found not in OPERAND_DTYPES:
        raise GenarmError(f"dtype: expected 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
    return found


def check_exists(label: str, source: str | Path) -> None:
    """GenarmError unless the source is a folder, or a model of the hub or of its cache.

    The hub is asked once: transformers would ask six times, over 23 seconds, before it says that it cannot be reached.
    """
    name = str(source)
    if Path(source).is_dir():
        return
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise GenarmError(f"{label}: no such folder: {name!r}")
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "adapter_config.json")):
            return
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # whatever the network does, the way out is the same
        raise GenarmError(f"{label}: no such folder, and no such model on the hub: {name!r}") from error


def token_names(tokenizer: Any) -> dict[int, str]:
    """By id."""
    return {token: string for string, token in tokenizer.get_vocab().items()}


def _is_unused(token: int, here: LoadedModel, there: LoadedModel) -> bool:
    """Whether the one tokenizer reserves a token (or pads with it) that may have a use in the other."""
    tokenizers = (here.tokenizer, there.tokenizer)
    if not all(token in added_tokens(tokenizer) for tokenizer in tokenizers):
        return False
    if any(token in (one.bos_token_id, one.eos_token_id, one.unk_token_id) for one in tokenizers):
        return False
    return bool(_UNUSED.fullmatch(here.tokenizer.convert_ids_to_tokens(token)))


def _has_tokenizer(source: str | Path) -> bool:
    """Whether a folder holds one; True for what is no folder."""
    folder = Path(source)
    return not folder.is_dir() or any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def _width(model: Any) -> int:
    """Of the logits. By the layer's own count where it has one: int8 weights are no tensor."""
    head = model.get_output_embeddings()
    if head is None:
        return int(transformers_api.text_config(model).vocab_size)
    return int(getattr(head, "out_features", None) or head.weight.shape[0])


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
