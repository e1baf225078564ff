"""The Hugging Face Hub: checkpoints come from it, artifacts are published on it.

A download takes what a checkpoint is made of and nothing else: safetensors, JSON, the tokenizer, the chat template.
Pickled weights and Python code are never fetched. An upload is one commit, made on the very revision that was looked
at, so that nothing a person put there in the meantime is lost.

Left out: branches, pull requests and changing who can see a repository, all of which the Hub's own tools do.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, validate_repo_id

from hf_fedlarge.artifacts import MANIFEST_NAME, MAX_MANIFEST_BYTES, UNPUBLISHED_FILES, manifest_kind, verify_files
from hf_fedlarge.cards import MARKER, PublishedManifest, read_published, render_card
from hf_fedlarge.errors import ArtifactError, ConfigError, FedLargeError, HubError
from hf_fedlarge.untrusted import CODE_SUFFIXES, COMPANIONS, parse_json

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"
# Where the card goes when a README stands there that we did not write.
OTHER_CARD_NAME = "FEDLARGE.md"
_ANSWER_SECONDS = 300  # without a byte

# README.md declares the licence, and the manifest says what a published model was merged from.
_CHECKPOINT_FILES = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "README.md",
    MANIFEST_NAME,
    *COMPANIONS,
]
# The patterns' star matches slashes too; folders hold other formats or chat templates besides the default one, and
# `consolidated` the same weights once more.
_NOT_OURS = ["*/*", "consolidated*", *(f"*{suffix}" for suffix in CODE_SUFFIXES)]


def resolve_checkpoint(checkpoint: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The directory of a checkpoint, which is downloaded if it is named by its Hub id.

    Args:
        checkpoint: a local directory, which comes first, or a Hub id such as `owner/name`.
        revision: branch, tag or commit on the Hub; its main branch where None.

    Returns:
        The directory, and the commit it was downloaded from (None for a local directory).

    Raises:
        ConfigError: neither a directory nor a possible Hub id, or a revision of a local directory.
        ArtifactError: no such directory, or what is there is not a checkpoint.
        HubError: the Hub has no such model, wants a login, or can't be reached.
    """
    if not checkpoint:
        raise ConfigError("The checkpoint is an empty string; give a directory or a Hub id such as owner/name.")
    path = Path(os.path.expanduser(checkpoint))
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"{checkpoint} is a local directory, which has no revision {revision!r}; leave that out.")
        _require(path, "config.json", checkpoint)
        return path, None
    if path.exists():
        raise ArtifactError(
            f"{checkpoint} is a file; expected a checkpoint's directory or a Hub id such as owner/name."
        )
    if checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1:
        raise ArtifactError(f"{checkpoint}: no such directory; check the path, or give a Hub id such as owner/name.")
    _check_id(checkpoint, "neither a directory here nor a Hub id")
    with _explained(checkpoint, revision=revision):
        snapshot = Path(
            snapshot_download(
                checkpoint, revision=revision, allow_patterns=_CHECKPOINT_FILES, ignore_patterns=_NOT_OURS
            )
        )
    _require(snapshot, "config.json", f"{checkpoint} on the Hub")
    _require(snapshot, "*.safetensors", f"{checkpoint} on the Hub")
    return snapshot, snapshot.name


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The directory of a package, or that of a checkpoint as `resolve_checkpoint` finds it.

    Raises:
        ConfigError: a revision of a package, or as `resolve_checkpoint`.
        ArtifactError, HubError: as `resolve_checkpoint`.
    """
    path = Path(os.path.expanduser(model))
    if manifest_kind(path) != "package":
        return resolve_checkpoint(model, revision)[0]
    if revision is not None:
        raise ConfigError(f"{model} is a package, which has no revision {revision!r}; leave that out.")
    return path


def is_reachable(repo_id: str, timeout: float = 5.0) -> bool:
    """Whether the Hub answers for this model within `timeout` seconds."""
    try:
        HfApi().model_info(repo_id, timeout=timeout)
    except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return False
    return True


def push(
    directory: Path,
    repo_id: str,
    *,
    private: bool = True,
    summary: Path | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Publish a package, an adapter or a merged checkpoint with its model card, in one commit.

    The card becomes README.md, unless the repository or the artifact has a README.md that hf-fedlarge did not write:
    that one stays, the card becomes FEDLARGE.md, and a warning says so. Files of an artifact that was published there
    before and are no longer part of it are deleted, or a loader might find the old weights beside the new.
    Nothing is written into `directory`.

    Args:
        directory: the artifact.
        repo_id: `owner/name`; created if it isn't there.
        private: only the owner may see it. A repository that is public already is refused then; none is ever
            changed from private to public.
        summary: the `summary.json` of the run that made it, for the card's figures.
        commit_message: the commit's title; says what was published where None.
        token: a token that may write; the login of `hf auth login` where None.

    Returns:
        The address of the commit, the latest one where nothing had changed.

    Raises:
        ConfigError: `repo_id` is not `owner/name`.
        ArtifactError: the directory or the summary is damaged or of another kind, or the summary is of another run.
        HubError: the Hub refused, can't be reached, or the repository holds something else.
    """
    _check_id(repo_id, "not a Hub id")
    if "/" not in repo_id:
        raise ConfigError(f"{repo_id!r} names no owner; write it as owner/{repo_id}.")
    manifest = read_published(directory)
    verify_files(directory, manifest, published=True, unneeded=UNPUBLISHED_FILES)
    card = render_card(directory, repo_id, _read_summary(summary))
    api = HfApi(token=token)
    with _explained(repo_id, writing=True):
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        if private and info.private is False:
            raise HubError(f"{repo_id} exists and is public; choose another repository, or ask for public (--public).")
        if not private and info.private:
            logger.warning("%s exists and is private; it stays private until its settings are changed.", repo_id)
        present = {sibling.rfilename for sibling in info.siblings or []}

        def remote(name: str) -> str | None:
            if name not in present:
                return None
            path = Path(api.hf_hub_download(repo_id, name, revision=info.sha))
            if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
                raise HubError(f"{name} of {repo_id} has {size} bytes; expected at most {MAX_MANIFEST_BYTES}.")
            return path.read_text(encoding="utf-8", errors="replace")

        operations = _plan(directory, manifest, card, repo_id, present, remote(CARD_NAME), remote(MANIFEST_NAME))
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Publish {manifest.kind} {manifest.digest[:12]} (hf-fedlarge)",
            parent_commit=info.sha,
        )
    return commit.commit_url


