"""Publication on the Hub: files in one commit, a tag, and a comparison of what arrived."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from ..files import sha256

# Path in the repository -> content of the file, or its path here.
Files = Mapping[str, Path | bytes]
# Code, weights and settings: those of an earlier version would be loaded with the new ones.
_REPLACED_FILES = ("*.py", "*.safetensors", "*.bin", "*.json", "*.jinja")
# Files that a repository may have before its first model.
_ALLOWED_FILES = (".gitattributes", "README.md", "LICENSE*")
# Names that git accepts for a tag, and that cannot be mistaken for the main branch.
_TAG = re.compile(r"(?!main$)(?!.*\.\.)(?!.*\.lock$)\w[\w.+-]*(?<!\.)")
_BRANCH = re.compile(r"(?!.*(\.\.|//|\.lock$))\w[\w.+/-]*(?<![./])")
# Settings that versions of one model have in common.
_ARCHITECTURE_SETTINGS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "n_routed_experts")


@dataclass(frozen=True)
class Destination:
    """Repository, branch and tag of a release.

    Args:
        repo_id: Name of the repository, `owner/name`; it is created if it does not exist.
        private: Whether only its owner sees the repository.
        revision: Branch to write to; it is created if it does not exist.
        pr: Whether to open a pull request instead of writing to the branch.
        tag: Tag of the new commit, such as v1.0.

    Raises:
        ValueError: if a name is invalid, or a pull request is to be tagged.
    """

    repo_id: str
    private: bool = False
    revision: str = "main"
    pr: bool = False
    tag: str | None = None

    def __post_init__(self) -> None:
        if "/" not in self.repo_id:
            raise ValueError(f"{self.repo_id} is not a name of a repository: give OWNER/NAME.")
        with hub_errors(self.repo_id):
            validate_repo_id(self.repo_id)
        if not _BRANCH.fullmatch(self.revision):
            raise ValueError(f"{self.revision!r} is not a name of a branch: use letters, digits, '.', '-', '/'.")
        if self.tag is not None and not _TAG.fullmatch(self.tag):
            raise ValueError(f"{self.tag!r} is not a name of a tag: use letters, digits, '.', '-', such as v1.0.")
        if self.tag and self.pr:
            raise ValueError("A pull request cannot be tagged before it is merged: leave out --tag.")


def publish(
    files: Files,
    destination: Destination,
    message: str,
    echo: Callable[[str], None] = print,
    api: HfApi | None = None,
) -> CommitInfo:
    """Upload files in one commit, tag it, download it again and compare.

    The same commit removes code, weights and settings of an earlier version; licences, images and subfolders stay.
    Weights are uploaded before the commit, and not twice: after an interruption, the same call resumes. The commit is
    refused if somebody else has written to the branch meanwhile.

    Args:
        files: Files to upload.
        destination: Repository, branch and tag.
        message: Message of the commit.
        echo: Function that prints a line, called at each step.
        api: Client of the Hub; by default with the token of `hf auth login`, or `HF_TOKEN`.

    Returns:
        The commit.

    Raises:
        PermissionError: if there is no token, or it has no write access to the repository.
        ValueError: if the repository holds anything but a reranker of this architecture, is public although `private`
            is set, or has the tag already for other files, or if a downloaded file differs.
        ConnectionError: if the Hub cannot be reached, or the connection breaks off.
    """
    api = api or HfApi()
    repo_id, revision = destination.repo_id, destination.revision
    with hub_errors(repo_id):
        echo(f"Logged in as {api.whoami()['name']}.")
        _check_architecture(api, files, destination)
        api.create_repo(repo_id, private=destination.private or None, exist_ok=True)
        if revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision, files_metadata=True)
        if destination.private and not before.private:
            raise ValueError(f"{repo_id} is public: make it private in its settings, or choose another --repo-id.")
        tagged_commit = _tagged_commit(api, destination)
        if tagged_commit is not None and (tagged_commit != before.sha or _has_changes(files, before)):
            raise ValueError(f"{repo_id} already has the tag {destination.tag}: choose another.")
        deletions = _deletions(files, before)
        if deletions:
            echo(f"Removing {', '.join(deletion.path_in_repo for deletion in deletions)}.")
        commit = api.create_commit(
            repo_id,
            [*_additions(files), *deletions],
            commit_message=message,
            revision=revision,
            create_pr=destination.pr,
            parent_commit=None if destination.pr else before.sha,
        )
        echo(f"Committed {commit.oid}" + (f", as {commit.pr_url}." if commit.pr_url else "."))
        if destination.tag and tagged_commit is None:
            api.create_tag(repo_id, tag=destination.tag, revision=commit.oid)
            echo(f"Tagged {destination.tag}.")
        _compare(api, files, repo_id, commit.oid)
    echo(f"Downloaded and compared: all {len(files)} files arrived unchanged.")
    return commit


def _tagged_commit(api: HfApi, destination: Destination) -> str | None:
    """Return the commit that has the tag, if there is one."""
    tags = api.list_repo_refs(destination.repo_id).tags
    return next((tag.target_commit for tag in tags if tag.name == destination.tag), None)


def _has_changes(files: Files, before: ModelInfo) -> bool:
    """Whether a commit of these files would change the repository."""
    siblings = before.siblings or []
    hashes = {sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else sibling.blob_id for sibling in siblings}
    lfs_files = {sibling.rfilename for sibling in siblings if sibling.lfs}
    return bool(_deletions(files, before)) or any(
        hashes.get(name) != (_sha256_of(content) if name in lfs_files else git_hash(_read_bytes(content)))
        for name, content in files.items()
    )


def _additions(files: Files) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name, content) for name, content in sorted(files.items())]


def _deletions(files: Files, before: ModelInfo) -> list[CommitOperationDelete]:
    """Delete shards, code and settings of an earlier version, which would be loaded with the new ones."""
    names = {sibling.rfilename for sibling in before.siblings or [] if "/" not in sibling.rfilename}
    return [CommitOperationDelete(name) for name in sorted(names - files.keys()) if _matches(name, _REPLACED_FILES)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_architecture(api: HfApi, files: Files, destination: Destination) -> None:
    repo_id, revision = destination.repo_id, destination.revision
    with tempfile.TemporaryDirectory() as temporary:
        try:
            path = api.hf_hub_download(repo_id, "config.json", revision=revision, cache_dir=temporary)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return
        except RemoteEntryNotFoundError:
            return _check_empty(api, destination)
        config = json.loads(Path(path).read_bytes())
    if not isinstance(config, dict):
        raise ValueError(f"The config.json of {repo_id} is not a JSON object: choose another --repo-id.")
    # The config of a published checkpoint names a class that transformers does not have.
    known_classes = [name for name in config.get("architectures") or [] if hasattr(transformers, name)]
    if known_classes:
        raise ValueError(f"{repo_id} holds a {known_classes[0]}, not a Querit reranker: choose another --repo-id.")
    new, current = _text_config(json.loads(_read_bytes(files["config.json"]))), _text_config(config)
    for key in _ARCHITECTURE_SETTINGS:
        if new.get(key) != current.get(key):
            raise ValueError(
                f"{repo_id} holds a model with {key} {current.get(key)!r}, this one has {new.get(key)!r}: choose "
                "another --repo-id, or --revision."
            )


def _check_empty(api: HfApi, destination: Destination) -> None:
    names = api.list_repo_files(destination.repo_id, revision=destination.revision)
    unexpected = [name for name in names if not _matches(name, _ALLOWED_FILES)]
    if unexpected:
        raise ValueError(
            f"{destination.repo_id} holds {unexpected[0]}, but no config.json, so it is not a model: choose another "
            "--repo-id."
        )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    text_config = config.get("text_config")
    return text_config if isinstance(text_config, dict) else config


def _compare(api: HfApi, files: Files, repo_id: str, revision: str) -> None:
    with tempfile.TemporaryDirectory(prefix="querit-upload-") as temporary:
        folder = api.snapshot_download(repo_id, revision=revision, cache_dir=temporary)
        for name, content in files.items():
            downloaded = Path(folder, name)
            if not downloaded.is_file() or sha256(downloaded) != _sha256_of(content):
                raise ValueError(f"{repo_id}@{revision}: {name} did not arrive unchanged; run the same command again.")


def _sha256_of(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)


def _read_bytes(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn errors of the Hub and the network into one sentence that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise PermissionError(
            "There is no token: run hf auth login, or set HF_TOKEN to one with write access."
        ) from None
    except HFValidationError as error:
        raise ValueError(f"{repo_id} is not a name of a repository: {error}") from None
    except HfHubHTTPError as error:
        raise _status_error(error, repo_id) from error
    except RuntimeError as error:
        # The upload of weights raises it; the error of the Hub or the network is its cause.
        cause = error.__cause__
        raise (
            _status_error(cause, repo_id) if isinstance(cause, HfHubHTTPError) else _connection_error(cause or error)
        ) from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise _connection_error(error) from error


def _connection_error(error: BaseException) -> ConnectionError:
    return ConnectionError(
        f"The connection to the Hub broke off ({error or type(error).__name__}). Run the same command again: uploaded "
        "weights are not sent twice."
    )


def _status_error(error: HfHubHTTPError, repo_id: str) -> Exception:
    status = error.response.status_code if error.response is not None else None
    message = error.server_message or str(error).splitlines()[0]
    if status == 401:
        return PermissionError("The Hub does not accept this token: run hf auth login, or set HF_TOKEN to a valid one.")
    if status == 403:
        return PermissionError(
            f"This token has no write access to {repo_id}: use another token, or a repository of your own."
        )
    if status == 409:
        return ValueError(f"{repo_id}: the tag or repository already exists ({message}).")
    if status == 412:
        return ConnectionError(f"Somebody else wrote to {repo_id} at the same time: run the same command again.")
    if status == 429:
        return ConnectionError(f"The Hub limits the rate of requests ({message}): run the same command again later.")
    if status is not None and status < 500:
        return ValueError(f"The Hub refused the upload to {repo_id} ({status}): {message}")
    return ConnectionError(
        f"The Hub answered with status {status}. Run the same command again: uploaded weights are not sent twice."
    )
