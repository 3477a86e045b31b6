"""Tokens/s of guided decoding, against what people run today and against the machine's own floor: `genarm bench`.

A method decodes the same prompts to T tokens and to one; a step is the difference over T - 1, the time to the first
token the run of one. The floor of a step is what its weights take to be read once: every weight but input embeddings
that the head does not share, over the read bandwidth measured in the same run.
"""

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ..decoding.decoder import GuidedDecoder
from ..decoding.forwards import PlainForward, StaticForward
from ..decoding.provision import ModelPath
from ..errors import GenarmError
from ..models import adapters, loading
from . import llama_cpp, naive, report
from .machine import machine, read_bandwidth

LLAMA_2 = {"model_type": "llama", "vocab_size": 32000}
LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "rope_theta": 500000.0}
QWEN_3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-58m": LLAMA_2 | _sizes(512, 1408, 8, 8),
    "llama-271m": LLAMA_2 | _sizes(1024, 2816, 16, 16),
    "llama-1b": LLAMA_3 | _sizes(2048, 8192, 16, 32) | {"tie_word_embeddings": True},
    "llama-7b": LLAMA_2 | _sizes(4096, 11008, 32, 32),
    "llama-8b": LLAMA_3 | _sizes(4096, 14336, 32, 32),
    "mistral-7b": LLAMA_2 | _sizes(4096, 14336, 32, 32) | {"num_key_value_heads": 8, "sliding_window": None}
    | {"model_type": "mistral"},
    "qwen3-0.6b": QWEN_3 | _sizes(1024, 3072, 28, 16) | {"tie_word_embeddings": True},
    "qwen3-8b": QWEN_3 | _sizes(4096, 12288, 36, 32),
    "gpt2": {"model_type": "gpt2", "max_position_embeddings": 1024},
}  # fmt: skip
"""Models by shape, with random weights; an ARM takes its base's vocabulary."""

METHODS = {
    "transformers": "generate of the base alone: the price of no guidance",
    "naive": "generate with a LogitsProcessor that runs the ARMs",
    "paper": "the paper's own loop, where model_arithmetic is installed; models in folders",
    "base": "genarm without ARMs",
    "genarm": "genarm",
    "no-graph": "genarm, cuda_graph=False",
    "no-streams": "genarm, streams=False",
    "neither": "genarm, cuda_graph=False, streams=False",
    "separate": "genarm, share_weights=False",
    "compile": "genarm, compile=True",
    "torch-linear": "genarm, linear='torch'",
    "int8": "genarm, quantize='int8'",
    "int8-base": "genarm without ARMs, quantize='int8'",
    "llama.cpp": "llama.cpp, where llama-cpp-python is installed: a context for each model; CPU",
    "llama.cpp-base": "llama.cpp without ARMs",
    "llama.cpp-int8": "llama.cpp in its Q8_0",
}
DEFAULT_METHODS = ("transformers", "naive", "base", "genarm")
# Loops that wait for the host at every step run to fewer tokens: their steps cost the same, and take long.
SLOW, SLOW_TOKENS = ("transformers", "naive", "paper"), 64
OTHERS = (*SLOW, "llama.cpp", "llama.cpp-base", "llama.cpp-int8")
"""Loops that are not ours."""
ALONE = ("transformers", "base", "int8-base", "llama.cpp-base")
"""Methods without ARMs."""
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9}


@dataclass(frozen=True)
class Measurement:
    """One method at one batch size; medians of the rounds."""

    method: str
    batch: int
    new_tokens: int
    step_ms: float
    tokens_per_second: float
    """Of the steps after the first token, all rows together."""
    first_token_ms: float
    percent_of_floor: float
    """The floor of a step over its time."""
    memory_gib: float
    """The device's peak in the method's runs; on a CPU what the process holds after them."""
    outside_percent: float | None
    """CPU: of a step, the time outside of the models' forwards."""
    synchronisations: float | None
    """GPU: how often the host waits for the device, per token."""
    paths: list[ModelPath] | None
    """How each model was run, base first; None for the loops of others."""


