"""What lies in a repository on the Hub before a push: what the push would remove, and what it must leave alone.

A push writes down what it wrote, in ``pushed.json``. The next one removes of that what it does not write again, and
nothing else; and it overwrites the card only as long as it is the one that was written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.hub.repository import CARD, Kind, Repository, json_bytes

PUSHED = "pushed.json"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # the client obeys both


@dataclass(frozen=True)
class Pushed:
    """What an earlier push wrote: its files, and the hash of its card."""

    files: tuple[str, ...]
    card_sha256: str


@dataclass(frozen=True)
class There:
    """A repository as it is before a push. ``commit`` is None where there is none, or none that the token may see."""

    commit: str | None = None
    private: bool = True
    files: tuple[str, ...] = ()
    card_sha256: str | None = None
    pushed: Pushed | None = None


def sealed(repository: Repository) -> Repository:
    """The repository with the list of what this push writes."""
    record = {"files": sorted(repository.files), "card_sha256": _card_sha256(repository)}
    return replace(repository, files={**repository.files, PUSHED: json_bytes(record)})


def look(name: str, kind: Kind) -> There:
    """What lies at ``name`` now. Nothing is written.

    Raises:
        RequestError: offline mode is on, a token that the Hub does not know, or a damaged ``pushed.json``.
        WorkError: the Hub cannot be reached, or fails.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    def content(file: str) -> bytes | None:
        here = file in files
        return Path(hf_hub_download(name, file, repo_type=kind, revision=found.sha)).read_bytes() if here else None

    with explained(name):
        try:
            found: Any = HfApi().repo_info(name, repo_type=kind)
        except RepositoryNotFoundError:
            return There()
        files = tuple(one.rfilename for one in found.siblings or ())
        card, pushed = content(CARD), content(PUSHED)
    return There(
        commit=found.sha,
        private=bool(found.private),
        files=files,
        card_sha256=None if card is None else hashlib.sha256(card).hexdigest(),
        pushed=None if pushed is None else _pushed(pushed, name),
    )


def _pushed(content: bytes, name: str) -> Pushed:
    from pydantic import TypeAdapter

    try:
        return TypeAdapter(Pushed).validate_json(content)
    except ValueError as error:
        raise RequestError(
            f"{PUSHED} of {name} is damaged, so nobody can tell what an earlier push wrote there: delete it and {CARD} "
            "there, and push again; what is stale is then yours to remove."
        ) from error


def removals(there: There, repository: Repository) -> list[str]:
    """Files that an earlier push wrote and this one does not write again."""
    written = set(there.pushed.files) if there.pushed else set()
    return [file for file in there.files if file in written and file not in repository.files and file != PUSHED]


def refuse(there: There, repository: Repository, name: str, *, public: bool) -> None:
    """Raises ``RequestError`` where a push would show to everybody, or overwrite, what nobody said it may."""
    if not public and not there.private:
        raise RequestError(f"{name} is public: say --public if what is pushed may be, or name another repository.")
    if there.card_sha256 not in _known_cards(there, repository):
        raise RequestError(
            f"{CARD} of {name} was written or edited by hand, and a push would overwrite it: save what you want to "
            f"keep, delete {CARD} there (Files and versions), push again, and add your words to the new card."
        )


def _known_cards(there: There, repository: Repository) -> set[str | None]:
    """Hashes of what may be overwritten: no card, an earlier push's, this one's; of a Space, whose own it is, any."""
    if repository.kind == "space":
        return {there.card_sha256}
    return {None, _card_sha256(repository), there.pushed.card_sha256 if there.pushed else None}


def _card_sha256(repository: Repository) -> str:
    card = repository.files[CARD]
    return hashlib.sha256(card if isinstance(card, bytes) else card.read_bytes()).hexdigest()


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns what the Hub answers into words and remedies; no token, header or body is shown."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    again = "What arrived is kept there: give the same command again, and the rest is sent."
    try:
        yield
    except OfflineModeIsEnabled as error:
        names = " and ".join(one for one in _OFFLINE if os.environ.get(one)) or _OFFLINE[0]
        raise RequestError(f"Offline mode is on, and nothing was sent: unset {names}, and push again.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise RequestError("The Hub does not know this token: run `hf auth login` again.") from error
        if status == 403:
            raise RequestError(f"This token may not write to {name}: make one with write access to it.") from error
        if status == 404:
            raise RequestError(f"The Hub has no {name} for this token, and could not create it.") from error
        if status in (409, 412):
            raise WorkError(f"{name} was changed by somebody else while this was uploaded. {again}") from error
        if status == 400:
            raise WorkError(
                f"The Hub refused what was sent to {name}: {error.server_message or 'no reason'}."
            ) from error
        raise WorkError(f"The Hub failed with status {status} on {name}. {again}") from error
    except ValueError as error:  # the client's own word for metadata that the Hub refuses
        if isinstance(error, RequestError):
            raise
        raise WorkError(f"The Hub refused the card of {name}: {error}") from error
    except (HTTPError, OSError, RuntimeError) as error:  # the client wraps a failed upload of a file in RuntimeError
        raise WorkError(f"The connection to the Hub broke ({type(error).__name__}). {again}") from error
