"""The world against its latent values, its promised statistics and text from outside of it."""

import math
import random
import re
from collections.abc import Iterable
from statistics import mean

import pytest
from scipy import stats

from genarm import world

N = 5000


@pytest.fixture(scope="module")
def drawn() -> list[list[world.Sentence]]:
    rng = random.Random(0)
    return [world._respond(i % len(world.TOPICS), 2 + i % 3, rng) for i in range(N)]


@pytest.fixture(scope="module")
def rewards(drawn: list[list[world.Sentence]]) -> dict[str, list[float]]:
    return world.true_rewards([world._text(sentences) for sentences in drawn])


def test_same_seed_same_world() -> None:
    prompts = world.sample_prompts(20, seed=3)
    assert prompts == world.sample_prompts(20, seed=3) != world.sample_prompts(20, seed=4)
    answers = world.sample_responses(prompts, seed=3)
    assert answers == world.sample_responses(prompts, seed=3) != world.sample_responses(prompts, seed=4)
    pairs = world.preference_pairs("helpful", 20, seed=3)
    assert pairs == world.preference_pairs("helpful", 20, seed=3) != world.preference_pairs("helpful", 20, seed=4)


def test_size_of_the_world() -> None:
    prompts = world.sample_prompts(20_000)
    assert len(world.TOPICS) >= 24
    assert len(set(prompts)) == 2 * len(world.TOPICS) * len(world.QUESTIONS)
    words = {word for answer in world.sample_responses(prompts[:N]) for word in re.findall(r"\w+", answer.lower())}
    assert len(words) > 500


def test_answers_are_on_topic() -> None:
    """Every sentence is built from an advice for the topic, or from a remark that names it."""
    for prompt, answer in zip(
        world.sample_prompts(500), world.sample_responses(world.sample_prompts(500)), strict=True
    ):
        topic = world.TOPICS[world._topic(prompt)]
        contents = [text for template in topic.advice for text in world._expansions(template)]
        assert answer.count(".") in (2, 3, 4)
        for sentence in answer.split(". "):
            assert topic.noun in sentence or any(text in sentence.lower() for text in map(str.lower, contents)), (
                sentence
            )


def test_rule_recovers_the_latent_values(drawn: list[list[world.Sentence]], rewards: dict[str, list[float]]) -> None:
    assert rewards["helpful"] == [sum(s.concrete for s in sentences) / len(sentences) for sentences in drawn]
    assert rewards["polite"] == [sum(s.tone for s in sentences) / len(sentences) for sentences in drawn]


def test_rule_recovers_every_template() -> None:
    """Exhaustively: every reading of every content, in every tone."""
    contents = [(text, 1.0) for topic in world.TOPICS for advice in topic.advice for text in world._expansions(advice)]
    contents += [
        (text, 0.0)
        for i, topic in enumerate(world.TOPICS)
        for remark in world.REMARKS[i % len(world.REMARKS)]
        for text in world._expansions(remark.format(topic.noun))
    ]
    for tone, frames in world.TONES.items():
        for frame in frames:
            values = world.true_rewards([frame.format(text) for text, _ in contents])
            assert values["helpful"] == [helpful for _, helpful in contents]
            assert set(values["polite"]) == {tone}


def test_sharpening_and_flattening_move_no_reward() -> None:
    """The mean log number of readings of an advice and of a remark agree to a few hundredths of a nat."""

    def readings(templates: Iterable[str]) -> float:
        return mean(math.log(len(list(world._expansions(template)))) for template in templates)

    advice = [readings(topic.advice) for topic in world.TOPICS]
    remarks = [readings(world.REMARKS[i % 3]) for i in range(len(world.TOPICS))]
    assert {len(topic.advice) for topic in world.TOPICS} == set(map(len, world.REMARKS)) == {6}
    assert mean(advice) == pytest.approx(mean(remarks), abs=0.05)
    assert len(world.TONES[1]) == len(world.TONES[-1])


