"""The examples run, always say the same, and draw what a naive loop draws."""

import importlib.util
import json
import re
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import oracle
from genarm import GuidedDecoder, bundled, world
from genarm_kernels import guided_step, token_mask

EXAMPLES = Path(__file__).parents[2] / "examples"
WEIGHTS = {"helpful": 1.0, "polite": 0.5}


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """An example finds another one, as it does when it is run."""
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture(scope="module")
def decoder():
    return GuidedDecoder.from_pretrained(bundled.path("base"), {name: bundled.path(name) for name in WEIGHTS})


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


def test_every_example_is_in_the_index():
    index = (EXAMPLES / "README.md").read_text()
    links = re.findall(r"\]\((.+?)\)", index)
    assert all((EXAMPLES / link).exists() for link in links)
    files = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
    assert set(re.findall(r"^\| \[(.+)\]\(\1\) \|", index, re.M)) == files


def chat(question):
    return [{"role": "user", "content": question}]


def chat_ids(decoder, question):
    text = decoder.tokenizer.apply_chat_template(chat(question), tokenize=False, add_generation_prompt=True)
    return decoder.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("arms", "sampling"),
    [
        (("helpful", "polite"), {"temperature": 0.0}),
        (("helpful", "polite"), {"top_p": 0.9}),
        (("polite",), {"temperature": 0.7, "top_k": 50, "min_p": 0.02}),
        ((), {}),
    ],
)
@pytest.mark.versions
def test_minimal_decoder_draws_what_the_decoder_draws(decoder, arms, sampling):
    module = load("minimal_decoder")
    questions = [*world.sample_prompts(6, seed=3), "Why?", "I have a cold and cannot sleep. What should I do now?"]
    prompts = [chat_ids(decoder, question) for question in questions]
    assert len({len(prompt) for prompt in prompts}) > 3
    expected = decoder.generate(
        messages=[chat(question) for question in questions],
        weights={name: WEIGHTS[name] for name in arms},
        max_new_tokens=34,
        seed=5,
        **sampling,
    )
    assert set(expected.finish_reasons) == {"eos", "length"}  # some rows grow on after others have ended
    rows = module.generate(
        module.load(bundled.path("base")),
        [module.load(bundled.path(name)) for name in arms],
        prompts,
        [WEIGHTS[name] for name in arms],
        eos={decoder.tokenizer.eos_token_id},
        max_new_tokens=34,
        seed=5,
        **sampling,
    )
    assert [row.tokens for row in rows] == expected.tokens
    for b, row in enumerate(rows):
        rewards = [list(column) for column in zip(*row.rewards, strict=True)]
        torch.testing.assert_close(rewards, [expected.rewards[name][b] for name in arms], atol=1e-4, rtol=1e-4)


def test_minimal_decoder_counts_no_padding_among_the_positions():
    """GPT-2 adds an embedding of each position, where the bundled models would not notice a shift."""
    module, sizes = load("minimal_decoder"), {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, initializer_range=1.0, **sizes)
    model = module.Model(GPT2LMHeadModel(config))
    prompts = [[1, 2, 3, 4, 5, 6], [7, 8], [9]]
    together, *alone = (
        [row.tokens for row in module.generate(model, [], some, [], eos=(), max_new_tokens=12, temperature=0)]
        for some in (prompts, *([prompt] for prompt in prompts))
    )
    assert together == [tokens for (tokens,) in alone] and len(set(map(tuple, together))) == len(prompts)


def test_minimal_decoder_prints_what_the_decoder_writes(decoder, capsys):
    module = load("minimal_decoder")
    module.main(module.QUESTIONS)
    expected = decoder.generate(
        messages=[chat(question) for question in module.QUESTIONS], weights=module.WEIGHTS, top_p=0.9
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines[1 :: 2 + len(WEIGHTS)]] == [text.strip() for text in expected.texts]
    assert sum(line.endswith("nats a token") for line in lines) == len(WEIGHTS) * len(module.QUESTIONS)