def bench(
    base: str = "llama-271m",
    arms: Sequence[str] = ("llama-58m",),
    *,
    batches: Sequence[int] = (1, 8),
    prompt_tokens: int = 128,
    new_tokens: int = 256,
    methods: Sequence[str] = DEFAULT_METHODS,
    rounds: int = 3,
    device: str = "auto",
    dtype: str = "bfloat16",
    allow_plain: bool = False,
    out: Path | None = None,
    console: Console | None = None,
) -> list[Measurement]:
    """Measures, prints as it goes, and writes `tokens_per_second-BASE+ARM.json` and `.png` into `out`.

    `base` and `arms`: folders, hub names, or shapes of `SHAPES`; an ARM also "lora" or "lora:RANK", an adapter on all
    linear layers of the base. `allow_plain`: measure models without static caches too.

    Raises:
        GenarmError: an unknown method, a model that cannot be loaded or has no static caches, a device that cannot be
            used.
    """
    console = console or Console()
    for method in methods:
        if method not in METHODS:
            raise GenarmError(f"no method is called {method!r}; there are {', '.join(METHODS)}")
    device = loading.resolve_device(device)
    bench_ = _Bench(base, arms, device, loading.resolve_dtype(dtype), prompt_tokens, new_tokens, rounds)
    if not allow_plain and not set(methods) <= set(OTHERS):
        try:
            bench_.require_fast_path()
        except GenarmError as error:
            raise GenarmError(f"{error}; --allow-plain measures all the same") from error
    environment = {**machine(device), "read_gb_s": round(read_bandwidth(device), 1)}
    floor_ms = bench_.floor_bytes / environment["read_gb_s"] / 1e6
    about = {
        **environment,
        "base": base,
        "arms": list(arms),
        "dtype": dtype,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "sampling": SAMPLING,
        "floor_ms": round(floor_ms, 3),
        "floor_ms_base_alone": round(bench_.floor_bytes_of("base") / environment["read_gb_s"] / 1e6, 3),
    }
    console.print(
        f"{base} guided by {', '.join(arms) or 'nothing'}, {dtype}, {environment['device']}, {environment['machine']}: "
        f"weights of {bench_.floor_bytes / 1e9:.2f} GB at {environment['read_gb_s']:.1f} GB/s, a floor of "
        f"{floor_ms:.2f} ms per step"
    )
    results, failed = [], None
    for batch in batches:
        for method in methods:
            try:
                found = bench_.measure(method, batch, environment["read_gb_s"])
            except Exception as error:  # other people's loops raise what they like; the rest is measured
                if method not in OTHERS and not isinstance(error, (GenarmError, torch.OutOfMemoryError)):
                    failed = failed or error
                console.print(f"{method}, batch {batch}: not measured: {loading.first_line(error)}")
                continue
            results.append(found)
            how = "".join(f"; {path.model}: {path}" for path in found.paths or ())
            console.print(f"{method}, batch {batch}: {found.step_ms:.2f} ms a step{how}", style="dim")
    console.print(report.table(results))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = "+".join(Path(one.replace(":", "-")).name for one in (base, *arms))
        path = out / f"tokens_per_second-{name}.json"
        path.write_text(json.dumps({**about, "results": [asdict(one) for one in results]}, indent=1) + "\n")
        console.print(f"{path} written")
        try:
            report.chart(results, about, path.with_suffix(".png"))
        except ImportError as error:
            console.print(f"no chart: {error}")
    if failed is not None:  # of ours: what was measured is kept, but nobody is to overlook it
        raise failed
    return results


