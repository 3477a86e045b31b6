"""Training an autoregressive reward model (ARM) on preference pairs, as in GenARM (arXiv 2410.08193)."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from ..arguments import integer, real
from ..errors import GenarmError
from ..locking import lock
from ..models import loading, transformers_api
from ..models.identity import identity
from ..models.transformers_api import Conv1D
from ..preferences.pairs import encode_preferences, read_preferences
from .objective import ArmTrainer


@contextmanager
def _writing_to(out: Path) -> Iterator[None]:
    """GenarmError for what cannot be written, by whichever library: above all on a full disk."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch has no exception of its own for a file that it cannot write; these words are in all that it raises then.
        words = ("PytorchStreamWriter", "inline_container", "iostream")
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in words):
            raise
        for checkpoint in out.glob("checkpoint-[0-9]*"):
            if not _complete(checkpoint):  # of no use, and it takes room
                shutil.rmtree(checkpoint, ignore_errors=True)
        why = getattr(error, "strerror", None) or loading.first_line(error)
        if isinstance(error, RuntimeError):
            why = f"the disk may be full ({why})"
        raise GenarmError(f"{out}: cannot be written to: {why}; make room and go on by --resume") from error


class _Progress(TrainerCallback):
    """About twenty lines a run instead of a line per step."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        if "loss" in logs and state.global_step % math.ceil(state.max_steps / 20) == 0:
            self.console.print(f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}")


@contextmanager
def _progress_bars_only_on_a_terminal() -> Iterator[None]:
    bars = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


@_progress_bars_only_on_a_terminal()
def train_arm(
    base: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    lora_r: int = 8,
    beta: float = 0.05,
    lr: float = 5e-4,
    epochs: float = 1,
    batch_size: int = 32,
    max_length: int = 1024,
    eval_fraction: float = 0.05,
    resume: bool = False,
    lora_alpha: int | None = None,
    lora_dropout: float = 0.05,
    warmup_steps: int | None = None,
    gradient_accumulation_steps: int = 1,
    save_steps: int | None = None,
    bf16: bool = False,
    seed: int = 0,
    verbose: bool = True,
    objective: str | None = None,
    strict: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train an ARM on preference pairs by minimising GenARM's objective (arXiv 2410.08193), ``preference_loss``.

    The defaults are the paper's for HH-RLHF: LoRA of rank 8 on all linear layers, beta 0.05, learning rate 5e-4
    (cosine, 100 steps of warm-up), one epoch of batches of 32 pairs.

    Args:
        base: folder or hub name of the causal language model to start from, with its tokenizer.
        data: preferences in one of many formats, see ``genarm.preferences.read_preferences``: a file, a folder, or a
            data set on the hub such as "Anthropic/hh-rlhf" or "PKU-Alignment/PKU-SafeRLHF:train".
        out: folder for the result; it must be empty or new, or with ``resume`` hold the run to go on with. It is locked
            meanwhile: a second training in it is refused.
        lora_r: rank of the adapter; 0 trains all the weights.
        beta: scale from nats to the logit of the preference.
        batch_size: pairs per optimiser step, all accumulation steps together.
        max_length: tokens of prompt and response; ``genarm.preferences.encode_preferences`` says what is cut.
        eval_fraction: fraction of rows, drawn at random by ``seed``, that is held out: at least one row, or 0 for none.
        resume: go on from the last checkpoint in ``out``; the loss curve is that of an uninterrupted run. A finished
            run returns its metrics; a folder without a checkpoint starts from scratch.
        lora_alpha: scale of the adapter; 2 * ``lora_r`` if not given.
        warmup_steps: 100 if not given, but 10 % of the steps at most.
        gradient_accumulation_steps: forward passes that a batch is split into, to save memory.
        save_steps: steps between checkpoints; about ten a run if not given. The last two are kept until success.
        bf16: compute in bfloat16; the weights stay float32, but for those that LoRA freezes.
        seed: of the held-out rows, the adapter's initialisation, the order of the pairs and dropout.
        verbose: print progress and a summary to stdout.
        objective: "better" or "safer", for data that have a label for each.
        strict: refuse data that have rows which nothing can be learned from, instead of leaving them out.
        dry_run: print three examples with the tokens that carry loss, whatever ``verbose`` is, and train nothing;
            ``out`` is not touched.

    Returns:
        The metrics, also in ``out/metrics.json``. On the held-out pairs: ``eval_loss``; ``preference_accuracy``, the
        fraction with log pi_r(y_w | x) > log pi_r(y_l | x); ``reward_margin_nats``, the mean difference of the two;
        ``reward_margin``, beta times that, dimensionless. Besides: ``train_loss`` (mean over all steps), ``steps``,
        ``train_pairs``, ``eval_pairs``, ``prompts_truncated`` out of ``prompts``, ``responses_truncated`` out of
        ``responses``, ``dropped_...`` by reason where rows were left out. Of a dry run: the counts alone.

        ``out`` gets the adapter (or model) and tokenizer, ``log.jsonl`` with the loss of each step, and ``run.json``
        with the settings.

    Raises:
        GenarmError: a setting, the data, the base or ``out`` cannot be used (before training starts), the run in
            ``out`` has other settings, data or another base, a loss is not finite, or the disk is full. The last
            whole checkpoint is then kept.

    >>> train_arm("path/to/base", "prefs.jsonl", "arm", epochs=3)["preference_accuracy"]  # doctest: +SKIP
    0.71
    """
    settings: dict[str, Any] = {
        "base": str(base),
        "base_identity": "",
        "data_sha256": "",
        "objective": objective,
        "lora_r": lora_r,
        "lora_alpha": 2 * lora_r if lora_alpha is None else lora_alpha,
        "lora_dropout": lora_dropout,
        "beta": beta,
        "lr": lr,
        "epochs": epochs,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "warmup_steps": warmup_steps,
        "max_length": max_length,
        "eval_fraction": eval_fraction,
        "bf16": bf16,
        "seed": seed,
    }
    _check_settings(settings, save_steps)
    for package in ["accelerate", *(["peft"] if lora_r else [])]:
        if find_spec(package) is None:
            raise GenarmError(f"training needs {package}: {loading.INSTALL_TRAIN}")

    console = Console(quiet=not verbose, highlight=False, markup=False, soft_wrap=True)
    loading.load_config("base", base)
    tokenizer = loading.load_tokenizer("base", base)
    rows = read_preferences(data, objective=objective, strict=strict)
    console.print(f"{data}: {rows.summary()}")
    if dry_run:
        pairs, counts = encode_preferences(rows, tokenizer, max_length, strict=strict)
        _print_examples(pairs, counts, tokenizer)
        return dict(counts)
    settings |= {"base_identity": identity(base), "data_sha256": rows.sha256()}
    out = Path(out)
    with ExitStack() as held:
        new = not _lock_folder(out, held)
        checkpoint = _open_run(out, settings, resume)
        if resume and (out / "metrics.json").exists():
            console.print(f"{out}: the run is finished")
            _remove_checkpoints(out)
            return json.loads((out / "metrics.json").read_text())
        if resume:
            console.print(f"going on from {checkpoint}" if checkpoint else f"{out}: no checkpoint yet, starting anew")

        pairs, counts = encode_preferences(rows, tokenizer, max_length, strict=strict)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = max(1, round(eval_fraction * len(pairs))) if eval_fraction else 0
        if held_out >= len(pairs):
            raise GenarmError(f"{data}: {len(pairs)} rows, of which {held_out} are held out, leave none to train on")
        eval_pairs, train_pairs = [pairs[i] for i in order[:held_out]], [pairs[i] for i in order[held_out:]]
        console.print(f"{len(train_pairs)} pairs to train on, {len(eval_pairs)} held out")
        console.print(
            "truncated to {}: {prompts_truncated} of {prompts} prompts, {responses_truncated} of {responses} "
            "responses".format(max_length, **counts)
        )
        if same := counts.get("dropped_equal_tokens"):
            console.print(f"left out: {same} pairs whose responses are equal as tokens")

        set_seed(seed)  # the adapter's initialisation
        dtype = torch.bfloat16 if bf16 and lora_r else torch.float32
        model = loading.load_model("base", base, dtype)
        _check_fits(model, pairs)
        use_cache = model.config.use_cache  # the Trainer switches it off, and decoding would find it off
        if lora_r:
            model = _with_lora(model, settings, console)

        held.enter_context(_writing_to(out))
        out.mkdir(parents=True, exist_ok=True)
        if new and (not _lock_folder(out, held) or any(out.iterdir())):
            raise GenarmError(f"{out}: another training has begun there meanwhile; choose another folder")
        _write_json(out / "run.json", settings)
        steps = math.ceil(epochs * math.ceil(len(train_pairs) / batch_size))
        arguments = TrainingArguments(
            output_dir=str(out),
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, steps // 10) if warmup_steps is None else warmup_steps,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size // gradient_accumulation_steps,
            per_device_eval_batch_size=batch_size // gradient_accumulation_steps,
            gradient_accumulation_steps=gradient_accumulation_steps,
            bf16=bf16,
            use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused there
            seed=seed,
            save_strategy="steps",
            save_steps=math.ceil(steps / 10) if save_steps is None else save_steps,
            save_total_limit=2,
            logging_steps=1,
            logging_nan_inf_filter=False,  # it would replace a NaN by the mean of the losses before
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        arguments._n_gpu = 1  # on more the Trainer would use DataParallel and multiply the batch size
        trainer = ArmTrainer(
            beta=beta, model=model, args=arguments, train_dataset=train_pairs, eval_dataset=eval_pairs or None
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Progress(console))
        trainer.train(resume_from_checkpoint=checkpoint)

        curve = [entry for entry in trainer.state.log_history if "loss" in entry]  # since step 1, resumed or not
        metrics: dict[str, Any] = {"train_loss": sum(one["loss"] for one in curve) / len(curve), "steps": len(curve)}
        metrics |= {"train_pairs": len(train_pairs), "eval_pairs": len(eval_pairs), **counts}
        if eval_pairs:
            metrics |= trainer.held_out_metrics()
        model.config.use_cache = use_cache
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        (out / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in curve))
        _write_json(out / "metrics.json", metrics)  # last: it marks the run as finished
        _remove_checkpoints(out)
    table = Table("metric", "value", title=f"ARM in {out}")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
    return metrics


