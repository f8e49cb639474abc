"""From something on disk to a repository on the Hub: what it is decides what is uploaded; one commit, or none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowopd_eval.errors import RequestError, WorkError
from flowopd_eval.hub.metadata import front_matter
from flowopd_eval.hub.repository import Kind, Repository, refuse_secrets
from flowopd_eval.models import FAMILIES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
Say = Callable[[str], None]


def kind_of(source: str) -> Kind:
    """What ``source`` becomes: a run a dataset, a folder with the front matter of a Space one, all else an adapter.

    Raises:
        RequestError: it is the folder of a training run.
    """
    folder = Path(source)
    if source.partition(":")[0] in FAMILIES or source.startswith("hub:") or not folder.is_dir():
        return "model"
    if (folder / "adapter").is_dir():
        raise RequestError(f"{source} is a training run: push its adapter, {folder / 'adapter'}.")
    if (folder / "run.json").is_file():
        return "dataset"
    return "space" if "sdk" in front_matter(folder / "README.md") else "model"


def stage(source: str, name: str, runs: Sequence[Path], scratch: Path) -> Repository:
    """The repository ``name`` that ``source`` becomes; weights are written below ``scratch``, nothing is sent.

    Raises:
        RequestError: it may not be published, or not as asked; see the parts of this package.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        name_is_valid = False
    else:
        name_is_valid = _NAME.fullmatch(name) is not None
    if not name_is_valid:
        raise RequestError(f"Expected a repository as OWNER/NAME, but got {name!r}.")
    kind = kind_of(source)
    if runs and kind != "model":
        raise RequestError(f"--run gives the scores of an adapter, and {source} is a {kind}.")
    repository: Repository
    if kind == "dataset":
        from flowopd_eval.hub.datasets import run_repository

        repository = run_repository(Path(source), name)
    elif kind == "space":
        from flowopd_eval.hub.space import space_repository

        repository = space_repository(Path(source))
    else:
        from flowopd_eval.hub.layout import adapter_repository
        from flowopd_eval.hub.subject import read_subject

        repository = adapter_repository(read_subject(source), runs, name, scratch)
    refuse_secrets(repository)
    return repository


def upload(repository: Repository, name: str, *, public: bool) -> tuple[str, bool]:
    """Create ``name`` if need be, private unless ``public``, and upload in one commit; address, and whether it is new.

    The Hub keeps what arrived of a broken upload: the same call again sends the rest. Files that are there already are
    not sent, and without a change there is no commit.

    Raises:
        RequestError: no token, one that may not write there, no such owner, or a repository that is public already.
        WorkError: the connection broke, or somebody else changed the repository meanwhile.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if not get_token():
        raise RequestError(
            "There is no Hub token here: run `hf auth login`, or set HF_TOKEN, with a token that writes."
        )
    api, kind = HfApi(), repository.kind
    with _explained(name):
        api.create_repo(name, repo_type=kind, private=not public, exist_ok=True, space_sdk=repository.sdk)
        before: Any = api.repo_info(name, repo_type=kind)
        if not public and not before.private:
            raise RequestError(f"{name} is public: say --public if what is pushed may be, or name another repository.")
        there = [one.rfilename for one in before.siblings or ()]
        stale = [n for n in there if repository.owns(n) and n not in repository.files]
        additions = [CommitOperationAdd(path, content) for path, content in repository.files.items()]
        deletions = [CommitOperationDelete(path) for path in stale]
        commit = api.create_commit(
            name,
            [*deletions, *additions],
            repo_type=kind,
            commit_message="Published with flowopd-eval",
            parent_commit=before.sha,
        )
        if public and before.private:
            api.update_repo_settings(name, repo_type=kind, private=False)
    return address(api, name, kind, commit.oid), commit.oid != before.sha


def address(api: HfApi, name: str, kind: Kind, commit: str) -> str:
    """Where a commit is looked at."""
    return f"{api.endpoint}/{'' if kind == 'model' else f'{kind}s/'}{name}/tree/{commit}"


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turns what the Hub answers into words and remedies; no token, header or body is shown."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    again = "What arrived is kept there: give the same command again, and the rest is sent."
    try:
        yield
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
