"""The commands that publish and verify: `push` and `verify`."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.job import device_of
from flowopd_eval.terminal import progress_bar, status

if TYPE_CHECKING:
    from flowopd_eval.hub.repository import Kind, Repository
    from flowopd_eval.hub.there import There


def push(
    source: Annotated[
        str, typer.Argument(metavar="WHAT", help="Adapter (folder, file, known name), folder of a run, or of the app.")
    ],
    name: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hub, OWNER/NAME.")],
    runs: Annotated[
        list[Path] | None, typer.Option("--run", help="Run whose scores go onto an adapter's card; repeatable.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="For everybody to see (default: private).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded; send nothing.")] = False,
) -> None:
    """Publish an adapter with its card, a run as a dataset, or the app as a Space: private unless told otherwise.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from huggingface_hub.utils import disable_progress_bars

    from flowopd_eval.hub.layout import METRICS
    from flowopd_eval.hub.push import stage, upload
    from flowopd_eval.hub.there import look, refuse

    disable_progress_bars()  # one for each of dozens of pictures
    with TemporaryDirectory(prefix="flowopd-push-") as scratch:
        with status("checking what is to be published"):
            repository = stage(source, name, runs or [], Path(scratch))
            there = (_guess if dry_run else look)(name, repository.kind)
        _show(repository, name, there, public)
        refuse(there, repository, name, public=public)
        if dry_run:
            typer.echo("Dry run: nothing was sent.")
            return
        with status(f"uploading to {name}"):
            done = upload(repository, name, there, public=public)
    typer.echo(f"{'Published' if done.committed else 'No file has changed'}: {done.address}")
    if done.opened and there.commit:
        typer.echo(f"{name} was private, and is public now.")
    if METRICS in repository.files:
        typer.echo(f"Check it as anybody can: flowopd-eval verify {name}")


def _guess(name: str, kind: Kind) -> There:
    """What lies at ``name``, for a dry run, which needs no Hub: where it cannot be asked, nothing, with a word."""
    from flowopd_eval.hub.there import There, look

    try:
        return look(name, kind)
    except (RequestError, WorkError) as error:
        typer.echo(f"What lies at {name} is not known, nor what would be removed there: {error}", err=True)
        return There()


def _show(repository: Repository, name: str, there: There, public: bool) -> None:
    """Every file with its size, and every one that goes, before anything is sent."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    from flowopd_eval.hub.there import removals

    sizes = {path: repository.size(path) for path in repository.files}
    typer.echo(f"{name}: {repository.kind}, {_visibility(there, public)}")
    table = Table(box=None, show_header=False)
    table.add_column(justify="right")
    pictures = [path for path in sizes if path.endswith(".png") and "/" in path]
    for path in sizes:
        if len(pictures) <= 30 or path not in pictures:
            table.add_row(decimal(sizes[path]), Text(path))
    if len(pictures) > 30:
        table.add_row(decimal(sum(sizes[path] for path in pictures)), f"{len(pictures):,} pictures")
    table.add_row(decimal(sum(sizes.values())), f"in all, {len(sizes):,} files", style="bold")
    for path in removals(there, repository):
        table.add_row("removed", Text(path))
    Console().print(table)
    for note in repository.notes:
        typer.echo(note)


def _visibility(there: There, public: bool) -> str:
    """Who will see it."""
    if public and there.commit and there.private:
        return "private until now, public from this push on"
    return "public" if public else "private"


def verify(
    name: Annotated[str, typer.Argument(metavar="REPO", help="What `push` made: OWNER/NAME or OWNER/NAME@REVISION.")],
    pictures: Annotated[int, typer.Option(min=8, help="Prompts of each metric to draw again.")] = 32,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps (default: cuda where there is one).")
    ] = None,
) -> None:
    """Draw some of a card's own pictures again, judge them, and say whether they are what the card says.

    Which ones is decided by the repository's commit. Exit code 1 where they are not, or were not judged again.
    """
    from huggingface_hub.utils import disable_progress_bars

    from flowopd_eval.hub import verify as verifying

    disable_progress_bars()
    with progress_bar() as progress:
        source = f"hub:{name.removeprefix('hub:')}"
        resolved, verdicts = verifying.verify(source, pictures, device_of(device), progress)
    typer.echo(verifying.report(resolved, verdicts))
    wrong = [verdict.key for verdict in verdicts if verdict.contradictions]
    if wrong:
        raise WorkError(f"{resolved} is not what its card says: {', '.join(wrong)}.")
    if unjudged := [verdict.key for verdict in verdicts if verdict.difference is None]:
        raise WorkError(f"{resolved} was not judged again, which says nothing for its card: {', '.join(unjudged)}.")