def _with_lora(model: Any, settings: Mapping[str, Any], console: Console) -> Any:
    from peft import LoraConfig, get_peft_model

    layers = _adaptable(model)
    if not layers:
        raise GenarmError("base: it has no linear layers that take a LoRA; train all its weights with --lora-r 0")
    share = sum(model.get_submodule(name).weight.numel() for name in layers) / model.num_parameters()
    rank = settings["lora_r"]
    console.print(f"LoRA of rank {rank} on {len(layers)} linear layers, which hold {share:.0%} of the weights")
    lora = LoraConfig(
        r=rank,
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules=layers,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


# By these names PEFT means the experts of a mixture, which transformers holds as parameters: their LoRA takes no
# dropout, and it would put one on them for a layer beside them that has such a name.
_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def _adaptable(model: Any) -> list[str]:
    """The linear layers but for the head; PEFT's "all-linear" takes more, and fails on them."""
    mixture = any("experts" in name and parameter.dim() == 3 for name, parameter in model.named_parameters())
    left_out = {model.get_output_embeddings()}
    for mixer in model.modules():
        if hasattr(mixer, "A_log"):  # Mamba's: its kernels read this weight past any adapter, so PEFT refuses it
            left_out.add(getattr(mixer, "out_proj", None))
    # A subclass is a linear layer if it calls itself one; a router returns more than a product.
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and (isinstance(module, Conv1D) or "Linear" in type(module).__name__)
        and module not in left_out
        and not (mixture and name.rpartition(".")[2] in _EXPERTS)
    ]


