"""What `genarm generate` does between its options and its output: ARMs, prompts, requests, results."""

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import arguments
from ..errors import GenarmError, PromptError
from . import prompts as prompting
from .prompts import Prompt

if TYPE_CHECKING:
    from ..decoding.decoder import GuidedDecoder
    from ..decoding.request import Request
    from ..decoding.results import GenerationResult


def parse_arms(
    base: str | None, arms: Sequence[str], weights: Sequence[str]
) -> tuple[dict[str, str | None], dict[str, float]]:
    """By ARM, its folder (None: bundled) and its weight."""
    if base == "":
        raise GenarmError("--base: expected a folder or the name of a model")
    folders: dict[str, str | None] = {} if base or arms else {"helpful": None, "polite": None}
    values = dict.fromkeys(folders, 1.0)
    for spec in arms:
        name, _, folder = spec.partition("=")
        if name in folders:
            raise GenarmError(f"--arm: the name {name!r} is given twice")
        path, colon, weight = folder.rpartition(":")
        # A colon may be part of a path: the folder exists, or goes on after the colon (C:\models).
        if colon and not Path(folder).exists() and not {"/", "\\"} & set(weight):
            folder, values[name] = path, arguments.number(f"--arm: weight of {name!r}", weight)
        if not name or not folder:
            raise GenarmError(f"--arm {spec!r}: expected NAME=DIR or NAME=DIR:WEIGHT")
        folders[name] = folder
        values.setdefault(name, 1.0)
    for spec in weights:
        name, equals, weight = spec.partition("=")
        if not equals:
            raise GenarmError(f"--weight {spec!r}: expected NAME=WEIGHT, such as polite=0.5")
        arguments.arm_name(name, folders, "--weight")
        values[name] = arguments.number(f"--weight of {name!r}", weight)
    return folders, values


def read_prompts(texts: Sequence[str], path: Path | None, arms: Iterable[str]) -> list[Prompt]:
    if texts and path:
        raise GenarmError("give --prompt or --prompts, not both")
    if texts:
        return prompting.from_texts(texts)
    if path:
        return prompting.from_jsonl(path, arms)
    if sys.stdin.isatty():
        raise GenarmError('no prompts: give --prompt "TEXT", --prompts FILE.jsonl, or standard input, one per line')
    return prompting.from_lines(sys.stdin.buffer, "standard input")


def identities(base: str | None, arms: Mapping[str, str | None], tokenizer: str | None) -> dict[str, str]:
    """What the models are by their content, each by the name that errors call it: a path can be given another model."""
    quiet()
    from .. import bundled
    from ..models.folders import Place
    from ..models.identity import identity
    from ..models.loading import check_exists

    sources = {
        "base": bundled.path("base") if base is None else base,
        **{f"ARM {name!r}": bundled.path(name) if folder is None else folder for name, folder in arms.items()},
        **({"tokenizer": tokenizer} if tokenizer else {}),
    }
    places = {label: Place.of(source) for label, source in sources.items()}
    for label, place in places.items():
        check_exists(label, place.root)
    return {label: identity(place.folder) for label, place in places.items()}


def make_requests(
    work: Sequence[Prompt], weights: Mapping[str, float], seed: int, sampling: Mapping[str, Any]
) -> list["Request"]:
    """The prompts as the decoder takes them, texts still as they are."""
    from genarm_kernels import row_seed

    from ..decoding.request import Request

    try:
        seeds = [row_seed(seed, i) for i in range(len(work))]  # as one number given to the decoder seeds its prompts
    except ValueError as error:
        raise GenarmError(f"--{error}") from None
    return [
        Request(prompt=one.content, weights={**weights, **one.weights}, seed=own, **sampling)
        for one, own in zip(work, seeds, strict=True)
    ]


def as_chat(request: "Request") -> "Request":
    """With its text as a user's message."""
    if not isinstance(request.prompt, str):
        return request
    return replace(request, prompt=[{"role": "user", "content": request.prompt}])


@contextmanager
def naming(work: Sequence[Prompt]) -> Iterator[None]:
    """Has errors about one prompt of a call for those of `work` name its place."""
    try:
        yield
    except PromptError as error:
        raise GenarmError(f"{work[error.index].where}: {error.problem}") from error


def decode(
    decoder: "GuidedDecoder", requests: Sequence["Request"], compare: bool, batch_size: int
) -> Iterator[dict[str, "GenerationResult"]]:
    """The results of each request, in their order: its own, or with `compare` "unguided" and "guided"."""
    names = ("unguided", "guided") if compare else ("",)
    several = [replace(one, weights={}) if name == "unguided" else one for one in requests for name in names]
    finished: dict[int, GenerationResult] = {}
    start = 0
    try:
        for i, result in decoder.generate_each(several, batch_size=batch_size):
            finished[i] = result
            while all(start + k in finished for k in range(len(names))):
                yield {name: finished.pop(start + k) for k, name in enumerate(names)}
                start += len(names)
    except PromptError as error:
        raise PromptError(error.index // len(names), error.problem) from error


def to_record(sides: Mapping[str, "GenerationResult"]) -> dict[str, Any]:
    """What a line of results says about one prompt; a millionth of a nat is enough."""
    *_, result = sides.values()
    nats = {"logprobs": result.logprobs[0], "base_logprobs": result.base_logprobs[0]}
    record = {
        "text": result.texts[0],
        "finish_reason": result.finish_reasons[0],
        "tokens": result.tokens[0],
        **{name: [round(x, 6) for x in values] for name, values in nats.items()},
        "rewards": {name: [round(x, 6) for x in values] for name, (values,) in result.rewards.items()},
    }
    return record | ({"unguided": to_record({"": sides["unguided"]})} if "unguided" in sides else {})


def quiet() -> None:
    """Keeps transformers' warnings and bars off the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def load(
    base: str | None,
    arms: Mapping[str, str | None],
    tokenizer: str | None,
    device: str,
    dtype: str,
    backend: str,
    quantize: str | None,
) -> "GuidedDecoder":
    quiet()
    from .. import bundled
    from ..decoding.decoder import GuidedDecoder

    return GuidedDecoder.from_pretrained(
        bundled.path("base") if base is None else base,
        {name: bundled.path(name) if folder is None else folder for name, folder in arms.items()},
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        backend=backend,
        quantize=quantize,
    )
