"""The examples run, always say the same, and draw what a naive loop draws."""

import importlib.util
from pathlib import Path

import pytest
import torch

import oracle

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def engine():
    return load("custom_engine")


def run(engine, capsys):
    engine.main()
    return capsys.readouterr().out


def columns(output, count, width=16):
    """The words of each request, from the lines between the head and the empty line."""
    lines = output.split("\n\n")[0].splitlines()[1:]
    cells = [[line[i * width : (i + 1) * width].strip() for line in lines] for i in range(count)]
    return [[word for word in column if word] for column in cells]


def test_custom_engine_is_deterministic(engine, capsys):
    first = run(engine, capsys)
    torch.rand(3)  # whatever the global generator does
    assert run(engine, capsys) == first


def test_custom_engine_draws_what_a_naive_loop_draws(engine, capsys):
    """Request by request, every prefix computed anew, the draw by the oracle: no batch, no state, no kernel."""

    def whole_prefix(model):
        @torch.no_grad()
        def forward(ids):
            state = None
            for token in ids:
                logits, state = model(torch.tensor([token]), state)
            return logits[0].numpy()

        return forward

    forwards = [whole_prefix(engine.RecurrentModel(seed=0)), whole_prefix(engine.LastTokenModel(seed=16))]
    the, end = engine.WORDS.index("the"), (engine.END,)
    naive = [
        oracle.decode(
            forwards, [[the], [the]], [weight], 16, vocab_size=len(engine.WORDS), eos=end, seed=seed, top_p=0.9
        )
        for weight, seed in ((0.0, 11), (0.5, 12), (2.0, 13))
    ]
    assert columns(run(engine, capsys), 3) == [[engine.WORDS[token] for token in row] for row in naive]
    assert len({len(row) for row in naive}) > 1  # the requests end at different steps: the loop goes on without them
