"""What lies in a repository on the Hub before a push: what the push would remove, and what it must leave alone.

A push writes down what it wrote, in ``pushed.json``. The next one removes of that what it does not write again, and
nothing else; and it overwrites the card only as long as it is the one that was written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.hub.repository import CARD, Content, Kind, Repository, json_bytes
from flowopd_eval.records import SETTINGS_FILE

PUSHED = "pushed.json"
NO_TOKEN = "run `hf auth login`, or set HF_TOKEN, with a token that writes"
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
    oids: Mapping[str, str] = field(default_factory=dict)  # file -> sha256 of a large one, git's hash of any other
    settings: Mapping[str, Any] = field(default_factory=dict)  # flow_opd.json, where an earlier push wrote it
    adapter_sha256: str | None = None  # of what an earlier push published
    scored: tuple[str, ...] = ()  # metric keys of an earlier push's card

    def state(self, path: str, content: Content) -> str:
        """What a push of ``content`` is to the file at ``path``: ``new``, ``changed``, ``same``; empty: not known."""
        if self.commit is None or path not in self.files:
            return "new" if self.commit else ""
        data, there = content if isinstance(content, bytes) else content.read_bytes(), self.oids.get(path, "")
        here = hashlib.sha256(data) if len(there) == 64 else hashlib.sha1(b"blob %d\0" % len(data) + data)
        return "" if not there else "same" if here.hexdigest() == there else "changed"


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
            found: Any = HfApi().repo_info(name, repo_type=kind, files_metadata=True)
        except RepositoryNotFoundError:
            return There()
        files = tuple(one.rfilename for one in found.siblings or ())
        card, pushed = content(CARD), content(PUSHED)
        wrote = _pushed(pushed, name) if pushed is not None else None
        ours = [file for file in (SETTINGS_FILE, "provenance.json", "metrics.json") if wrote and file in wrote.files]
        said = {file: _object(content(file)) for file in ours}
    return There(
        commit=found.sha,
        private=bool(found.private),
        files=files,
        card_sha256=None if card is None else hashlib.sha256(card).hexdigest(),
        pushed=wrote,
        oids={
            one.rfilename: oid for one in found.siblings or () if (oid := one.lfs.sha256 if one.lfs else one.blob_id)
        },
        settings=said.get(SETTINGS_FILE, {}),
        adapter_sha256=_object(said.get("provenance.json", {}).get("adapter")).get("sha256"),
        scored=tuple(_object(said.get("metrics.json", {}).get("metrics"))),
    )


def _object(value: Any) -> dict[str, Any]:
    """A JSON object, or the bytes of one; empty for anything else."""
    try:
        found = json.loads(value) if isinstance(value, bytes) else value
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


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


def lost_scores(there: There, repository: Repository) -> list[str]:
    """Metric keys that an earlier push's card shows, and this one's does not."""
    mine = repository.files.get("metrics.json")
    kept = _object(_object(mine).get("metrics")) if isinstance(mine, bytes) else {}
    return [key for key in there.scored if key not in kept]


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


def check_token(name: str) -> None:
    """Raises ``RequestError`` where one short question tells that this token cannot write to ``name``."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not get_token():
        raise RequestError(f"There is no Hub token here: {NO_TOKEN}.")
    with explained(name):
        try:
            who = HfApi().whoami()
        except HfHubHTTPError as error:
            if error.response.status_code == 401:
                raise
            return  # a Hub that does not tell
    role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
    owners = [who.get("name"), *(one.get("name") for one in who.get("orgs") or ())]
    owner = name.partition("/")[0]
    if role == "read":
        raise RequestError(f"{_token()[0]} may only read: make one that may write to {name}. Nothing was sent.")
    if role == "write" and owner.lower() not in [str(one).lower() for one in owners]:
        raise RequestError(
            f"{_token()[0]} may not write to {name}: it is of {', '.join(map(str, owners))}. Nothing was sent."
        )


def _token() -> tuple[str, str]:
    """Where the token comes from, and what helps where it is not valid."""
    from huggingface_hub import constants

    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(variable):
            return f"The token from {variable}", f"correct {variable}, or unset it and run `hf auth login`"
    if os.environ.get("HF_TOKEN_PATH"):
        path = constants.HF_TOKEN_PATH
        return (
            f"The token in {path} (HF_TOKEN_PATH)",
            "put another there, or unset HF_TOKEN_PATH and run `hf auth login`",
        )
    return "The token that `hf auth login` saved", "run `hf auth login` again"


@contextmanager
def explained(name: str, *, sending: bool = False) -> Iterator[None]:
    """Turns what the Hub answers into words and remedies; no token, header or body is shown.

    ``sending`` says that files are on their way, so that some may have arrived.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    again = "Nothing was sent: give the same command again."
    if sending:
        again = "What arrived is kept there: give the same command again, and the rest is sent."
    try:
        yield
    except OfflineModeIsEnabled as error:
        names = " and ".join(one for one in _OFFLINE if os.environ.get(one)) or _OFFLINE[0]
        raise RequestError(f"Offline mode is on, and nothing was sent: unset {names}, and push again.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            what, remedy = _token()
            raise RequestError(f"{what} is not known to the Hub: {remedy}.") from error
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
        why = type(error).__name__
        if sending:
            raise WorkError(f"The connection to the Hub broke ({why}). {again}") from error
        raise WorkError(f"The Hub at {constants.ENDPOINT} could not be reached ({why}). {again}") from error
