"""Builds the models that the package ships (`make models`); `genarm.bundled` says where they lie.

``base`` is a small Llama trained on the whole mixture of `genarm.world`; ``helpful`` and ``polite`` are autoregressive
reward models (ARMs) for its two attributes, with the same tokenizer.
"""

import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from genarm import world
from genarm.bundled import FOLDER, NAMES, SHIPPED
from genarm.training import train_arm

VOCABULARY = 1280
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'].capitalize() }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
BASE = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 5, "num_attention_heads": 4}
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4}
console = Console()


def _conversations(n: int, seed: int) -> list[list[dict[str, str]]]:
    prompts = world.sample_prompts(n, seed)
    answers = world.sample_responses(prompts, seed)
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens, trained on the mixture."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{m['role'].capitalize()}: {m['content']}" for c in _conversations(20_000, seed) for m in c)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True)),
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _batches(tokenizer: PreTrainedTokenizerFast, n: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    """``n`` batches of ``size`` fresh conversations, (size, longest) token ids, right-padded with -100."""
    rng = random.Random(seed)
    window = 50  # batches drawn and sorted by length at a time, to pad little
    for start in range(0, n, window):
        talks = _conversations(window * size, seed * n + start)
        rows = sorted((tokenizer.apply_chat_template(talk, return_dict=False) for talk in talks), key=len)
        cuts = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(cuts)
        for cut in cuts[: n - start]:
            yield torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in cut], True, -100)


def _loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    # padding comes last, where causal attention needs no mask; -100 is not counted
    return model(input_ids=batch.clamp(min=0), labels=batch, use_cache=False).loss


def _language_model(
    name: str, shape: dict[str, int], tokenizer: PreTrainedTokenizerFast, out: Path, seed: int, steps: int, lr: float
) -> None:
    """Train a Llama of ``shape`` on the mixture and save it, with its tokenizer, under ``out``."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        **shape,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98), weight_decay=0.01)
    warmup = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    for batch in track(_batches(tokenizer, steps, 64, seed), f"training {name}", steps, console=console):
        loss = _loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    with torch.no_grad():
        held_out = torch.stack([_loss(model, batch) for batch in _batches(tokenizer, 8, 64, seed + 1)]).mean()
    console.print(f"{name}: {model.num_parameters():,} parameters, {held_out:.3f} nats a token on held-out text")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def build(out: Path = FOLDER, seed: int = 0) -> None:
    """Train the three models and put them in folders of their names under ``out``; minutes on two cores.

    The same seed on the same machine gives the same weights. Nothing is written to ``out`` before all is trained.
    """
    tokenizer = _tokenizer(seed)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        _language_model("base", BASE, tokenizer, work / "base", seed, steps=1500, lr=3e-3)
        _language_model("small", SMALL, tokenizer, work / "small", seed, steps=1000, lr=4e-3)
        for attribute in world.ATTRIBUTES:
            pairs = work / f"{attribute}.jsonl"
            pairs.write_text("".join(f"{json.dumps(row)}\n" for row in world.preference_pairs(attribute, 8000, seed)))
            train_arm(work / "small", pairs, work / attribute, lora_r=0, beta=1.0, lr=2e-4, seed=seed)
        for name in NAMES:
            (out / name).mkdir(parents=True, exist_ok=True)
            for file in SHIPPED:
                shutil.copyfile(work / name / file, out / name / file)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the three models' folders.")] = FOLDER,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train the bundled models anew."""
    build(out, seed)


if __name__ == "__main__":
    typer.run(main)
