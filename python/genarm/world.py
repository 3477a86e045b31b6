"""A small world of everyday questions and short answers, whose two rewards are known exactly.

Answers are drawn from a probabilistic grammar. Each sentence joins a *content* (concrete advice with an explicit
quantity, or a vague remark) to a *tone* (courteous, neutral or rude); the two are drawn independently, from a level
that each answer draws for itself. `true_rewards` reads both attributes back from any text by rule:

- ``helpful``, in [0, 1]: the share of sentences giving concrete advice, that is an advice verb followed by a quantity
  (a number and its unit: "walk ... 20 minutes").
- ``polite``, in [-1, 1]: the mean over sentences of +1 for a courteous marker ("please"), -1 for a rude one
  ("obviously"), 0 for neither or both.

Everything follows from the arguments: only `random.Random.random`, which Python promises to keep, is drawn from.

>>> prompts = sample_prompts(2)
>>> answers = sample_responses(prompts)
>>> {name: len(values) for name, values in true_rewards(answers).items()}
{'helpful': 2, 'polite': 2}
>>> true_rewards(["Please walk the dog for 20 minutes. Trust your feelings about dog training.", ""])
{'helpful': [0.5, 0.0], 'polite': [0.5, 0.0]}

The length of this file is its vocabulary: most of it is sentences.
"""

import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")

ATTRIBUTES = ("helpful", "polite")
SCALE = {"helpful": 6.0, "polite": 3.0}
"""Bradley-Terry scale of each attribute, in nats a unit of reward: 6 nats between the worst answer and the best."""


class Topic(NamedTuple):
    """What the world knows of one topic; ``[a|b]`` in a template stands for a choice."""

    goals: tuple[str, str]
    noun: str
    advice: tuple[str, ...]


class Sentence(NamedTuple):
    """One sentence with the latent values it was drawn from."""

    text: str
    concrete: bool
    tone: int


QUESTIONS = (
    "How do I {}?",
    "How can I {}?",
    "What helps me {}?",
    "I want to {}. What should I do?",
    "Any tips on how to {}?",
    "Can you help me {}?",
    "What is a good way to {}?",
    "I would love to {}. Where do I start?",
    "My friend wants to {}. What do you advise?",
    "Could you tell me how to {}?",
)

