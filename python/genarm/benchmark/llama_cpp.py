"""llama.cpp on the same weights, by llama-cpp-python: a baseline of `genarm bench` on a CPU.

Each model is written to a GGUF file in its own precision and runs in a context of its own, with a KV cache for every
prompt. The ARMs' log-probabilities are added to the base's in llama.cpp's own buffer of logits, where its sampler chain
finds them: the same loop decodes the base alone.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import GenarmError

INSTALL = "pip install llama-cpp-python gguf (compiled for the machine, in ten minutes)"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen3": "qwen3"}
"""transformers' names of models, and llama.cpp's."""


@contextmanager
def generation(
    models: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    temperature: float,
    top_p: float,
    quantize: bool = False,
) -> Iterator[Callable[[int], list[list[int]]]]:
    """A function that continues the prompts, given as token ids, by up to `new_tokens` tokens.

    `models`: the base, then the ARMs, each of weight 1. `quantize`: in llama.cpp's Q8_0.

    Raises:
        GenarmError: packages that are not installed, models that are not on a CPU or that llama.cpp does not know.
    """
    if models[0].device.type != "cpu":
        raise GenarmError(f"llama.cpp is measured on a CPU only: expected device cpu, got {models[0].device}")
    api = _package("llama_cpp")
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # what fails is said below
    api.llama_backend_init()
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        contexts = []
        for i, model in enumerate(models):
            write_gguf(model, folder / f"{i}.gguf", quantize)
            contexts.append(_Context(api, stack, folder / f"{i}.gguf", model, prompts, new_tokens))
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        stack.callback(api.llama_sampler_free, chain)  # and the samplers in it
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(temperature))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_p(top_p, 1))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(0))
        # Threads of PyTorch's that wait for its next operation would take the cores from llama.cpp's.
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, threads)

        def generate(new: int) -> list[list[int]]:
            for context in contexts:
                context.clear()
            rows = prompts
            tokens: list[list[int]] = [[] for _ in prompts]
            for _ in range(new):
                base, *arms = [context.decode(rows) for context in contexts]
                if arms:
                    base[:] = sum((arm.log_softmax(1) for arm in arms), base.log_softmax(1))
                # Outputs counted from the last: the i-th from the front is the i-th token fed, not the i-th row.
                drawn = [api.llama_sampler_sample(chain, contexts[0].handle, b) for b in range(-len(rows), 0)]
                rows = [[token] for token in drawn]
                for row, token in zip(tokens, drawn, strict=True):
                    row.append(token)
            return tokens

        yield generate


class _Context:
    """A GGUF file in llama.cpp, freed with `stack`: the weights, and a KV cache for every prompt."""

    def __init__(
        self, api: Any, stack: ExitStack, path: Path, model: Any, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> None:
        self._api = api
        self._shape = (len(prompts), model.config.vocab_size)
        options = api.llama_model_default_params()
        options.n_gpu_layers = 0
        weights = api.llama_model_load_from_file(bytes(path), options)
        if not weights:
            raise GenarmError(f"llama.cpp cannot load {type(model).__name__} as it was written")
        stack.callback(api.llama_model_free, weights)
        fed = sum(map(len, prompts))
        options = api.llama_context_default_params()
        options.n_seq_max = len(prompts)
        options.n_ctx = len(prompts) * (max(map(len, prompts)) + new_tokens)
        options.n_batch = fed
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.op_offload = False
        if model.dtype == torch.float32:  # llama.cpp's cache is float16 otherwise, and so is its flash attention
            options.type_k = options.type_v = api.GGML_TYPE_F32
            options.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.handle = api.llama_init_from_model(weights, options)
        if not self.handle:
            raise GenarmError(f"llama.cpp gives no context for {len(prompts)} prompts")
        stack.callback(api.llama_free, self.handle)
        self._batch = api.llama_batch_init(fed, 0, 1)
        stack.callback(api.llama_batch_free, self._batch)
        self.clear()

    def clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self.handle), False)
        self._lengths = [0] * self._shape[0]

    def decode(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits `[B, V]` after each row's further tokens, in llama.cpp's own memory."""
        batch, i = self._batch, 0
        for sequence, row in enumerate(rows):
            for position, token in enumerate(row, self._lengths[sequence]):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, 0
                batch.seq_id[i][0] = sequence
                i += 1
            batch.logits[i - 1] = 1
            self._lengths[sequence] += len(row)
        batch.n_tokens = i
        if status := self._api.llama_decode(self.handle, batch):
            raise GenarmError(f"llama_decode gives {status}")
        return torch.from_numpy(np.ctypeslib.as_array(self._api.llama_get_logits(self.handle), self._shape))


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise GenarmError(f"llama.cpp: {error}: {INSTALL}") from error


def write_gguf(model: Any, path: Path, quantize: bool = False) -> None:
    """The model's weights in its own precision, a LoRA adapter merged into them; norms in float32, as llama.cpp wants.

    Without a tokenizer: llama.cpp is fed token ids.
    """
    gguf = _package("gguf")
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    config = model.config
    rotary = getattr(config, "rope_parameters", {})
    if config.model_type not in ARCHITECTURES or rotary["rope_type"] != "default":
        known = f"{', '.join(ARCHITECTURES)} with plain rotary embeddings"
        raise GenarmError(f"llama.cpp: expected a model of {known}, got {config.model_type} ({rotary or 'none'})")
    architecture = ARCHITECTURES[config.model_type]
    kinds = gguf.GGMLQuantizationType
    own = {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}[model.dtype]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    known_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # a tied head is not among them, nor wanted
        x = parameter.detach().float()
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            # Its rotary embedding turns neighbours, transformers' the two halves of a head.
            x = x.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2)
        kind = kinds.F32 if x.ndim == 1 else kinds.Q8_0 if quantize else own
        data = gguf.quants.quantize(x.contiguous().numpy(), kind)
        writer.add_tensor(known_names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