def test_attributes_are_independent_and_spread(rewards: dict[str, list[float]]) -> None:
    # Under independence r has mean 0 and standard deviation 1 / sqrt(N): beyond 4 of them, once in 16,000 seeds.
    assert abs(stats.pearsonr(rewards["helpful"], rewards["polite"]).statistic) < 4 / math.sqrt(N)
    assert stats.tmean(rewards["helpful"]) == pytest.approx(0.5, abs=0.05)
    assert stats.tmean(rewards["polite"]) == pytest.approx(0.0, abs=0.1)
    assert stats.tstd(rewards["helpful"]) > 0.3
    assert stats.tstd(rewards["polite"]) > 0.5


def test_length_tells_little(drawn: list[list[world.Sentence]], rewards: dict[str, list[float]]) -> None:
    words = [len(world._text(sentences).split()) for sentences in drawn]
    for attribute in world.ATTRIBUTES:
        assert abs(stats.pearsonr(words, rewards[attribute]).statistic) < 0.15


@pytest.mark.parametrize(
    ("text", "helpful", "polite"),
    [
        ("", 0, 0),
        (" ... ?! ", 0, 0),
        ("\x00\n\ud800 日本語", 0, 0),
        ("Walk the dog for 20", 0, 0),  # cut off before the unit
        ("20 minutes walk", 0, 0),  # the quantity comes first
        ("WALK\nfor 20 minutes", 1, 0),  # no full stop
        ("Sidewalk 20 minutes", 0, 0),  # whole words only
        ("Please! Go away", 0, 0.5),
        ("Please, stop asking me.", 0, 0),  # both markers cancel
        ("Obviously, please. Ugh.", 0, -0.5),
    ],
)
def test_any_text_has_a_value(text: str, helpful: float, polite: float) -> None:
    assert world.true_rewards([text]) == {"helpful": [helpful], "polite": [polite]}


@pytest.mark.parametrize("attribute", world.ATTRIBUTES)
def test_labels_follow_bradley_terry(attribute: str) -> None:
    """Among pairs of one absolute difference, the better answer is chosen as often as the sigmoid says."""
    rows = world.preference_pairs(attribute, N, seed=1)
    chosen, rejected = (
        world.true_rewards([row[key][0]["content"] for row in rows])[attribute] for key in ("chosen", "rejected")
    )
    differences = [round(a - b, 6) for a, b in zip(chosen, rejected, strict=True)]
    tested = 0
    for size in {abs(d) for d in differences if d}:
        n = sum(abs(d) == size for d in differences)
        if n >= 50:
            tested += 1
            p = 1 / (1 + math.exp(-world.SCALE[attribute] * size))
            # about 20 bins in all: a right generator fails once in 500 seeds
            assert stats.binomtest(differences.count(size), n, p).pvalue > 1e-4
    assert tested >= 5


def test_scale_sets_the_noise() -> None:
    def agreement(scale: float) -> float:
        rows = world.preference_pairs("polite", 1000, scale=scale)
        values = world.true_rewards([row[key][0]["content"] for row in rows for key in ("chosen", "rejected")])[
            "polite"
        ]
        signs = [(a > b) - (a < b) for a, b in zip(values[::2], values[1::2], strict=True) if a != b]
        return signs.count(1) / len(signs)

    assert agreement(1e6) == 1
    assert agreement(-1e6) == 0
    assert agreement(0) == pytest.approx(0.5, abs=0.07)  # 4 standard deviations of about 900 coin tosses


def test_rows_are_conversations() -> None:
    for row in world.preference_pairs("helpful", 50):
        (prompt,), (chosen,), (rejected,) = row["prompt"], row["chosen"], row["rejected"]
        assert (prompt["role"], chosen["role"], rejected["role"]) == ("user", "assistant", "assistant")
        assert chosen["content"] != rejected["content"]
        assert chosen["content"].count(".") == rejected["content"].count(".")
        assert world._topic(prompt["content"]) >= 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown attribute 'funny'; the attributes are helpful, polite"):
        world.preference_pairs("funny", 1)
    with pytest.raises(ValueError, match="no topic of this world"):
        world.sample_responses(["How do I sleep better?", "Who was Napoleon?"])
    with pytest.raises(ValueError, match="at least 0, not -1"):
        world.sample_prompts(-1)
    with pytest.raises(ValueError, match="scale must be finite"):
        world.preference_pairs("polite", 1, scale=math.nan)
    assert world.sample_prompts(0) == world.sample_responses([]) == world.preference_pairs("polite", 0) == []