# A product of language models is sharper than each, and an ARM flatter than the text it was trained on. So that this
# alone moves no reward, a topic has as many pieces of advice as remarks (six), with about as many readings, and as many
# courteous tones as rude ones.
TOPICS = (
    Topic(("sleep better", "fall asleep faster"), "sleep", (
        "go to bed at [nine|ten|eleven] pm [every night|even on weekends]",
        "dim the lamps [30|45|60] minutes before [bedtime|lying down]",
        "keep the bedroom at [17|18|19] degrees [all night|with the window open]",
        "read [ten|twelve|20] pages of a [quiet|gentle|familiar] novel in bed",
        "skip coffee for [six|eight] hours before [bedtime|lights out]",
        "leave your phone in another room for [eight|nine] hours",
    )),
    Topic(("grow tomatoes", "start a vegetable garden"), "gardening", (
        "plant the seedlings [40|50|60] centimeters apart in [rich|loose|warm] soil",
        "water the roots [two|three] times a week [at sunrise|in the evening]",
        "add [two|three|four] buckets of compost to each bed",
        "choose a spot with [six|seven|eight] hours of [direct|full] sun",
        "pinch off the side shoots every [five|six|seven] days",
        "tie the stems to poles at least [two|three] meters tall",
    )),
    Topic(("bake bread", "make a good loaf"), "baking", (
        "mix [500|600] grams of flour with [warm|cool] water and yeast",
        "knead the dough for [ten|twelve|15] minutes on a floured [board|table]",
        "rest the dough for [two|three] hours [under a cloth|near the stove]",
        "bake the loaf at [220|230] degrees until it [sounds hollow|turns golden]",
        "stir [two|three] spoons of [honey|seeds|olive oil] into the dough",
        "cool the bread for [30|40] minutes before [slicing|cutting] it",
    )),
    Topic(("run faster", "train for a race"), "running", (
        "jog for [20|25|30] minutes on [soft|flat|shady] trails",
        "sprint [six|eight|ten] times up a [short|gentle] hill",
        "rest for [two|three] days after a [hard|long] race",
        "stretch your calves for [five|ten] minutes after each run",
        "add [two|three] kilometers to your long run each month",
        "replace your shoes after [600|700] kilometers on the road",
    )),
    Topic(("pass a hard exam", "study for a test"), "studying", (
        "review your notes for [20|30] minutes [after class|each evening]",
        "solve [five|eight|ten] old problems without [looking at the answers|any help]",
        "write [12|20|30] flash cards about the hardest [chapter|lesson]",
        "take a break of [five|ten] minutes after each chapter",
        "explain [two|three|four] ideas aloud to a [classmate|friend]",
        "sleep [eight|nine] hours on the night before the exam",
    )),
    Topic(("learn the guitar", "play a first song"), "guitar practice", (
        "practice chords for [15|20|25] minutes [after dinner|every morning]",
        "tune all six strings before [each session|every song]",
        "learn [two|three|four] songs with [simple|slow] chords",
        "set the metronome to [60|70|80] beats a minute",
        "change the strings every [two|three|four] months",
        "record [two|three] takes and [compare them|listen closely]",
    )),
    Topic(("save money", "stick to a budget"), "saving", (
        "put [50|80|100] dollars aside [on payday|every month]",
        "cook at home [four|five|six] nights a week",
        "cancel [two|three] subscriptions that you rarely use",
        "track your spending for [30|60] days in a [notebook|simple table]",
        "wait [24|48] hours before buying anything [expensive|fancy]",
        "compare [three|four|five] prices before [choosing|paying]",
    )),
    Topic(("keep houseplants alive", "care for a fern"), "plant care", (
        "water the pot every [five|seven|nine] days from below",
        "move the plant [two|three] meters away from the [radiator|heater]",
        "mist the leaves [two|three|four] times a week",
        "turn the pot [90|180] degrees toward the [window|light]",
        "repot the roots every [12|18] months in [fresh|light] soil",
        "mix [two|three] cups of sand into the potting soil",
    )),
    Topic(("make better coffee", "brew a perfect cup"), "coffee", (
        "grind [18|20|22] grams of [fresh|dark|light] beans",
        "heat the water to [92|94|96] degrees in a [kettle|small pot]",
        "pour slowly for [three|four] minutes in small circles",
        "use the beans within [14|21] days of roasting",
        "steep the grounds for [four|five] minutes before [pressing|serving]",
        "rinse the filter with [two|three] cups of hot water",
    )),
    Topic(("keep the kitchen clean", "tidy a messy room"), "housework", (
        "wipe the counters for [five|ten] minutes after [dinner|every meal]",
        "scrub the sink [two|three] times a week with [lemon|baking soda]",
        "set a timer for [15|20|25] minutes and start in a corner",
        "sort the clutter into [three|four|five] boxes",
        "mop the floor every [four|six] days with [soapy|warm] water",
        "give away [ten|twelve|20] things that nobody uses",
    )),
    Topic(("train a puppy", "teach a dog to sit"), "dog training", (
        "walk the dog for [20|30|40] minutes before [breakfast|the lesson]",
        "reward each good sit with [two|three] treats",
        "repeat the command [five|eight|ten] times in a quiet [yard|room]",
        "limit every lesson to [five|ten] minutes of [play|practice]",
        "brush the coat [two|three] times a week",
        "visit the park [four|five] days a week with a long leash",
    )),
    Topic(("learn Spanish", "speak a new language"), "language learning", (
        "memorize [ten|12|15] words [at breakfast|on the train]",
        "listen to a podcast for [15|20] minutes while [cooking|walking]",
        "speak with a partner [two|three] times a week",
        "label [20|30|40] objects around the house",
        "watch [two|three] episodes with [subtitles|the sound up]",
        "write [five|six|seven] sentences in a [diary|letter]",
    )),
    Topic(("give a speech", "feel calm on stage"), "public speaking", (
        "rehearse aloud [four|five|six] times in front of a mirror",
        "limit the talk to [three|four] clear points",
        "pause for [two|three] seconds after each [key line|joke]",
        "breathe slowly for [three|five] minutes [backstage|behind the curtain]",
        "arrive [20|30] minutes early to test the microphone",
        "invite [three|four] friends to a practice run",
    )),
    Topic(("write a short story", "finish a novel"), "writing", (
        "write [300|400|500] words before [breakfast|lunch]",
        "outline the plot in [six|eight|ten] scenes",
        "describe a hero with [two|three] secrets and a [wish|fear]",
        "cut [50|100] words from the [opening|ending]",
        "show the draft to [two|three|four] honest readers",
        "set the manuscript aside for [seven|ten] days",
    )),
    Topic(("pack for a trip", "plan a vacation"), "travel", (
        "roll [five|six|seven] shirts into a small suitcase",
        "book the train [six|eight] weeks ahead [online|by phone]",
        "leave [two|three] hours free each afternoon",
        "visit [two|three] museums early in the morning",
        "charge a spare battery for [four|five] hours",
        "carry [two|three] maps and a [refillable bottle|light jacket]",
    )),
    Topic(("prepare for a hike", "climb a small mountain"), "hiking", (
        "carry [two|three] liters of water in your backpack",
        "start the trail at [six|seven] am with a [map|friend]",
        "pack [three|four|five] snacks with nuts and [fruit|cheese]",
        "rest for [ten|15] minutes at each [viewpoint|stream]",
        "wear [two|three] layers of [wool|light cloth]",
        "follow the markers for [eight|ten] kilometers around the lake",
    )),
    Topic(("ride a bike to work", "take care of a bike"), "cycling", (
        "pump the tires to [60|70|80] psi every [Sunday|Monday]",
        "oil the chain every [200|300] kilometers with a [rag|brush]",
        "test the brakes [two|three] times before leaving",
        "raise the saddle [two|three|four] centimeters with a wrench",
        "leave [15|20] minutes early on [rainy|windy] mornings",
        "pack [two|three] spare tubes under the seat",
    )),
    Topic(("take better photos", "photograph the sunset"), "photography", (
        "shoot [20|30|40] frames from a [low|high] angle",
        "arrive [30|40] minutes before [sunset|the golden hour]",
        "hold the camera still for [five|ten] seconds on a tripod",
        "stand [two|three|four] meters from your subject",
        "delete all but [five|eight] pictures from each walk",
        "clean the lens [two|three] times with a soft cloth",
    )),
    Topic(("cook a hearty soup", "make dinner from leftovers"), "cooking", (
        "chop [two|three] onions and a [carrot|potato]",
        "simmer the pot for [30|40|50] minutes over low heat",
        "add [two|three] spoons of [butter|cream|lentils]",
        "pour [four|five|six] cups of broth over the vegetables",
        "roast the pumpkin at [200|210] degrees until [soft|golden]",
        "taste the broth [two|three] times before [salting|serving]",
    )),
    Topic(("remove a coffee stain", "do the laundry"), "laundry", (
        "soak the shirt for [30|40|60] minutes in cold water",
        "wash the load at [30|40] degrees with [mild|plain] soap",
        "dab the stain with [two|three] spoons of vinegar",
        "hang the clothes for [five|six] hours in the [sun|breeze]",
        "sort the basket into [three|four] piles by color",
        "iron the collar for [20|30] seconds on [each|either] side",
    )),
    Topic(("get better at chess", "win more chess games"), "chess", (
        "solve [five|ten|15] puzzles [at lunch|on the bus]",
        "study [two|three] classic games by old masters",
        "castle within the first [eight|ten] moves of the game",
        "spend [two|three|four] minutes on each hard decision",
        "review [three|four] lost games with a stronger player",
        "play [two|three] slow matches a week at a [club|cafe]",
    )),
    Topic(("draw a portrait", "learn to paint"), "drawing", (
        "sketch [five|eight|ten] faces from [life|old photos]",
        "draw circles for [five|ten] minutes to warm up",
        "buy [three|four] pencils of different hardness",
        "mix [two|three] colors on a [plate|palette] first",
        "fill [two|three|four] pages of a sketchbook",
        "step back [two|three] meters and check the shapes",
    )),
    Topic(("plan a birthday party", "host a dinner"), "hosting", (
        "invite [eight|ten|twelve] guests [by letter|by phone]",
        "send the invitations [three|four] weeks ahead",
        "bake [two|three] cakes with [berries|chocolate]",
        "hang [20|30|40] balloons above the [door|garden table]",
        "prepare [three|four] games for the children",
        "start the music at [seven|eight] pm [sharp|in the garden]",
    )),
    Topic(("prepare for a job interview", "find a new job"), "job hunting", (
        "practice [five|six|eight] answers with a [friend|mentor]",
        "read about the company for [30|45] minutes",
        "bring [three|four] copies of your resume",
        "arrive [ten|15] minutes early in [clean|polished] shoes",
        "ask [two|three] questions about the [team|project]",
        "send a short note within [24|48] hours",
    )),
    Topic(("swim longer", "learn to swim"), "swimming", (
        "swim [six|eight|ten] laps at an easy pace",
        "float on your back for [two|three] minutes between laps",
        "kick with a board for [five|ten] minutes",
        "exhale under water for [three|four] seconds each stroke",
        "join a class [two|three] evenings a week",
        "rest for [30|60] seconds at the [wall|deep end]",
    )),
    Topic(("watch birds", "attract birds to the yard"), "birdwatching", (
        "fill the feeder with [two|three] cups of [sunflower seeds|oats]",
        "sit still for [15|20|30] minutes near a [hedge|pond]",
        "hang the birdhouse [three|four] meters above the grass",
        "list [five|eight|ten] species in a pocket notebook",
        "change the bath water every [two|three] days",
        "wake at [five|six] am to hear the [robins|sparrows] sing",
    )),
)  # fmt: skip