@pytest.mark.versions
def test_hub_models_shows_each_answer_and_its_rewards(tmp_path, capsys):
    """Here from folders, one ARM a model and the other an adapter of the base."""
    base, helpful = str(bundled.path("base")), str(bundled.path("helpful"))
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path)
    arms = {helpful: 1.5, str(tmp_path): 0.1}
    named = [part for name, weight in arms.items() for part in ("--arm", name, str(weight))]
    question = "How do I learn to cook?"
    load("hub_models").main(["--base", base, *named, "--max-new-tokens", "30", "--seed", "3", question])
    printed = capsys.readouterr().out
    decoder = GuidedDecoder.from_pretrained(base, {name: name for name in arms})
    for title, weights in (("without guidance", dict.fromkeys(arms, 0.0)), ("guided", arms)):
        one = decoder.generate(messages=chat(question), weights=weights, max_new_tokens=30, top_p=0.9, seed=[3])
        lines = [f"\n{title}: {one.texts[0].strip()}"]
        for name, weight in weights.items():
            rewards = one.rewards[name][0]
            lines.append(f"  {sum(rewards) / len(rewards):.2f} nats a token by {name}, weight {weight:g}")
        assert "\n".join(lines) in printed


def test_hub_models_takes_no_base_without_an_arm_of_its_own(capsys):
    for arguments in (["--base", "a"], ["--arm", "a", "1"]):
        with pytest.raises(SystemExit):
            load("hub_models").main(arguments)
        assert "expected both or neither" in capsys.readouterr().err


def load_grammar():
    pytest.importorskip("llguidance", reason="llguidance is not installed, which examples/grammar.py needs")
    return load("grammar")


def test_grammar_rows_have_the_form_of_their_grammars(decoder, capsys):
    module = load_grammar()
    question = module.QUESTIONS[0]
    for seed in range(3):
        free, decided, listed, structured = module.answers(question, seed)
        assert free == decoder.generate(messages=chat(question), weights=WEIGHTS, top_p=0.9, seed=seed).texts[0]
        assert re.fullmatch(r" (Yes|No), [^\n]+", decided)
        assert re.fullmatch(rf"(\n- {module.SENTENCE}){{3}}", listed)
        values = json.loads(structured)
        assert list(values) == ["advice", "minutes"] and type(values["minutes"]) is int
        assert re.fullmatch(module.SENTENCE, values["advice"]) and 1 <= values["minutes"] <= 90
    module.main(question)
    assert re.findall(r"^(.+):$", capsys.readouterr().out, re.M) == list(module.GRAMMARS)


def test_grammar_names_a_grammar_that_cannot_be_read(monkeypatch):
    module = load_grammar()
    monkeypatch.setitem(module.GRAMMARS, "a list", module.LLMatcher.grammar_from_regex("(unclosed"))
    with pytest.raises(ValueError, match=r"a list: .*unclosed"):
        module.answers(module.QUESTIONS[0])


@pytest.mark.versions
def test_a_mask_that_llguidance_fills_means_here_what_it_means_there(decoder):
    module = load_grammar()
    vocabulary = module.hf.from_tokenizer(decoder.tokenizer)
    mask = token_mask.allocate(2, vocabulary.vocab_size)
    for b, regex in enumerate(("[0-9]+x", "a.*")):
        matcher = module.LLMatcher(vocabulary, module.LLMatcher.grammar_from_regex(regex))
        module.fill_next_token_bitmask(matcher, mask, b)
        expected = [matcher.validate_tokens([token]) == 1 for token in range(vocabulary.vocab_size)]
        assert any(expected) and token_mask.to_bools(mask, vocabulary.vocab_size)[b].tolist() == expected


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


def test_decode_file_answers_every_question(decoder, tmp_path, capsys):
    """A file in, a file out, in the order of the questions, with the answers that `generate` gives."""
    module = load("decode_file")
    questions = world.sample_prompts(10, seed=8)
    module.main(questions, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = decoder.generate(messages=[chat(one) for one in questions], weights=module.WEIGHTS, top_p=0.9, seed=0)
    assert rows == [{"question": q, "answer": a.strip()} for q, a in zip(questions, expected.texts, strict=True)]
    assert capsys.readouterr().out.count("nats each") == len(questions)


def test_live_tradeoff_changes_what_follows_and_nothing_before(decoder, capsys):
    module = load("live_tradeoff")
    module.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
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
