"""Files of a Hub repository at a revision, through the real client, its errors put into words and remedies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from flowopd_eval.errors import RequestError


def fetch_files(source: str, patterns: Sequence[str]) -> tuple[Path, str]:
    """Folder with the files of ``hub:REPO[@REVISION]`` that match ``patterns``, and ``hub:REPO@COMMIT``.

    Without a revision, the repository's default branch. What is cached is not downloaded again; without a network the
    cache serves.

    Raises:
        RequestError: gated, no such repository or revision, or neither network nor cache.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = source.removeprefix("hub:").partition("@")
    with _explained(repo, revision):
        cached_only = not hub_answers()
        folder = Path(
            snapshot_download(
                repo, revision=revision or None, allow_patterns=list(patterns), local_files_only=cached_only
            )
        )
    return folder, f"hub:{repo}@{folder.name}"


def commit_of(source: str) -> str | None:
    """``hub:REPO@COMMIT`` of ``hub:REPO[@REVISION]``, as the Hub has it now; None where the Hub cannot be asked.

    Unlike :func:`fetch_files`, no cache answers for a Hub that refuses.

    Raises:
        RequestError: gated, no such repository or revision for this token, or a token that the Hub does not know.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    repo, _, revision = source.removeprefix("hub:").partition("@")
    if not hub_answers():
        return None
    with _explained(repo, revision):
        try:
            return f"hub:{repo}@{HfApi().model_info(repo, revision=revision or None).sha}"
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise RequestError(
                    f"The Hub refuses {repo} to this token: run `hf auth login` again with one that may read it."
                ) from error
            return None
        except (HTTPError, OSError):
            return None


def list_files(source: str) -> list[str]:
    """Names of all files of ``hub:REPO[@REVISION]``. Raises as :func:`fetch_files`."""
    from huggingface_hub import list_repo_files

    repo, _, revision = source.removeprefix("hub:").partition("@")
    with _explained(repo, revision):
        if not hub_answers():
            raise ConnectionError
        return list_repo_files(repo, revision=revision or None)


def hub_answers() -> bool:
    """Whether the Hub can be reached from here: one short try a process.

    Without a network the client would repeat every request for half a minute, and say so each time.
    """
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)


@cache
def _answers(endpoint: str) -> bool:
    from huggingface_hub import get_session
    from huggingface_hub.errors import HTTPError

    try:
        get_session().head(endpoint, timeout=10)
    except (HTTPError, OSError):
        return False
    return True


@contextmanager
def _explained(repo: str, revision: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise RequestError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo} and run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise RequestError(f"{repo} has no revision {revision!r}; name a branch, a tag or a commit.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        from huggingface_hub import get_token

        seen = "this token may see." if get_token() else "can be seen without a token: correct the name, or log in."
        raise RequestError(f"There is no repository {repo!r} on the Hub that {seen}") from error
    except (LocalEntryNotFoundError, HTTPError, ConnectionError) as error:  # HTTPError: also of no connection at all
        raise RequestError(
            f"Could not get {repo} from the Hub ({type(error).__name__}), and it is not in the local cache. Check "
            f"the network; or, on a machine that has one (where its licence, if it has any, is accepted and `hf auth "
            f"login` done), `hf download {repo}`, and copy that machine's Hugging Face cache here (HF_HOME, usually "
            "~/.cache/huggingface)."
        ) from error
