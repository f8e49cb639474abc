"""``python -m app``: the demo on this machine."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from flowopd_eval.errors import RequestError
from flowopd_eval.records import DTYPES

_VOTES = Path("runs/app/votes.sqlite")
_RUNS = Path("runs")
_PORTS = 65535


def start(
    model: Annotated[str, typer.Option(help="Family to draw with: tiny or flow-opd.")] = "tiny",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER[@GUIDANCE]",
            help="A further model, drawn by its own record or with GUIDANCE; repeatable.",
        ),
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="Folder of finished runs (default: runs).")] = None,
    votes: Annotated[Path, typer.Option(help="SQLite file of the blind votes.")] = _VOTES,
    host: Annotated[str | None, typer.Option(help="Address to listen on (default: this machine only).")] = None,
    port: Annotated[
        int | None, typer.Option(help=f"Port from 1 to {_PORTS} (default: the first free one from 7860).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps (default: cuda where there is one).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the model's).")] = None,
) -> None:
    """Student against experts, in the browser."""
    _check(runs, host, port, dtype)
    _say(f"loading {model} and its judges; this may take a minute …")
    from app import ui
    from app.runs import Runs
    from app.session import Lora, Session
    from app.vote import Ballot
    from flowopd_eval.job import device_of

    loras = dict(Lora.named(text) for text in lora or ())
    ballot, finished = Ballot(votes), Runs(runs or _RUNS)
    if lacking := _lacking(model):
        _say(lacking)
        page = ui.start_page(model, lacking)
    else:
        session = Session(model, loras, device_of(device), dtype)
        page = ui.page(session, ballot, finished)
        _say(f"models: {', '.join(arm.name for arm in session.ready)} of {model}")
        _say(f"finished runs: {len(finished.names())} in {finished.root}")
        _say(f"votes: {votes}")
    try:
        _, url, _ = ui.serve(page, host, port, quiet=True, prevent_thread_lock=True)
        _say(f"open {url} in a browser; Ctrl+C ends the demo")
        page.block_thread()
    except OSError as error:
        if "empty port" not in str(error):
            raise
        raise RequestError(_no_port(port)) from None


def _say(text: str) -> None:
    """A line for whoever started the demo, at once, also through a pipe."""
    print(f"app: {text}", file=sys.stderr, flush=True)


def _unasked(record: logging.LogRecord) -> bool:
    """Not that a setting differs from the sampling record: here a visitor asked for it, and the page shows it."""
    return not record.getMessage().endswith("in the model's sampling record.")


def _check(runs: Path | None, host: str | None, port: int | None, dtype: str | None) -> None:
    """Raises ``RequestError`` for what can be refused before a model is loaded, which takes minutes for a real one."""
    if runs is not None and not runs.is_dir():
        raise RequestError(f"--runs {runs}: there is no such folder.")
    if dtype not in (None, *DTYPES):
        raise RequestError(f"--dtype {dtype}: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    if port is not None and not 1 <= port <= _PORTS:
        raise RequestError(f"--port {port}: expected a number from 1 to {_PORTS}.")
    _listen(host, 0, f"--host {host}: this machine cannot listen there; give an address of its own, or leave it out.")
    if port is not None:
        _listen(host, port, _no_port(port))


def _listen(host: str | None, port: int, refusal: str) -> None:
    """Raises ``RequestError`` with ``refusal`` where nothing can listen."""
    try:
        found = socket.getaddrinfo(host or "127.0.0.1", port, type=socket.SOCK_STREAM)[0]
        with socket.socket(*found[:2]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except OSError:
        raise RequestError(refusal) from None


def _no_port(port: int | None) -> str:
    if port is None:
        return "No port from 7860 on is free; choose one with --port."
    return f"--port {port} is taken; leave --port out or choose another."


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


def run() -> None:
    """Entry point: errors become one message on stderr and an exit code."""
    shown = logging.StreamHandler(sys.stderr)
    shown.addFilter(_unasked)
    logging.basicConfig(handlers=[shown], level=logging.WARNING, format="app: %(message)s")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        typer.run(start)
    except RequestError as error:
        print(f"app: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
