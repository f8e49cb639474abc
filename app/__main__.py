"""``python -m app``: the demo on this machine."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from flowopd_eval.errors import RequestError
from flowopd_eval.terminal import status

_VOTES = Path("runs/app/votes.sqlite")
_RUNS = Path("runs")


def start(
    model: Annotated[str, typer.Option(help="Family to draw with: tiny or flow-opd.")] = "tiny",
    lora: Annotated[list[str] | None, typer.Option(metavar="NAME=SOURCE", help="A further model; repeatable.")] = None,
    runs: Annotated[Path | None, typer.Option(help="Folder of finished runs (default: runs, if there is one).")] = None,
    votes: Annotated[Path, typer.Option(help="SQLite file of the blind votes.")] = _VOTES,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default: this machine only).")] = None,
    port: Annotated[int | None, typer.Option(help="Port (default: the first free one from 7860).")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps (default: cuda where there is one).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the model's).")] = None,
) -> None:
    """Student against experts, in the browser."""
    loras = dict(_named(text) for text in lora or ())
    shown = runs or (_RUNS if _RUNS.is_dir() else None)
    with status(f"loading {model}"):
        from app import ui
        from app.runs import Runs
        from app.session import Session
        from app.vote import Ballot
        from flowopd_eval.job import device_of

        ballot, finished = Ballot(votes), Runs(shown) if shown else None
        if lacking := _lacking(model):
            print(f"app: {lacking}", file=sys.stderr)
            page = ui.start_page(model, lacking)
        else:
            page = ui.page(Session(model, loras, device_of(device), dtype), ballot, finished)
    ui.serve(page, host, port)


def _lacking(model: str) -> str:
    """Why a published family's backbone cannot be had: its licence, or no network; empty where it can."""
    from flowopd_eval.models import FAMILIES, fetch_base

    if model not in FAMILIES or not FAMILIES[model].base.startswith("hub:"):
        return ""
    try:
        fetch_base(FAMILIES[model].base)
    except RequestError as error:
        return str(error)
    return ""


def _named(text: str) -> tuple[str, str]:
    name, sign, source = text.partition("=")
    if not (sign and name and source):
        raise RequestError(f"--lora {text}: expected NAME=SOURCE, such as mine=runs/train/mine.")
    return name, source


def run() -> None:
    """Entry point: errors become one message on stderr and an exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="app: %(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        typer.run(start)
    except RequestError as error:
        print(f"app: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
