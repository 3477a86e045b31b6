"""Time of the decode loop's parts on the bundled models: `pytest bench/test_decoder.py`, a part of `make bench`.

The models are so small that what is seen is the loop: prefill, a step, its draw, reading and recording what it drew,
text from tokens. What is timed is checked first: the whole loop draws what a loop without cache or batch draws.
"""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from genarm import GuidedDecoder, Request, bundled, world
from genarm.decoding.engine import Begin
from genarm.decoding.scheduler import Row
from genarm.text import TextStream

BATCHES = (1, 8)
_LENGTH = 512


@pytest.fixture(scope="module")
def decoder():
    base, arm = (AutoModelForCausalLM.from_pretrained(bundled.path(name)).eval() for name in ("base", "helpful"))
    decoder = GuidedDecoder(base, AutoTokenizer.from_pretrained(bundled.path("base")), {"helpful": arm})
    decoder.require_fast_path()
    prompt = "User: How do I sleep better?\nAssistant:"
    (tokens,) = decoder.generate(prompt, temperature=0.0, max_new_tokens=16).tokens
    ids = decoder.tokenizer(prompt)["input_ids"]
    for token in tokens:
        logits = [model(torch.tensor([ids])).logits[0, -1] for model in (base, arm)]
        assert token == sum(logits).argmax()
        ids.append(token)
    return decoder


def request(limit, seed):
    return Request(prompt="", max_new_tokens=limit, seed=seed, temperature=0.7, top_p=0.9)


def begun(decoder, batch):
    """An engine with `batch` rows that have begun."""
    engine, _ = decoder._provider.take(batch, _LENGTH, batch)
    engine.reset({"temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.0})
    prompts = [decoder.tokenizer(text)["input_ids"] for text in world.sample_prompts(batch, seed=1)]
    rows = [Begin(request(_LENGTH - len(ids), b), [ids, ids], 0, [1.0]) for b, ids in enumerate(prompts)]
    return engine, rows, engine.begin(range(batch), rows)


@pytest.mark.parametrize("batch", BATCHES)
def test_prefill(benchmark, decoder, batch):
    engine, rows, _ = begun(decoder, batch)
    benchmark(engine.begin, range(batch), rows)


@pytest.mark.parametrize("batch", BATCHES)
def test_step(benchmark, decoder, batch):
    """Forwards, draw and bookkeeping, at 128 tokens covered."""
    engine, rows, _ = begun(decoder, batch)
    benchmark.pedantic(engine.step, (batch, 128), setup=lambda: engine.begin(range(batch), rows) and None, rounds=100)


@pytest.mark.parametrize("batch", BATCHES)
def test_draw(benchmark, decoder, batch):
    """The step less its forwards: what the loop adds to the models on the device's side."""
    engine, _, _ = begun(decoder, batch)
    with torch.inference_mode():
        logits = [torch.randn(batch, 1, 1, decoder.vocab_size) for _ in range(2)]
        benchmark(engine._draw, logits, slice(batch))


@pytest.mark.parametrize("batch", BATCHES)
def test_read_and_record(benchmark, decoder, batch):
    """What the host does with the tokens of a step."""
    _, _, drawn = begun(decoder, batch)
    text = TextStream(decoder.tokenizer, [0])
    rows = [Row(b, request(10**9, 0), [[0], [0]], [1.0], text, False, {"helpful": []}) for b in range(batch)]

    def record():
        for row, ((token, _), (logprob, base_logprob, *rewards)) in zip(rows, drawn.read(), strict=True):
            row.append(token, logprob, base_logprob, rewards, frozenset())

    benchmark(record)


def test_text(benchmark, decoder):
    """A token of a stream."""
    ids = decoder.tokenizer(" ".join(world.sample_prompts(20, seed=1)))["input_ids"]

    def write():
        stream = TextStream(decoder.tokenizer, ids[:8], ["\n\n"])
        for token in ids[8:72]:
            stream.push(token)

    benchmark(write)


@pytest.mark.parametrize("batch", BATCHES)
def test_generate(benchmark, decoder, batch):
    """64 tokens a prompt, the whole."""
    chats = [[{"role": "user", "content": text}] for text in world.sample_prompts(batch, seed=1)]
    benchmark(partial(decoder.generate, messages=chats, max_new_tokens=64, temperature=0.7, top_p=0.9))
