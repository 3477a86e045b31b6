"""The commands: `genarm generate`, `genarm train`, `genarm bench`, `genarm info`."""

# torch and transformers, which take seconds, are imported where they are used: `genarm --help` must not wait for them.
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .. import arguments
from ..errors import GenarmError, PromptError
from . import prompts as prompting
from .prompts import Prompt
from .results_file import Results
from .screen import Screen, progress

if TYPE_CHECKING:
    from ..decoding.decoder import GuidedDecoder
    from ..decoding.request import Request
    from ..decoding.results import GenerationResult

app = typer.Typer(
    help="Guide a frozen language model, token by token, with small autoregressive reward models (ARMs).",
    epilog='Example: genarm generate --prompt "How do I sleep better?" --compare',
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Usage errors of the parser. typer has had both click's and its own; BadParameter is the one it exports.
_UsageError: Any = typer.BadParameter.__mro__[1]

_models = partial(typer.Option, rich_help_panel="Models")
_input = partial(typer.Option, rich_help_panel="Prompts (standard input, one a line, if none are given)")
_sampling = partial(typer.Option, rich_help_panel="Sampling")
_output = partial(typer.Option, rich_help_panel="Output")

# Prompts that are decoded by one call, in batches: the rows of a file that finish early wait no longer than for these.
_BATCHES_A_BLOCK = 8


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command. A mistake of the user's ends in one line on stderr and exit status 2, a bug in its traceback."""
    try:
        status = app(argv, prog_name="genarm", standalone_mode=False)
    except GenarmError as error:
        status = _fail(str(error))
    except _UsageError as error:
        # The parser gives no context for an option that lacks its value; the command is then the first word.
        command = error.ctx.command_path if error.ctx else f"genarm {(argv or sys.argv[1:])[0]}"
        status = _fail(f"{error.format_message().rstrip('.')}; see {command} --help")
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # A stream cannot be written to. typer has dealt with a closed pipe.
        status = _fail(f"cannot write the output: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python holds back and writes at exit
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    sys.exit(status)


@app.command()
def generate(
    base: Annotated[
        str | None, _models(metavar="DIR", help="Folder or hub name of the base model; the bundled one if not given.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        _models(
            metavar="NAME=DIR[:WEIGHT]",
            help="An ARM (a model, or an adapter of the base) and its weight, 1 if not given. Repeatable. With neither "
            "--base nor --arm: the bundled ARMs, helpful and polite.",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None, _models(metavar="NAME=WEIGHT", help="The weight of an ARM, by its name. Repeatable.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        _models(metavar="DIR", help="Folder or hub name of the base's tokenizer, where it does not lie there."),
    ] = None,
    device: Annotated[str, _models(help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, _models(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    backend: Annotated[str, _models(help="auto (the fastest), or one that `genarm info` lists.")] = "auto",
    prompt: Annotated[list[str] | None, _input(metavar="TEXT", help="A prompt. Repeatable.")] = None,
    prompts: Annotated[
        Path | None,
        _input(
            metavar="FILE.jsonl",
            help='A line a prompt: {"prompt": "..."} or {"messages": [...]}; "id" and "weights" ({NAME: WEIGHT}) '
            "if you like.",
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        _input(
            "--chat/--no-chat",
            help="Send a text as a user's message, or as it is. Default: --chat if the base has a chat template.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, _sampling(min=1)] = 128,
    temperature: Annotated[float, _sampling(min=0, help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, _sampling(min=0, help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, _sampling(min=0, max=1, help="Keep the likeliest tokens of this mass.")] = 1.0,
    min_p: Annotated[float, _sampling(min=0, max=1, help="Keep tokens of this share of the likeliest's p.")] = 0.0,
    seed: Annotated[
        int, _sampling(help="Every prompt gets a seed of its own from it; the same one draws the same.")
    ] = 0,
    stop: Annotated[list[str] | None, _sampling(metavar="TEXT", help="End where this appears. Repeatable.")] = None,
    batch_size: Annotated[int, _sampling(min=1, help="Prompts decoded together; changes the speed alone.")] = 16,
    compare: Annotated[bool, _output("--compare", help="Unguided and guided side by side.")] = False,
    rewards: Annotated[
        bool,
        _output(
            "--rewards",
            help="Colour tokens by their advantage over the base, in nats: the sum of weight * (log ARM - log base). "
            "Piped: a table of each token's rewards (log ARM) and advantage.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        _output(
            metavar="FILE.jsonl",
            help="Write a line a prompt there and show nothing. Run again, an interrupted run goes on.",
        ),
    ] = None,
) -> None:
    """Continue prompts, guided by ARMs.

    \b
    Examples:
      genarm generate --prompt "How do I sleep better?" --compare
      genarm generate --prompt "How do I sleep?" --weight polite=0.5 --rewards
      genarm generate --base DIR --arm a=DIR:1.5 --prompts a.jsonl --out b.jsonl
      head -3 questions.txt | genarm generate --max-new-tokens 40
    """
    arguments.real("--temperature", temperature, 0)
    arms, weights = _arms(base, arm or [], weight or [])
    work = _prompts(prompt or [], prompts, arms)
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "stop": stop or [],
    }
    settings: dict[str, Any] = {
        "base": "bundled" if base is None else base,
        "arms": {name: "bundled" if folder is None else folder for name, folder in arms.items()},
        "tokenizer": tokenizer,
    }
    settings |= {**sampling, "chat": chat, "dtype": dtype, "compare": compare}
    if out:
        settings["identity"] = _identities(base, arms, tokenizer)
    requests = _requests(work, weights, seed, sampling)
    known = [
        {"index": i, **one.record(), "weights": request.weights, "seed": request.seed, "settings": settings}
        for i, (one, request) in enumerate(zip(work, requests, strict=True))
    ]
    results = Results(out, known) if out else None

    done = results.done if results else 0
    try:
        if done < len(work):
            decoder = _load(base, arms, tokenizer, device, dtype, backend)
            if chat or (chat is None and decoder.tokenizer.chat_template):
                requests = [_as_chat(one) for one in requests]
            with _named(work[done:]):
                decoder.check(requests[done:])
            screen = Screen(decoder.tokenizer, rewards and not results)
            if len(work) == 1 and not results and not compare:
                with _named(work):
                    screen.stream(decoder.stream(requests[0]), requests[0].weights or {})
                return
            with progress(screen.console, results is not None, len(work), done) as advance:
                # Blocks are cut alike however much is done, and begun at their first prompt, so that the float noise of
                # the forwards is the same too.
                block = _BATCHES_A_BLOCK * batch_size
                for start in range(done - done % block, len(work), block):
                    part = slice(start, start + block)
                    with _named(work[part]):
                        for i, sides in enumerate(_decode(decoder, requests[part], compare, batch_size), start):
                            if i < done:
                                continue
                            if results:
                                results.append([_record(sides)])
                            else:
                                title = f"=== {i + 1}/{len(work)}: {work[i].title()}\n" if len(work) > 1 else ""
                                screen.show(title, sides, requests[i].weights or {})
                            done += 1
                            advance(1)
    except KeyboardInterrupt:
        done = results.done if results else done
        _interrupted(f"{done} of {len(work)} done" + ("; run the same command again to go on" if results else ""))
    if results:
        typer.echo(f"{out}: {done} of {len(work)} prompts are done")


@app.command()
def train(
    context: typer.Context,
    base: Annotated[str, typer.Option(metavar="DIR", help="Folder or hub name of the model to start from.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|NAME",
            help="Preferences: a file (JSON lines, JSON, .gz, Parquet), a folder, or OWNER/NAME[:SPLIT] of the hub. "
            "The format is recognised: prompt, chosen, rejected; HH-RLHF, PKU-SafeRLHF, UltraFeedback, ...",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the ARM: a new or empty one.")],
    lora_r: Annotated[int, typer.Option(help="Rank of the adapter; 0 trains all the weights.")] = 8,
    beta: Annotated[float, typer.Option(help="Scale from nats to the logit of the preference.")] = 0.05,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 5e-4,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Pairs an optimiser step.")] = 32,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and response; what is cut is counted.")] = 1024,
    eval_fraction: Annotated[float, typer.Option(help="Fraction of the rows that is held out.")] = 0.05,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    lora_alpha: Annotated[int | None, typer.Option(help="Scale of the adapter; 2 * lora_r if not given.")] = None,
    lora_dropout: Annotated[float, typer.Option(help="Dropout before the adapter.")] = 0.05,
    warmup_steps: Annotated[
        int | None, typer.Option(help="100 if not given, but a tenth of the steps at most.")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(help="Forward passes a batch is split into, to save memory.")
    ] = 1,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; about ten a run if not given.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    seed: Annotated[int, typer.Option(help="Of the held-out rows, the adapter, the order and dropout.")] = 0,
    verbose: Annotated[bool, typer.Option("--verbose/--quiet", help="Show the loss as it falls.")] = True,
    objective: Annotated[
        str | None,
        typer.Option(metavar="better|safer", help="Which label of PKU-SafeRLHF to train on; better if not given."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse data with useless rows (equal, empty, tied) and name them.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show three examples, the tokens with loss marked; train nothing.")
    ] = False,
) -> None:
    """Train an ARM on preference pairs.

    \b
    Examples:
      genarm train --base DIR --data FILE.jsonl --out kind
      genarm train --base DIR --data Anthropic/hh-rlhf --out kind --dry-run
      genarm train --base DIR --data FILE.parquet --objective safer --out safe
      genarm train --base DIR --data FILE.jsonl --out kind --resume
    """
    try:
        _quiet()
        from ..training.arm import train_arm

        train_arm(**context.params)  # the options are train_arm's arguments, by the same names
    except KeyboardInterrupt:
        _interrupted("run the same command with --resume to go on")


@app.command()
def bench(
    base: Annotated[
        str, typer.Option(metavar="DIR|SHAPE", help="Folder, hub name, or a shape (llama-7b, ...) with random weights.")
    ] = "llama-271m",
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR|SHAPE|lora[:R]", help="Likewise, or an adapter of the base. Repeatable."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Prompts at once. Repeatable; 1 and 8 if left out.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded; slow loops stop at 64.")] = 256,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable: transformers, naive, paper, base, genarm; genarm with a switch: no-graph, no-streams, "
            "neither, separate, compile."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of which the median counts.")] = 3,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "bfloat16",
    allow_plain: Annotated[
        bool, typer.Option("--allow-plain", help="Measure models that decode in the plain loop too, not an error then.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the JSON file and the chart.")] = None,
) -> None:
    """Tokens/s of guided decoding against what people run today and against the weights' own floor.

    \b
    Examples:
      genarm bench --base llama-7b --arm llama-1b --batch 32 --out results
      genarm bench --base DIR --arm lora:8 --method base --method genarm
    """
    _quiet()
    from ..benchmark import speed as benchmark

    benchmark.bench(
        base,
        arm or ["llama-58m"],
        batches=batch or [1, 8],
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        methods=method or benchmark.DEFAULT_METHODS,
        rounds=rounds,
        device=device,
        dtype=dtype,
        allow_plain=allow_plain,
        out=out,
    )


@app.command()
def info(
    base: Annotated[str | None, typer.Option(metavar="DIR", help="Say how this model would be run.")] = None,
    arm: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="Likewise, an ARM of it. Repeatable.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where: auto (a GPU where there is one), cpu, cuda, cuda:1, ...")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="In: auto (as stored), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Versions, devices, backends (and why one is missing), bundled models.

    With --base or --arm: also whether these models decode on the fast path, and what is shared, compiled and captured.

    \b
    Examples:
      genarm info
      genarm info --base DIR --arm NAME=DIR
    """
    import platform
    from importlib.metadata import version

    import torch

    from genarm_kernels.backends import NAMES, cpu, why_unavailable

    from .. import bundled

    lines = [("genarm-kernels", version("genarm-kernels")), ("python", platform.python_version())]
    lines += [(name, version(name)) for name in ("torch", "transformers")]
    lines.append(("device cpu", f"{torch.get_num_threads()} threads"))
    lines += [(f"device cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    for name in NAMES:
        reason = why_unavailable(name)
        available = f"available, {cpu.instruction_set()}" if name == "cpu" and not reason else "available"
        lines.append((f"backend {name}", f"missing: {reason}" if reason else available))
    lines += [(f"model {name}", _size(bundled.path(name))) for name in bundled.NAMES]
    if base is not None or arm:
        decoder = _load(base, _arms(base, arm or [], [])[0], None, device, dtype, "auto")
        decoder.generate("How?", max_new_tokens=4)  # a step is captured when it is run for the second time
        lines += [(f"path {path.model}", str(path)) for path in decoder.paths]
    for name, value in lines:
        typer.echo(f"{name:<18}{value}")


def _fail(message: str) -> int:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


def _interrupted(message: str) -> NoReturn:
    typer.echo(f"interrupted: {message}", err=True)
    raise typer.Exit(130)


def _arms(
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


def _prompts(texts: Sequence[str], path: Path | None, arms: Iterable[str]) -> list[Prompt]:
    if texts and path:
        raise GenarmError("give --prompt or --prompts, not both")
    if texts:
        return prompting.from_texts(texts)
    if path:
        return prompting.from_jsonl(path, arms)
    if sys.stdin.isatty():
        raise GenarmError('no prompts: give --prompt "TEXT", --prompts FILE.jsonl, or standard input, one a line')
    return prompting.from_lines(sys.stdin.buffer, "standard input")


def _quiet() -> None:
    """Keeps transformers' warnings and bars off the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _identities(base: str | None, arms: Mapping[str, str | None], tokenizer: str | None) -> dict[str, str]:
    """What the models are by their content, each by the name that errors call it: a path can be given another model."""
    _quiet()
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


def _load(
    base: str | None,
    arms: Mapping[str, str | None],
    tokenizer: str | None,
    device: str,
    dtype: str,
    backend: str,
) -> "GuidedDecoder":
    _quiet()
    from .. import bundled
    from ..decoding.decoder import GuidedDecoder

    return GuidedDecoder.from_pretrained(
        bundled.path("base") if base is None else base,
        {name: bundled.path(name) if folder is None else folder for name, folder in arms.items()},
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        backend=backend,
    )


def _requests(
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


def _as_chat(request: "Request") -> "Request":
    """With its text as a user's message."""
    if not isinstance(request.prompt, str):
        return request
    return replace(request, prompt=[{"role": "user", "content": request.prompt}])


@contextmanager
def _named(work: Sequence[Prompt]) -> Iterator[None]:
    """Has errors about one prompt of a call for those of `work` name its place."""
    try:
        yield
    except PromptError as error:
        raise GenarmError(f"{work[error.index].where}: {error.problem}") from error


def _decode(
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


def _record(sides: Mapping[str, "GenerationResult"]) -> dict[str, Any]:
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
    return record | ({"unguided": _record({"": sides["unguided"]})} if "unguided" in sides else {})


def _size(folder: Path) -> str:
    """The number of a model's parameters, from the head of its file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", "pt") as tensors:
            names = tensors.keys()
            return f"{sum(math.prod(tensors.get_slice(name).get_shape()) for name in names):,} parameters"
    except (OSError, SafetensorError):
        return f"missing: {folder}"
