"""Several tokens per row in one forward pass, of which each row keeps some: what speculation stands on."""

import random

import pytest
import torch

from genarm import GuidedDecoder
from genarm.decoding.engine import Begin
from genarm.decoding.forwards import PlainForward, PlainKind
from genarm.decoding.request import Request
from test_batching import adapter, endless
from test_decoder import byte_tokenizer, make_model
from test_models import model_of

pytestmark = pytest.mark.versions
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
CASES = {
    "full attention": lambda seed: make_model("llama", seed),
    "grouped queries": lambda seed: make_model("qwen3", seed, **GROUPED),
    "sliding window": lambda seed: make_model("mistral", seed, sliding_window=8, **GROUPED),
    "sliding and full": lambda seed: make_model("gemma2", seed, sliding_window=8, **GROUPED),
    "eager": lambda seed: eager(make_model("gemma2", seed, sliding_window=8, **GROUPED)),
    "position table": lambda seed: make_model("gpt2", seed),
    "long rope": lambda seed: model_of("phi3", seed),
    "dynamic rope": lambda seed: model_of("llama", seed),
    "adapters": lambda seed: make_model("qwen3", seed, **GROUPED),
}
# By step, how many tokens every row is fed and how many of them the rows keep.
STEPS = [(4, [0, 4, 2]), (5, [5, 0, 1]), (1, [1, 1, 0]), (3, [0, 0, 0]), (4, [3, 1, 4]), (2, [2, 1, 0]), (3, [1, 1, 1])]


def eager(model):
    model.set_attn_implementation("eager")
    return model


class Rows:
    """Rows of an engine, and what every token that they were fed must have given: the logits of each operand's model
    over the whole row up to it, alone and without a cache.
    """

    def __init__(self, engine, models, prompts):
        self.engine, self.models = engine, models
        self.slots = list(range(1, 1 + len(prompts)))
        self.ids = [[list(ids) for ids in row] for row in prompts]
        self.seen = {}
        engine.reset({})
        ended = Begin(Request(prompt="", max_new_tokens=1), [[7] * 30 for _ in models], 0, [1.0] * (len(models) - 1))
        engine.begin([0], [ended])
        for b in range(len(prompts)):
            self.begin(b)

    def begin(self, b):
        row = Begin(Request(prompt="", max_new_tokens=100), self.ids[b], 3, [1.0] * (len(self.models) - 1))
        self.engine.begin([self.slots[b]], [row])

    def step(self, tokens, accepted):
        """Feeds row b `tokens[b]`, of which it keeps the first `accepted[b]`; fewer are fed where a row would outgrow
        its cache on the way, and where a single one would do so, that row begins again with it.
        """
        width = len(tokens[0])
        while (again := [self.outgrown(b, width) for b in range(len(self.ids))]) != [False] * len(again) and width > 1:
            width -= 1
        for b, begins in enumerate(again):
            if begins and accepted[b]:
                self.ids[b] = [[*ids, tokens[b][0]] for ids in self.ids[b]]
                self.begin(b)
        accepted = [0 if begins else min(kept, width) for begins, kept in zip(again, accepted, strict=True)]
        by_slot, kept_by_slot = torch.full((1 + max(self.slots), width), 9), torch.zeros(1 + max(self.slots)).long()
        for slot, row, kept in zip(self.slots, tokens, accepted, strict=True):
            by_slot[slot], kept_by_slot[slot] = torch.tensor(row[:width]), kept
        longest = width + max(len(ids) for row in self.ids for ids in row)
        engine = self.engine
        with engine._context():
            logits = engine._forward(by_slot, -(-longest // engine.granularity) * engine.granularity)
            engine._advance(slice(len(by_slot)), kept_by_slot)
        assert all(one.isfinite().all() for one in logits)
        for b, (slot, kept) in enumerate(zip(self.slots, accepted, strict=True)):
            if again[b]:
                continue
            for operand, (forward, within) in enumerate(engine._operands):
                own = logits[forward][slot, within]
                assert len(own) == width
                for t in range(width):
                    row = [*self.ids[b][operand], *tokens[b][: t + 1]]
                    self.check(operand, row, own[t])
                    if t < kept:
                        self.seen[b, operand, len(row)] = own[t]
            self.ids[b] = [[*ids, *tokens[b][:kept]] for ids in self.ids[b]]

    def outgrown(self, b, width):
        return self.engine.outgrown([len(ids) + width for ids in self.ids[b]], width)

    @torch.no_grad()
    def check(self, operand, ids, logits):
        expected = self.models[operand](input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_rows_keep_as_many_tokens_as_they_accept(case):
    """Ragged rows, of which one has ended, across what a model changes with length; the others move on the way."""
    base = endless(CASES[case](0))
    arms = {"b": CASES[case](1)}
    if case == "adapters":  # two of them in the base's pass, about an ARM that is apart from it
        arms = {"a": adapter(base, 1), **arms, "c": adapter(base, 2, r=2)}
    decoder = GuidedDecoder(base, byte_tokenizer(), arms)
    decoder.require_fast_path()
    assert [one.operands for one in decoder._provider.passes] == (
        [[0, 1, 3], [2]] if case == "adapters" else [[0], [1]]
    )
    engine, _ = decoder._provider.take(4, 64, 4)
    chance = random.Random(0)
    models = [base, *arms.values()]
    lengths = (2, 7, 11) if case == "dynamic rope" else (2, 18, 25)  # which outgrows every cache beyond 24 tokens
    prompts = [[[chance.randrange(258) for _ in range(n + i)] for i in range(len(models))] for n in lengths]
    tokens = [[[chance.randrange(258) for _ in range(width)] for _ in prompts] for width, _ in STEPS]
    rows = Rows(engine, models, prompts)
    for step, (fed, (_, accepted)) in enumerate(zip(tokens, STEPS, strict=True)):
        if step == 3:  # the last slot's row takes the place of the one that has ended
            engine.move(3, 0, 48)
            rows.slots[2] = 0
        rows.step(fed, accepted)
    assert len({len(ids) for row in rows.ids for ids in row}) > 3

    one_by_one = Rows(engine, models, prompts)
    for column in range(max(len(row[0]) - len(prompt[0]) for row, prompt in zip(rows.ids, prompts, strict=True))):
        kept = [[ids[0][len(prompt[0]) :][column : column + 1]] for ids, prompt in zip(rows.ids, prompts, strict=True)]
        one_by_one.step([(one or [0]) for (one,) in kept], [len(one) for (one,) in kept])
    common = rows.seen.keys() & one_by_one.seen.keys()
    assert len(common) > 10 * len(models)
    for key in common:
        torch.testing.assert_close(rows.seen[key], one_by_one.seen[key], atol=2e-4, rtol=1e-4)


def test_a_step_is_outgrown_wherever_one_of_its_tokens_is():
    decoder = GuidedDecoder(model_of("phi3"), byte_tokenizer())
    engine, _ = decoder._provider.take(1, 64, 1)
    assert [length for length in range(20, 40) if engine.outgrown([length])] == [25]
    assert [length for length in range(20, 40) if engine.outgrown([length], 4)] == [25, 26, 27, 28]


def test_the_plain_loop_takes_one_token_at_a_time():
    forward = PlainForward(make_model("mamba"), PlainKind.MASKED_PROMPTS)
    with pytest.raises(ValueError, match=r"tokens: expected one per row, .*, got 2"):
        forward.step(torch.tensor([[5, 6]]), torch.tensor([[0]]), 16)
