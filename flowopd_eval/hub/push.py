"""From something on disk to a repository on the Hub: what it is decides what is uploaded; one commit, or none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flowopd_eval.errors import RequestError
from flowopd_eval.hub.metadata import front_matter
from flowopd_eval.hub.repository import Kind, Repository, refuse_secrets
from flowopd_eval.hub.there import There, explained, look, refuse, removals, sealed
from flowopd_eval.models import FAMILIES

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


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


def asked(source: str, name: str, runs: Sequence[Path]) -> Kind:
    """What ``source`` becomes as the repository ``name``. Raises ``RequestError`` where that cannot be asked so."""
    _check_name(name)
    kind = kind_of(source)
    if runs and kind != "model":
        raise RequestError(f"--run gives the scores of an adapter, and {source} is a {kind}.")
    return kind


def stage(source: str, name: str, runs: Sequence[Path], scratch: Path, there: There | None = None) -> Repository:
    """The repository ``name`` that ``source`` becomes; weights are written below ``scratch``, nothing is sent.

    ``there`` is what lies at ``name``: an adapter that was pushed there before keeps its sampling record.

    Raises:
        RequestError: it may not be published, or not as asked; see the parts of this package.
    """
    kind = asked(source, name, runs)
    repository: Repository
    if kind == "dataset":
        from flowopd_eval.hub.datasets import run_repository

        repository = sealed(run_repository(Path(source), name))
    elif kind == "space":
        from flowopd_eval.hub.space import space_repository

        repository = sealed(space_repository(Path(source)))
    else:
        from flowopd_eval.hub.layout import adapter_repository
        from flowopd_eval.hub.subject import read_subject

        repository = sealed(adapter_repository(read_subject(source, there), runs, name, scratch))
    refuse_secrets(repository)
    return repository


def _check_name(name: str) -> None:
    """Raises ``RequestError`` for a name that the Hub would not take."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        if not _NAME.fullmatch(name):
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise RequestError(f"Expected a repository as OWNER/NAME, but got {name!r}: {error}") from error


@dataclass(frozen=True)
class Outcome:
    """What an upload did: where it is looked at, whether files were committed, and whether it made all of it public."""

    address: str
    committed: bool
    opened: bool


def upload(repository: Repository, name: str, there: There, *, public: bool) -> Outcome:
    """Make ``name``, which is as ``there`` says, hold ``repository``, in one commit; private unless ``public``.

    A repository that is not there is created. The Hub keeps what arrived of a broken upload: the same call again sends
    the rest. Files that are there already are not sent, and without a change there is no commit.

    Raises:
        RequestError: a token that may not write there, no such owner, or what :mod:`flowopd_eval.hub.there`
            refuses.
        WorkError: the connection broke, or somebody else has changed the repository since ``there``.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, kind = HfApi(), repository.kind
    with explained(name):
        if there.commit is None:
            api.create_repo(name, repo_type=kind, private=not public, exist_ok=True, space_sdk=repository.sdk)
            there = look(name, kind)
    refuse(there, repository, name, public=public)
    with explained(name, sending=True):
        additions = [CommitOperationAdd(path, content) for path, content in repository.files.items()]
        commit = api.create_commit(
            name,
            [*map(CommitOperationDelete, removals(there, repository)), *additions],
            repo_type=kind,
            commit_message="Published with flowopd-eval",
            parent_commit=there.commit,
        )
        if opens := public and there.private:
            api.update_repo_settings(name, repo_type=kind, private=False)
    return Outcome(address(api, name, kind, commit.oid), commit.oid != there.commit, opens)


def address(api: HfApi, name: str, kind: Kind, commit: str) -> str:
    """Where a commit is looked at."""
    return f"{api.endpoint}/{'' if kind == 'model' else f'{kind}s/'}{name}/tree/{commit}"