class _Bench:
    """The models, the prompts, and how each method decodes them."""

    def __init__(
        self, base: str, arms: Sequence[str], device: str, dtype: Any, prompt_tokens: int, new_tokens: int, rounds: int
    ) -> None:
        self._sources = (base, *arms)
        self._device = torch.device(device)
        self._new_tokens = new_tokens
        self._rounds = rounds
        loaded = _load(base, device, dtype)
        self._base, self._tokenizer = loaded
        if self._tokenizer.pad_token is None:  # generate pads
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._base.generation_config.eos_token_id = None  # every run makes all its tokens
        self._arms = {
            f"arm{i}": _load_arm(f"arm{i}", source, loaded, device, dtype, seed=i) for i, source in enumerate(arms, 1)
        }
        self._prompts = _prompts(self._tokenizer, prompt_tokens)

    def require_fast_path(self) -> None:
        """Otherwise a figure of the plain loop would pass for one of the engine's."""
        GuidedDecoder(self._base, self._tokenizer, self._arms).require_fast_path()

    @property
    def floor_bytes(self) -> int:
        return self.floor_bytes_of("genarm")

    def floor_bytes_of(self, method: str) -> int:
        """Weights that a step of the method has to read: an adapter's base is read once, unless it runs apart."""
        seen: dict[int, int] = {}
        for copy, model in enumerate([self._base, *([] if method in ALONE else self._arms.values())]):
            tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
            skipped = set() if tied else {id(x) for x in model.get_input_embeddings().parameters()}
            for parameter in model.parameters():
                if id(parameter) not in skipped:
                    key = id(parameter) + (copy << 64 if method == "separate" else 0)
                    int8 = "int8" in method and parameter.dim() == 2
                    seen[key] = parameter.numel() if int8 else parameter.nbytes
        return sum(seen.values())

    def measure(self, method: str, batch: int, read_gb_s: float) -> Measurement:
        new = min(self._new_tokens, SLOW_TOKENS) if method in SLOW else self._new_tokens
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
        with self._run(method, batch) as (run, decoder):
            run(2)  # compiles, allocates
            run(new)  # and captures every CUDA graph
            times = [(self._seconds(run, 1), self._seconds(run, new)) for _ in range(self._rounds)]
            first = statistics.median(one for one, _ in times)
            step = statistics.median((all_ - one) / (new - 1) for one, all_ in times)
            outside = synchronisations = None
            if decoder is not None and self._device.type == "cpu" and method != "compile":
                outside = _outside(decoder, lambda: run(max(8, min(new, 64))))
            if decoder is not None and self._device.type == "cuda":
                synchronisations = (_waits(lambda: run(64)) - _waits(lambda: run(32))) / 32
            memory = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _resident()
        return Measurement(
            method=method,
            batch=batch,
            new_tokens=new,
            step_ms=round(1e3 * step, 4),
            tokens_per_second=round(batch / step, 2),
            first_token_ms=round(1e3 * first, 3),
            percent_of_floor=round(self.floor_bytes_of(method) / read_gb_s / 1e9 / step * 100, 1),
            memory_gib=round(memory / 2**30, 2),
            outside_percent=outside,
            synchronisations=synchronisations,
            paths=None if decoder is None else decoder.paths,
        )

    def _seconds(self, run: Callable[[int], object], new: int) -> float:
        start = time.perf_counter()
        run(new)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    @contextmanager
    def _run(self, method: str, batch: int) -> Iterator[tuple[Callable[[int], object], GuidedDecoder | None]]:
        """A function that decodes `batch` prompts to so many tokens, and the decoder of ours that it calls."""
        prompts = [self._prompts[b % len(self._prompts)] for b in range(batch)]
        own_arms = {} if method in ALONE else self._arms
        if method in ("transformers", "naive"):
            arms = None if method == "transformers" else dict.fromkeys(self._arms.values(), 1.0)
            yield lambda new: naive.generate(self._base, self._tokenizer, prompts, arms, new, top_k=0, **SAMPLING), None
        elif method == "paper":
            yield self._paper(prompts), None
        elif method.startswith("llama.cpp"):
            ids = self._tokenizer(prompts)["input_ids"]
            models_, int8 = [self._base, *own_arms.values()], "int8" in method
            with llama_cpp.generation(models_, ids, self._new_tokens, **SAMPLING, quantize=int8) as run:
                yield run, None
        else:
            every: dict[str, dict[str, Any]] = {
                "no-graph": {"cuda_graph": False},
                "no-streams": {"streams": False},
                "neither": {"cuda_graph": False, "streams": False},
                "separate": {"share_weights": False},
                "compile": {"compile": True},
                "torch-linear": {"linear": "torch"},
                "int8": {"quantize": "int8"},
                "int8-base": {"quantize": "int8"},
            }
            options = every.get(method, {})
            decoder = GuidedDecoder(self._base, self._tokenizer, own_arms, **options)
            weights = dict.fromkeys(own_arms, 1.0)
            yield (
                lambda new: decoder.generate(
                    prompts, weights=weights, max_new_tokens=new, batch_size=batch, temperature=0.7, top_p=0.9
                ),
                decoder,
            )

    def _paper(self, prompts: Sequence[str]) -> Callable[[int], object]:
        """language-model-arithmetic (Dekoninck et al. 2024), of which the paper's code is a fork: it loads by name."""
        import inspect

        from model_arithmetic import ModelArithmetic, PromptedLLM

        if not all(Path(source).is_dir() for source in self._sources):
            raise GenarmError("the paper's loop takes models in folders")
        llms = [PromptedLLM("", model=name, prompt_template=lambda _, text: text) for name in self._sources]
        arithmetic = ModelArithmetic(sum(llms[1:], llms[0]), dtype=self._base.dtype)
        takes = inspect.signature(arithmetic.generate_text).parameters
        limit = "max_new_tokens" if "max_new_tokens" in takes else "max_length"
        options = {"batch_size": len(prompts), "do_speculation": False, "top_k": 0, **SAMPLING}
        return lambda new: arithmetic.generate_text(list(prompts), **{limit: new}, **options)


