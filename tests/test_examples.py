"""The examples run, always say the same, and draw what a naive loop draws."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import oracle
from genarm import GuidedDecoder, bundled, world
from genarm_kernels import guided_step

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


def test_decode_file_answers_every_question(tmp_path, capsys):
    """A file in, a file out, in the order of the questions, with the answers that `generate` gives."""
    module = load("decode_file")
    questions = world.sample_prompts(10, seed=8)
    module.main(questions, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    decoder = GuidedDecoder.from_pretrained(bundled.path("base"), {name: bundled.path(name) for name in module.WEIGHTS})
    chats = [[{"role": "user", "content": question}] for question in questions]
    expected = decoder.generate(messages=chats, weights=module.WEIGHTS, top_p=0.9, seed=0)
    assert rows == [{"question": q, "answer": a.strip()} for q, a in zip(questions, expected.texts, strict=True)]
    assert capsys.readouterr().out.count("nats each") == len(questions)


def test_live_tradeoff_changes_what_follows_and_nothing_before(capsys):
    module = load("live_tradeoff")
    module.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    decoder = GuidedDecoder.from_pretrained(
        bundled.path("base"), {name: bundled.path(name) for name in ("helpful", "polite")}
    )
    continued = []
    for turn, line in enumerate(lines):
        share = turn / (len(lines) - 1)
        weights = {"helpful": 2 * (1 - share), "polite": 2 * share}
        (unchanged,) = decoder.generate(messages=module.QUESTION, weights=weights, seed=7).texts
        first, rest = line.partition(":")[2].split("[")[0].strip(), line.partition("] ")[2].split("[")[0].strip()
        assert unchanged.strip().startswith(first)
        continued.append(unchanged.strip()[len(first) :].strip().startswith(rest))
    assert len(lines) == 4 and not all(continued)


def test_cuda_graph_engine_draws_what_separate_steps_draw(capsys):
    """Also where a graph would be replayed: on a CPU the step is called, and the outputs are the same tensors."""
    module = load("cuda_graph_engine")
    module.main()
    lines = capsys.readouterr().out.splitlines()
    base, arm = module.Model(seed=0), module.Model(seed=1)
    tokens, seeds = torch.zeros(module.ROWS, dtype=torch.int64), torch.arange(module.ROWS)
    drawn = []
    with torch.inference_mode():
        for position in range(module.STEPS + 1):  # the first is the one that compiles
            weight = 1.5 if position > module.STEPS // 2 else 0.0
            weights = torch.tensor([[0.0], [weight], [weight], [weight]])
            step = guided_step(base(tokens), [arm(tokens)], weights, top_p=0.9, seed=seeds, position=position)
            tokens = step.token
            drawn.append(tokens.tolist())
    assert [[int(token) for token in line.split()[: module.ROWS]] for line in lines] == drawn[1:]