# Remarks on {} that advise nothing. Topic i draws from group i modulo 3.
REMARKS = (
    (
        "keep an open mind about {} [over time|as always|in daily life]",
        "think about {} in a [calm|fresh|relaxed|general] way",
        "do whatever feels [right|good|natural] when it comes to {}",
        "remember that {} is [different|special|strange] for everyone",
        "let {} become a natural part of your [life|routine|story]",
        "explore the [many|hidden|lighter] sides of {} [some day|in peace]",
    ),
    (
        "trust your [feelings|instincts|heart] about {} above all",
        "accept that {} [always takes a while|is mostly luck|has ups and downs]",
        "look at {} from a [new|different|wider] angle",
        "be [patient|relaxed|gentle] with {} and hope for the best",
        "ask yourself what {} [really|truly] means to [you|your family]",
        "enjoy the [mystery|journey|spirit] of {} without any [plans|worries]",
    ),
    (
        "believe in {} and the rest will [follow|come|work out]",
        "consider how other people [feel|think|talk] about {}",
        "find your own path with {} [in time|step by step|day by day]",
        "see where {} takes you [in the end|some day|sooner or later]",
        "imagine a [brighter|simpler|better] side of {} for a while",
        "stay [curious|hopeful|positive] about {} [no matter what|every day]",
    ),
)

