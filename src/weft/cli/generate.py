"""``weft generate``: answers to prompts, as they come."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from weft.cli import show
from weft.cli.options import Base, Dtype, OtherBase, Quiet, Usage
from weft.errors import DataError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", show_default=False, help="One or more; default: what comes on stdin."),
    ] = None,
    base: Base = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="PATH",
            help="Directory of an adapter, or of a run; default: the base alone. With --jsonl NAME=PATH, as often as there are adapters;"
            " or the folder of a many-run.",
        ),
    ] = None,
    jsonl: Annotated[
        str | None,
        typer.Option(
            "--jsonl",
            metavar="FILE",
            help='Requests {"prompt", "adapter"}, each answered by its own adapter in one batch; adapter: a name, null, or weights by name.',
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Requests of --jsonl at once.")] = 32,
    file: Annotated[
        str | None, typer.Option("--file", metavar="FILE", help="Prompts, one a line; -: from stdin.")
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", metavar="FILE", help="An image that the prompt is about; may be repeated."),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", show_default=False, help="Use the chat template; default: as the adapter was trained."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Longest answer in tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="X", help="0: always the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", metavar="P", help="Draw from the likeliest tokens that have this probability together."
        ),
    ] = 1.0,
    top_k: Annotated[
        int, typer.Option("--top-k", metavar="N", help="Draw from so many of the likeliest tokens; 0: all.")
    ] = 0,
    penalty: Annotated[
        float,
        typer.Option("--repetition-penalty", metavar="X", help="Above 1: tokens that were there become less likely."),
    ] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of the draw.")] = None,
    dtype: Dtype = None,
    other: OtherBase = False,
    json: Annotated[
        bool, typer.Option("--json", help="One line of JSON a prompt: prompt, text; answered in batches.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Answer prompts, with an adapter or the base alone."""
    given = list(adapter or [])
    if jsonl is not None and (prompts or file is not None):
        raise Usage("requests stand in --jsonl, so no other prompts can be given")
    if jsonl is None and len(given) > 1:
        raise Usage("several adapters answer the rows of --jsonl FILE; for prompts give one --adapter")
    if jsonl is not None and image:
        raise Usage("--image belongs to prompts on the command line; --jsonl takes text alone")
    asked = _prompts(prompts or [], file) if jsonl is None else []
    shown = list(image) if image else None
    from weft.train import Sampling, stream
    from weft.train import generate as run_generation
    from weft.train.opening import opened

    sampling = Sampling(
        max_new_tokens=tokens, temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=penalty, seed=seed
    )
    if jsonl is not None:
        return _mixed(
            given,
            jsonl,
            {
                "base": base,
                "chat": chat,
                "sampling": sampling,
                "batch_size": batch,
                "dtype": dtype,
                "allow_other_base": other,
            },
        )
    seeing = None if shown is None else "image-text"
    with opened(base, given[0] if given else None, dtype=dtype, kind=seeing, allow_other_base=other) as ready:
        loaded = ready.model, ready.tokenizer
        if json:
            texts = run_generation(
                base=loaded,
                adapter=ready.adapter,
                prompts=asked,
                images=None if shown is None else [shown] * len(asked),
                chat=chat,
                sampling=sampling,
                allow_other_base=other,
            )
            for prompt, text in zip(asked, texts, strict=True):
                show.as_json({"prompt": prompt, "text": text}, indent=None)
            return
        for index, prompt in enumerate(asked):
            if len(asked) > 1:
                show.result(("\n" if index else "") + f"> {prompt}")
            for piece in stream(
                base=loaded,
                adapter=ready.adapter,
                prompt=prompt,
                images=shown,
                chat=chat,
                sampling=sampling,
                allow_other_base=other,
            ):
                show.piece(piece)
            show.result()


def _mixed(given: list[str], file: str, settings: dict[str, Any]) -> None:
    """Answer requests, a line of JSON each: what stood in the request, and the text."""
    from weft.many.answers import answer, find_adapters, read_requests

    requests = read_requests(file)
    texts = answer(adapters=find_adapters(given), requests=requests, **settings)
    for request, text in zip(requests, texts, strict=True):
        show.as_json({**(request.row or {}), "text": text}, indent=None)


def _prompts(given: list[str], file: str | None) -> list[str]:
    """The prompts of the command line, of a file, or all of stdin as one prompt.

    Raises:
        Usage: none, or from two places.
        DataError: a file that can't be read, or that has none.
    """
    if given and file is not None:
        raise Usage("prompts stand on the command line and in --file; give one of them")
    if given:
        return given
    if file is None and sys.stdin.isatty():
        raise Usage('give a prompt, as in: weft generate "Once upon a time"; or --file FILE; or text on stdin')
    text = sys.stdin.read() if file in (None, "-") else _read(str(file))
    found = [line for line in text.splitlines() if line.strip()] if file is not None else [text.rstrip("\n")]
    if not any(line.strip() for line in found):
        raise DataError(f"{'stdin' if file in (None, '-') else file}: expected a prompt, got nothing but white space")
    return found


def _read(file: str) -> str:
    try:
        with open(file, encoding="utf-8") as handle:
            return handle.read()
    except OSError as error:
        raise DataError(f"{file}: these prompts can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: these prompts are no UTF-8 text: {error.reason} at byte {error.start:,}") from error