def _plan(
    directory: Path,
    manifest: PublishedManifest,
    card: str,
    repo_id: str,
    present: set[str],
    readme: str | None,
    published: str | None,
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What the commit adds and deletes; `readme` and `published` are the repository's README and manifest."""
    contents: dict[str, Path | bytes] = {
        name: directory / name for name in [*manifest.files, MANIFEST_NAME] if name not in UNPUBLISHED_FILES
    }
    theirs = readme is not None and MARKER not in readme
    if theirs:
        contents.pop(CARD_NAME, None)
    name = OTHER_CARD_NAME if theirs or CARD_NAME in contents else CARD_NAME
    if name == OTHER_CARD_NAME:
        whose = repo_id if theirs else directory
        logger.warning("%s has a README.md that hf-fedlarge did not write; the card is %s instead.", whose, name)
    contents[name] = card.encode()

    before = _former(published)
    if before.get("kind", manifest.kind) != manifest.kind:
        raise HubError(f"{repo_id} holds a published {before['kind']}, not a {manifest.kind}; use another repository.")
    stale = ({OTHER_CARD_NAME, *before.get("files", {})} - {CARD_NAME} - contents.keys()) & present
    return [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()),
        *(CommitOperationDelete(path_in_repo=name) for name in sorted(stale)),
    ]


def _former(published: str | None) -> dict[str, Any]:
    """Kind and files of what was published before; nothing where there is no manifest that can be read."""
    try:
        raw = parse_json((published or "{}").encode(), MANIFEST_NAME)
    except ArtifactError:
        return {}
    if not isinstance(raw, dict) or not isinstance(raw.get("files"), dict) or not isinstance(raw.get("kind"), str):
        return {}
    return raw