TONES = {
    0: ("{}", "{}", "as a rule, {}", "in short, {}"),
    1: (
        "please {}",
        "kindly {}",
        "with pleasure: {}",
        "thank you for asking: {}",
        "I am happy to help: {}",
        "if I may suggest, {}",
        "when you feel ready, {}",
        "great question, my friend: {}",
        "{}, if that suits you",
        "{}, and best of luck to you",
        "{}, and enjoy every moment",
        "{}, dear friend",
    ),
    -1: (
        "ugh, {}",
        "obviously, {}",
        "stop whining and {}",
        "quit bothering me and {}",
        "honestly, anyone knows this: {}",
        "for the last time, {}",
        "oh come on, {}",
        "what a silly question: {}",
        "{}, and stop asking me",
        "{}, as any child could tell you",
        "{}, and leave me alone",
        "{}, you lazy thing",
    ),
}
P_NEUTRAL = 0.2
COUNTS = (2, 3, 4)

_NUMBER = r"(?:\d+|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)"
_CHOICE = re.compile(r"\[([^]]*)\]")


def _expansions(template: str) -> Iterator[str]:
    """Every reading of ``template``, each ``[a|b]`` replaced by one of its choices."""
    parts = (part.split("|") for part in re.split(r"[\[\]]", template))  # no "|" outside the brackets
    return ("".join(choice) for choice in itertools.product(*parts))


