"""The commands that publish and verify: `push` and `verify`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.job import device_of
from flowopd_eval.quiet import quiet_hub
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
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write all of it into a new folder, card included.")
    ] = None,
) -> None:
    """Publish an adapter with its card, a run as a dataset, or the app as a Space: private unless told otherwise.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from huggingface_hub.utils import disable_progress_bars

    from flowopd_eval.hub.layout import METRICS
    from flowopd_eval.hub.push import asked, stage, upload
    from flowopd_eval.hub.repository import CARD, write_files
    from flowopd_eval.hub.there import check_token, look, refuse

    disable_progress_bars()  # one for each of dozens of pictures
    with quiet_hub(), TemporaryDirectory(prefix="flowopd-push-") as scratch:
        with status("checking what is to be published"):
            kind = asked(source, name, runs or [])
            if not dry_run:
                check_token(name)
            there = (_guess if dry_run else look)(name, kind)
            repository = stage(source, name, runs or [], Path(scratch), there)
        _show(repository, name, there, public)
        _tell_lost_scores(there, repository, bool(runs))
        refuse(there, repository, name, public=public)
        if save:
            write_files(repository, save)
            typer.echo(f"Written to {save}; the card is {save / CARD}.")
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
    from huggingface_hub import get_token

    from flowopd_eval.hub.there import NO_TOKEN, There, look

    try:
        found = look(name, kind)
        if found.commit or get_token():
            return found
        why = f"there is none that can be seen without a Hub token; {NO_TOKEN}."
    except (RequestError, WorkError) as error:
        why = str(error)
    typer.echo(f"What lies at {name} is not known, nor what would be removed there: {why}", err=True)
    return There()


def _show(repository: Repository, name: str, there: There, public: bool) -> None:
    """Every file with its size and whether it is new there, and every one that goes, before anything is sent."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    from flowopd_eval.hub.there import removals

    typer.echo(f"{name}: {repository.kind}, {_visibility(there, public)}")
    table = Table(box=None, show_header=False)
    table.add_column(justify="right")
    for line, paths in _grouped(repository).items():
        states = Counter(there.state(path, repository.files[path]) for path in paths)
        told = next(iter(states)) if len(paths) == 1 else ", ".join(f"{n:,} {one}" for one, n in states.items() if one)
        table.add_row(decimal(sum(map(repository.size, paths))), told, Text(line))
    total = sum(map(repository.size, repository.files))
    table.add_row(decimal(total), "", f"in all, {len(repository.files):,} files", style="bold")
    for path in removals(there, repository):
        table.add_row("removed", "", Text(path))
    Console().print(table)
    for note in repository.notes:
        typer.echo(note)


def _grouped(repository: Repository) -> dict[str, list[str]]:
    """The lines of the list, each with its files: of a folder with many, a single one; of a Space's every folder."""
    parents = {
        path: path.partition("/")[0] if repository.kind == "space" else str(Path(path).parent)
        for path in repository.files
    }
    sizes, most = Counter(parents.values()), 3 if repository.kind == "space" else 30
    lines: dict[str, list[str]] = {}
    for path, parent in parents.items():
        if "/" not in path or sizes[parent] <= most:
            lines[path] = [path]
            continue
        what = "pictures" if all(one.endswith(".png") for one in parents if parents[one] == parent) else "files"
        lines.setdefault(f"{sizes[parent]:,} {what} in {parent}/", []).append(path)
    return lines


def _tell_lost_scores(there: There, repository: Repository, runs: bool) -> None:
    """That the card there shows scores, and the new one will not."""
    from flowopd_eval.hub.there import lost_scores

    if lost := ", ".join(lost_scores(there, repository)):
        why = "none of what --run names holds them" if runs else "no --run"
        typer.secho(
            f"{why}: the card loses its scores of {lost}; give --run RUN to keep them.",
            fg=typer.colors.YELLOW,
            err=True,
        )


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
    with quiet_hub(), progress_bar() as progress:
        source = f"hub:{name.removeprefix('hub:')}"
        resolved, verdicts = verifying.verify(source, pictures, device_of(device), progress)
    typer.echo(verifying.report(resolved, verdicts))
    wrong = [verdict.key for verdict in verdicts if verdict.contradictions]
    if wrong:
        raise WorkError(f"{resolved} is not what its card says: {', '.join(wrong)}.")
    if unjudged := [verdict.key for verdict in verdicts if verdict.difference is None]:
        raise WorkError(f"{resolved} was not judged again, which says nothing for its card: {', '.join(unjudged)}.")