def _load(source: str, device: str, dtype: Any) -> loading.LoadedModel:
    if source not in SHAPES:
        return loading.load_base(source, None, device, dtype)
    model = _random(SHAPES[source], device, dtype, seed=0)
    # A word a token: as many as the model has, so that prompts of any length can be made.
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return loading.LoadedModel(model, PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0"))


def _load_arm(name: str, source: str, base: loading.LoadedModel, device: str, dtype: Any, seed: int) -> Any:
    if source in SHAPES:
        return _random(SHAPES[source] | {"vocab_size": base.model.config.vocab_size}, device, dtype, seed)
    kind, _, rank = source.partition(":")
    if kind != "lora":
        return adapters.load_arm(name, source, base, None, device, dtype).model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise GenarmError(f"{source}: an adapter needs PEFT: {loading.INSTALL_TRAIN}") from error
    config = LoraConfig(r=int(rank or 8), target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(loading.twin(base.model), config).eval()


def _random(shape: Mapping[str, Any], device: str, dtype: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{"max_position_embeddings": 4096, **shape})
    options = {} if dtype == "auto" else {"dtype": dtype}
    with torch.device(device):  # where random numbers are made fast
        return AutoModelForCausalLM.from_config(config, **options).eval()


def _prompts(tokenizer: Any, length: int) -> list[str]:
    """Texts of `length` tokens, no two alike."""
    words = [word for word in tokenizer.get_vocab() if word.isascii() and word.isalnum()]
    prompts = []
    for start in range(8):
        text = " ".join(words[(start * length + i) % len(words)] for i in range(length))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        prompts.append(tokenizer.decode(ids))
    return prompts


def _outside(decoder: GuidedDecoder, run: Callable[[], object]) -> float:
    """Percent of the time of decoding, from the second step on, that no model's forward takes."""
    spans: list[tuple[float, float]] = []

    def timed(step: Any) -> Any:
        def call(*args: Any) -> Any:
            begun = time.perf_counter()
            logits = step(*args)
            spans.append((begun, time.perf_counter()))
            return logits

        return call

    kinds: tuple[Any, ...] = (StaticForward, PlainForward)
    own = [kind.step for kind in kinds]
    try:
        for kind, step in zip(kinds, own, strict=True):
            kind.step = timed(step)
        run()
    finally:
        for kind, step in zip(kinds, own, strict=True):
            kind.step = step
    each = sum(not path.shared for path in decoder.paths)
    # From the second step's first forward to the last step's: as many loops as there are forwards.
    spans = spans[each:]
    whole = spans[-each][0] - spans[0][0]
    inside = sum(end - start for start, end in spans[:-each])
    return round(100 * (1 - inside / whole), 2)


def _waits(run: Callable[[], object]) -> int:
    """How often the host waited for the device, as the profiler saw it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    calls = "StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "CtxSynchronize", "Memcpy"
    waiting = {f"{api}{call}" for api in ("cuda", "cu") for call in calls}
    return sum(event.count for event in profiler.key_averages() if event.key in waiting)


def _resident() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