def _print_examples(pairs: list[dict[str, list[int]]], counts: Mapping[str, int], tokenizer: Any) -> None:
    """The first three pairs, with the tokens that carry loss in brackets, and on a terminal in colour."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(", ".join(f"{name} {count}" for name, count in counts.items()))
    console.print("[in brackets]: the tokens that carry loss", style="bold")
    for i, pair in enumerate(pairs[:3], start=1):
        console.print(f"--- example {i} of {len(pairs)}", style="bold")
        console.print("prompt:   " + _quoted(tokenizer.decode(pair["prompt"], clean_up_tokenization_spaces=False)))
        for key in ("chosen", "rejected"):
            line = Text(f"{key + ':':<10}")
            for piece in _pieces(pair["prompt"], pair[key], tokenizer):
                line.append(f"[{_quoted(piece)}]", "green" if key == "chosen" else "red")
            console.print(line)


def _quoted(text: str) -> str:
    """With line breaks and the like spelt out, as in JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _pieces(prompt: list[int], response: list[int], tokenizer: Any) -> Iterator[str]:
    """The text of each token of the response; of several together where a character is spread over them."""
    ids, shown = prompt + response, len(prompt)
    for end in range(shown + 1, len(ids) + 1):
        # A few tokens before, since a tokenizer may treat the first of a text specially.
        start = max(0, shown - 4)
        before, now = (tokenizer.decode(ids[start:i], clean_up_tokenization_spaces=False) for i in (shown, end))
        if not now.endswith("\ufffd") or end == len(ids):
            yield now[len(before) :]
            shown = end


