"""The commands: `genarm generate`, `genarm train`, `genarm bench`, `genarm info`."""

# torch and transformers, which take seconds, are imported where they are used: `genarm --help` must not wait for them.
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .. import arguments
from ..errors import GenarmError
from .generation import (
    as_chat,
    decode,
    identities,
    load,
    make_requests,
    naming,
    parse_arms,
    quiet,
    read_prompts,
    to_record,
)
from .results_file import Results
from .screen import Screen, progress

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
_input = partial(typer.Option, rich_help_panel="Prompts (standard input, one per line, if none are given)")
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
    quantize: Annotated[
        str | None, _models(metavar="int8", help="int8: weights in half the bytes of bfloat16, on a CPU.")
    ] = None,
    prompt: Annotated[list[str] | None, _input(metavar="TEXT", help="A prompt. Repeatable.")] = None,
    prompts: Annotated[
        Path | None,
        _input(
            metavar="FILE.jsonl",
            help='One line per prompt: {"prompt": "..."} or {"messages": [...]}; "id" and "weights" ({NAME: WEIGHT}) '
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
            help="Write one line per prompt there and show nothing. Run again, an interrupted run goes on.",
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
    if "" in (stop or []):
        raise GenarmError("--stop: expected a text that is not empty, got ''")
    arms, weights = parse_arms(base, arm or [], weight or [])
    work = read_prompts(prompt or [], prompts, arms)
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
    if quantize:
        settings["quantize"] = quantize
    if out:
        settings["identity"] = identities(base, arms, tokenizer)
    requests = make_requests(work, weights, seed, sampling)
    known = [
        {"index": i, **one.record(), "weights": request.weights, "seed": request.seed, "settings": settings}
        for i, (one, request) in enumerate(zip(work, requests, strict=True))
    ]
    results = Results(out, known) if out else None

    done = results.done if results else 0
    try:
        if done < len(work):
            decoder = load(base, arms, tokenizer, device, dtype, backend, quantize)
            if chat or (chat is None and decoder.tokenizer.chat_template):
                requests = [as_chat(one) for one in requests]
            with naming(work[done:]):
                decoder.check(requests[done:])
            screen = Screen(decoder.tokenizer, rewards and not results)
            if len(work) == 1 and not results and not compare:
                with naming(work):
                    screen.stream(decoder.stream(requests[0]), requests[0].weights or {})
                return
            with progress(screen.console, results is not None, len(work), done) as advance:
                # Blocks are cut alike however much is done, and begun at their first prompt, so that the float noise of
                # the forwards is the same too.
                block = _BATCHES_A_BLOCK * batch_size
                for start in range(done - done % block, len(work), block):
                    part = slice(start, start + block)
                    with naming(work[part]):
                        for i, sides in enumerate(decode(decoder, requests[part], compare, batch_size), start):
                            if i < done:
                                continue
                            if results:
                                results.append([to_record(sides)])
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
        quiet()
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
            "neither, separate, compile; on a CPU: torch-linear, int8, int8-base, and where it is installed llama.cpp, "
            "llama.cpp-base, llama.cpp-int8."
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
    quiet()
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
        decoder = load(base, parse_arms(base, arm or [], [])[0], None, device, dtype, "auto", None)
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


def _size(folder: Path) -> str:
    """The number of a model's parameters, from the head of its file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", "pt") as tensors:
            names = tensors.keys()
            return f"{sum(math.prod(tensors.get_slice(name).get_shape()) for name in names):,} parameters"
    except (OSError, SafetensorError):
        return f"missing: {folder}"