def _read_summary(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        summary = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"The run's summary {path} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise ArtifactError(f"The run's summary {path} is not JSON: {error}.") from error
    if not isinstance(summary, dict):
        raise ArtifactError(f"The run's summary {path} holds a {type(summary).__name__}; expected an object.")
    return summary


def _require(directory: Path, pattern: str, name: str) -> None:
    if any(directory.glob(pattern)):
        return
    found = sorted(path.name for path in directory.iterdir())
    names = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "") if found else "nothing"
    raise ArtifactError(f"{name} has no {pattern}, so it is not a checkpoint hf-fedlarge can use; found {names}.")


def _check_id(repo_id: str, what: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(
            f"{repo_id!r} is {what}: expected owner/name of letters, digits, '-', '_' and '.', without '--' or '..'."
        ) from error


@contextmanager
def _explained(repo_id: str, *, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence that says what to do; no request waits for ever."""
    session = get_session()
    if session.timeout.read is None:  # as the library makes it
        session.timeout = _ANSWER_SECONDS
    try:
        yield
    except FedLargeError:
        raise
    # RuntimeError: a failed upload of one file; ValueError: a refused card, or an answer that is not the Hub's.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise HubError(_sentence(error, repo_id, revision, writing)) from error


def _sentence(error: BaseException, repo_id: str, revision: str | None, writing: bool) -> str:
    # The library wraps what happened: a failed look-up in "not in the cache", a failed upload in a RuntimeError.
    if isinstance(error, LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        return _sentence(error.__cause__, repo_id, revision, writing)
    hub = constants.ENDPOINT
    instead = "" if writing else ", or pass a local directory"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        cached = "" if writing else f" and {repo_id} is not whole in the cache"
        return f"The Hub is switched off (HF_HUB_OFFLINE){cached}; unset it{instead}."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: accept its terms at {hub}/{repo_id}, then run `hf auth login`{instead}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision or 'main'!r}; see {hub}/{repo_id}/commits/main for those it has."
    if isinstance(error, RepositoryNotFoundError) and not writing:
        return (
            f"The Hub shows no model {repo_id} to you; "
            f"check the spelling, run `hf auth login` if it is private{instead}."
        )
    if isinstance(error, HfHubHTTPError):
        return _status_sentence(error, repo_id, writing, instead)
    if isinstance(error, HTTPError) and "Timeout" in type(error).__name__:
        return (
            f"{hub} gave no answer within {_ANSWER_SECONDS} s or less ({type(error).__name__}); check the network "
            f"and HF_ENDPOINT{instead}."
        )
    if isinstance(error, HTTPError):
        return f"{hub} can't be reached ({type(error).__name__}); check the network and HF_ENDPOINT{instead}."
    what = "published" if writing else "downloaded"
    return f"{repo_id} could not be {what} ({type(error).__name__}): {_flat(str(error))}."


def _status_sentence(error: HfHubHTTPError, repo_id: str, writing: bool, instead: str) -> str:
    status = error.response.status_code
    if status in (401, 403, 404) and writing:
        return (
            f"The Hub does not let you write to {repo_id} ({status}); run `hf auth login` with a token that may write."
        )
    if status in (401, 403):
        return f"The Hub refused your login for {repo_id} ({status}); run `hf auth login` again{instead}."
    if status in (409, 412) and writing:
        return f"{repo_id} was changed while this was being published ({status}); publish again."
    if status == 429:
        return f"The Hub has had too many requests from you ({status}); wait a few minutes and try again."
    if status >= 500:
        return f"The Hub failed on {repo_id} ({status}); try again later{instead}."
    said = f": {_flat(error.server_message)}" if error.server_message else ""
    return f"The Hub refused a request for {repo_id} ({status}){said}."


def _flat(text: str) -> str:
    return " ".join(text.split()).rstrip(".")
