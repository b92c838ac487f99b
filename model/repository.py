"""Repositories of the Hugging Face hub: fetching files at a commit, committing files, errors of one sentence."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, errors

from model.backbones.hub import brief
from model.backbones.variant import HUB_ID
from runtime.errors import ModelError, storage_fault

_log = logging.getLogger(__name__)
COMMIT = re.compile("[0-9a-f]{40}")
SECRET = re.compile(r"\b(?:hf|api_org)_\w+")
"""Tokens of the hub, wherever they come from."""


def split_name(name: str) -> tuple[str, str | None] | None:
    """(owner/name, revision) of `owner/name` or `owner/name@revision`; None for what is neither."""
    repository, at, revision = name.partition("@")
    if HUB_ID.fullmatch(repository) is None or bool(at) != bool(revision):
        return None
    return repository, revision or None


def fetch(
    repository: str,
    revision: str | None,
    files: Sequence[str],
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str]:
    """(folder, commit): the folder in the hub's cache with those of `files` that `repository` has at that commit.

    Args:
        revision: commit, tag or branch; None: the default branch. What may move is logged with its commit.
        token: None: HF_TOKEN, or that of `hf auth login`.
        cache_dir: None: the hub's own cache.
        local_files_only: read from the cache alone.

    Raises:
        ModelError: no such repository or revision, no access, or neither reachable nor in the cache.
    """
    with asking(repository, revision, token):
        place = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(files),
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    folder = Path(place)
    commit = folder.name
    if revision != commit:
        now = f"revision {revision}" if revision else "its default branch"
        _log.warning(f"{repository}: {now} is commit {commit} at present; pin it with '{repository}@{commit}'")
    return folder, commit


def commit(
    repository: str,
    folder: Path,
    files: Sequence[str],
    message: str,
    private: bool | None = None,
    branch: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Commit `files` of `folder` to `repository`, all in one commit; return the commit.

    Repository and branch are created if missing.

    Args:
        private: visibility of a new repository; None: the owner's default. Must not be True for a public one.
        branch: None: the default branch.
        token: as in `fetch`.

    Raises:
        ModelError: no access, or what the hub answered.
    """
    api = huggingface_hub.HfApi(token=token)
    with asking(repository, None, token, write=True):
        api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise ModelError(
                f"{repository}: is a public repository, and private=True was asked for; make it private in its"
                " settings, or choose another name"
            )
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        operations = [CommitOperationAdd(name, folder / name) for name in files]
        done: Any = api.create_commit(repository, operations, commit_message=message, revision=branch)
    return str(done.oid)


@contextmanager
def asking(
    repository: str, revision: str | None, token: str | bool | None = None, write: bool = False
) -> Iterator[None]:
    """Turn every error of the hub's client into one sentence, which never contains the token."""
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):
        # Such a header is refused by the HTTP library in an error that quotes it.
        raise ModelError(
            f"{repository}: the token is empty, or has a space, line break or other such character; correct it"
        )
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # from the hub's client or its HTTP library
        sentence = f"{repository}: {fault(error, revision, token is not None, write)}"
        secret = re.compile(f"{re.escape(token)}|{SECRET.pattern}") if isinstance(token, str) else SECRET
        quoted = secret.search("".join(str(link) for link in chain(error))) is not None
        raise ModelError(secret.sub("***", sentence)) from (None if quoted else error)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def fault(error: Exception, revision: str | None, with_token: bool, write: bool) -> str:
    """What went wrong, and what to do, of an error of the hub's client."""
    if isinstance(error, OSError) and (of_disk := storage_fault(error)) is not None:
        return of_disk
    answer = next((link for link in chain(error) if isinstance(link, errors.HfHubHTTPError)), None)
    log_in = "pass another token" if with_token else "log in with `hf auth login`, or pass token="
    status = None if answer is None else answer.response.status_code
    if isinstance(answer, errors.GatedRepoError):
        return f"is a gated repository; accept its terms on its page at the hub, and {log_in}"
    if isinstance(answer, errors.RevisionNotFoundError):
        return f"has no revision '{revision}'; give a commit, tag or branch that it has"
    if write and (status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError)):
        return f"the hub allows no writing to it; {log_in}, of an account that may write there"
    if isinstance(answer, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        return (
            "is no folder here, and the hub has no such repository, or a private one that you may not read; correct the"
            f" name, or {log_in}"
        )
    if answer is not None:
        return f"the hub answered {status} ({brief(answer)}); try again later"
    if isinstance(error, errors.HFValidationError):
        return f"is no name of a repository ({brief(error)}); give owner/name"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | errors.HTTPError):
        at = f" at revision {revision}" if revision else ""
        return (
            f"is not in the hub's cache{at}, and the hub is not reachable; go online once, or pass the folder of a copy"
        )
    return f"failed at the hub ({brief(error)}); correct that, or try again"