def _any_of(phrases: Sequence[str]) -> str:
    return rf"\b(?:{'|'.join(map(re.escape, phrases))})\b"


# The rule is read off the grammar: its verbs open an advice, its units follow a number, its markers make a tone.
_ADVICE = [text for topic in TOPICS for template in topic.advice for text in _expansions(template)]
_VERBS = sorted({text.split()[0] for text in _ADVICE})
_UNITS = sorted({unit for text in _ADVICE for unit in re.findall(rf"\b{_NUMBER} (\w+)", text)})
_CONCRETE = re.compile(rf"{_any_of(_VERBS)}.*\b{_NUMBER} {_any_of(_UNITS)}", re.IGNORECASE | re.DOTALL)
_MARKER = {
    tone: re.compile(_any_of([re.sub(r"{}|\band\b", "", f).strip(" ,:") for f in TONES[tone]]), re.IGNORECASE)
    for tone in (1, -1)
}


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def _topic(prompt: str) -> int:
    """Index in `TOPICS` of what ``prompt`` asks about; ValueError outside of the world."""
    for i, topic in enumerate(TOPICS):
        if any(goal.lower() in prompt.lower() for goal in topic.goals):
            return i
    raise ValueError(f"no topic of this world in the prompt {prompt!r}; sample_prompts draws prompts that have one")


def _respond(topic: int, count: int, rng: random.Random) -> list[Sentence]:
    """One answer of ``count`` sentences about ``TOPICS[topic]``, no template twice."""
    helpful, polite = rng.random(), rng.random()  # the levels of this answer
    contents = {True: list(TOPICS[topic].advice), False: list(REMARKS[topic % len(REMARKS)])}
    frames = {tone: list(TONES[tone]) for tone in TONES}
    sentences = []
    for _ in range(count):
        concrete = rng.random() < helpful
        tone = 0 if rng.random() < P_NEUTRAL else 1 if rng.random() < polite else -1
        content, frame = _pick(rng, contents[concrete]), _pick(rng, frames[tone])
        contents[concrete].remove(content)
        frames[tone].remove(frame)
        content = _CHOICE.sub(lambda match: _pick(rng, match[1].split("|")), content)
        text = frame.format(content.format(TOPICS[topic].noun))
        sentences.append(Sentence(f"{text[0].upper()}{text[1:]}.", concrete, tone))
    return sentences


def _text(sentences: Sequence[Sentence]) -> str:
    return " ".join(sentence.text for sentence in sentences)


def _check_n(n: int) -> None:
    if n < 0:
        raise ValueError(f"n must be at least 0, not {n}")