def _check_settings(settings: dict[str, Any], save_steps: int | None) -> None:
    at_least = {"lora_r": 0, "lora_alpha": 0, "batch_size": 1, "gradient_accumulation_steps": 1, "max_length": 2}
    at_least |= {"warmup_steps": 0, "save_steps": 1, "seed": 0}
    for name, least in at_least.items():
        value = save_steps if name == "save_steps" else settings[name]
        if value is not None:
            value = integer(name, value, least, 2**32 if name == "seed" else None)  # NumPy takes no larger seed
        if name in settings:
            settings[name] = value
    for name in ("beta", "lr", "epochs"):
        settings[name] = real(name, settings[name], above=0)
    for name in ("eval_fraction", "lora_dropout"):
        settings[name] = real(name, settings[name], 0, below=1)
    if settings["batch_size"] % settings["gradient_accumulation_steps"]:
        raise GenarmError("batch_size must be a multiple of gradient_accumulation_steps")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise GenarmError("training runs in one process on one device; start it without torchrun")


def _lock_folder(out: Path, held: ExitStack) -> bool:
    """Whether the folder is there. It is then locked, until `held` is closed or the process ends."""
    if not out.is_dir():
        return False
    try:
        descriptor = os.open(out, os.O_RDONLY)
    except OSError:
        return True  # on Windows; or it cannot be read, as is said where it is read
    held.callback(os.close, descriptor)
    try:
        lock(descriptor)
    except BlockingIOError as error:
        raise GenarmError(f"{out}: another training runs in this folder; choose another --out") from error
    return True


def _open_run(out: Path, settings: dict[str, Any], resume: bool) -> str | None:
    """Check the folder of a run, or where it is to be made; the last complete checkpoint in it, if any."""
    try:
        there = next(path for path in (out, *out.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise GenarmError(f"{there}: is not a folder that can be written to")
        if there != out or not any(out.iterdir()):
            return None
    except OSError as error:
        raise GenarmError(f"{out}: cannot be read: {error.strerror}") from error
    if not (out / "run.json").exists():
        raise GenarmError(f"{out}: is not empty and holds no training run; choose another folder")
    if not resume:
        raise GenarmError(f"{out}: holds a training run; go on with it by --resume, or choose another folder")
    before = json.loads((out / "run.json").read_text())
    if other := [
        f"{name} was {before.get(name)}, is {new}"
        for name, new in settings.items()
        if name != "base" and before.get(name) != new  # the base may have moved; what it is, is its identity
    ]:
        raise GenarmError(f"{out}: holds a run with other settings: {'; '.join(other)}")
    steps = sorted((int(path.name.split("-")[1]) for path in out.glob("checkpoint-[0-9]*")), reverse=True)
    return next((str(path) for step in steps if _complete(path := out / f"checkpoint-{step}")), None)


def _complete(checkpoint: Path) -> bool:
    """Whether the run was not killed while it wrote this: the Trainer writes trainer_state.json last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def _remove_checkpoints(out: Path) -> None:
    for path in out.glob("checkpoint-[0-9]*"):
        shutil.rmtree(path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Atomically, since both files are also marks of how far a run came."""
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(value, indent=2) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _check_fits(model: Any, pairs: list[dict[str, list[int]]]) -> None:
    """The tokenizer's ids and the sequences' lengths against the model, which would fail obscurely in training."""
    sequences = [pair["prompt"] + pair[key] for pair in pairs for key in ("chosen", "rejected")]
    size, largest = model.get_input_embeddings().num_embeddings, max(map(max, sequences))
    if largest >= size:
        raise GenarmError(f"the tokenizer has the token {largest}, but the model only {size} tokens")
    limit, longest = transformers_api.max_positions(model), max(map(len, sequences))
    if limit and longest > limit:
        raise GenarmError(f"a sequence has {longest} tokens, but the model takes {limit}; lower --max-length")