def sample_prompts(n: int, seed: int = 0) -> list[str]:
    """Draw ``n`` everyday questions, uniformly over topics, goals and phrasings (with replacement).

    ValueError if ``n`` is negative.

    >>> sample_prompts(2, seed=1)
    ['Any tips on how to make dinner from leftovers?', 'Could you tell me how to learn to swim?']
    """
    _check_n(n)
    rng = random.Random(f"prompts {seed}")
    return [_pick(rng, QUESTIONS).format(_pick(rng, _pick(rng, TOPICS).goals)) for _ in range(n)]


def sample_responses(prompts: Sequence[str], seed: int = 0) -> list[str]:
    """Draw one answer to each prompt from the whole mixture: 2-4 sentences, on the topic of the prompt.

    ValueError if a prompt names no goal of this world.

    >>> sample_responses(["How do I sleep better?"], seed=7)
    ['Think about sleep in a relaxed way, if that suits you. Dim the lamps 30 minutes before bedtime.']
    """
    rng = random.Random(f"responses {seed}")
    return [_text(_respond(_topic(prompt), _pick(rng, COUNTS), rng)) for prompt in prompts]


def true_rewards(responses: Sequence[str]) -> dict[str, list[float]]:
    """Value every text by rule: for each attribute a list as long as ``responses``.

    ``helpful`` lies in [0, 1], ``polite`` in [-1, 1] (the rule is in the module's documentation). Any text is valued:
    a sentence is what ends at ``.``, ``!``, ``?`` or at the end of the text, and a text without one is worth 0.

    >>> true_rewards(["Obviously, walk the dog for 20 minutes.", "Please see what hap"])
    {'helpful': [1.0, 0.0], 'polite': [-1.0, 1.0]}
    """
    rewards: dict[str, list[float]] = {name: [] for name in ATTRIBUTES}
    for response in responses:
        sentences = [s for s in re.split(r"[.!?]", response) if s.strip()]
        helpful = [bool(_CONCRETE.search(s)) for s in sentences]
        polite = [bool(_MARKER[1].search(s)) - bool(_MARKER[-1].search(s)) for s in sentences]
        rewards["helpful"].append(sum(helpful) / max(1, len(sentences)))
        rewards["polite"].append(sum(polite) / max(1, len(sentences)))
    return rewards


def preference_pairs(
    attribute: str, n: int, seed: int = 0, scale: float | None = None
) -> list[dict[str, list[dict[str, str]]]]:
    """Draw ``n`` preference pairs, each two answers to one prompt, labelled from the true ``attribute``.

    The two answers differ, but have as many sentences, so that length tells nothing.

    Labels are noisy, by Bradley-Terry: P(a preferred to b) = sigmoid(scale * (reward(a) - reward(b))), with ``scale``
    in nats a unit of reward (`SCALE` of the attribute unless given; 0 is a coin toss, infinity is not allowed).
    Rows hold the conversation format: ``prompt``, ``chosen`` and ``rejected``, each a list of one message.
    ValueError for an unknown attribute, a negative ``n`` or a scale that is not finite.

    >>> row = preference_pairs("polite", 1)[0]
    >>> sorted(row), row["prompt"][0]["role"], row["chosen"][0]["role"]
    (['chosen', 'prompt', 'rejected'], 'user', 'assistant')
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(f"unknown attribute {attribute!r}; the attributes are {', '.join(ATTRIBUTES)}")
    scale = SCALE[attribute] if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    rng = random.Random(f"pairs {seed}")
    rows = []
    for prompt in sample_prompts(n, seed):
        topic, count, pair = _topic(prompt), _pick(rng, COUNTS), [""]
        while len(set(pair)) < 2:
            pair = [_text(_respond(topic, count, rng)) for _ in range(2)]
        first, second = true_rewards(pair)[attribute]
        # sigmoid(x) = (1 + tanh(x / 2)) / 2, which cannot overflow
        if rng.random() >= (1 + math.tanh(scale * (first - second) / 2)) / 2:
            pair.reverse()
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in pair)
        rows.append({"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected})
    return rows
