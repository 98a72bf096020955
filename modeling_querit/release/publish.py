"""Folders onto the Hub: one commit that holds all or nothing, a tag, and a look at what arrived."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
)
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

# Contents of files, or where they are, by their paths in the repository.
Files = Mapping[str, Path | bytes]
# What loading looks for, and would find beside the new files: code, weights, settings.
_REPLACED = ("*.py", "*.safetensors", "*.bin", "*.json", "*.jinja")
# What a repository without a model may hold.
_NO_MODEL = (".gitattributes", "README.md", "LICENSE*")
# What git takes for the name of a tag, and nobody for a branch.
_TAG = re.compile(r"(?!main$)(?!.*\.\.)(?!.*\.lock$)\w[\w.+-]*(?<!\.)")
_BRANCH = re.compile(r"(?!.*(\.\.|//|\.lock$))\w[\w.+/-]*(?<![./])")
# What makes two models different ones, rather than two versions of one.
_ARCHITECTURE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "n_routed_experts")


@dataclass(frozen=True)
class Destination:
    """Where a folder goes.

    Args:
        repo_id: `owner/name`.
        private: Whether a repository that is made for it can be seen by its owner alone.
        revision: The branch; it is made if there is none of this name.
        pr: Whether to open a pull request, instead of writing to the branch.
        tag: A name for the new state, such as v1.0.

    Raises:
        ValueError: if these do not go together.
    """

    repo_id: str
    private: bool = False
    revision: str = "main"
    pr: bool = False
    tag: str | None = None

    def __post_init__(self) -> None:
        if "/" not in self.repo_id:
            raise ValueError(f"{self.repo_id} is no name of a repository: give OWNER/NAME.")
        with one_line_errors(self.repo_id):
            validate_repo_id(self.repo_id)
        if not _BRANCH.fullmatch(self.revision):
            raise ValueError(f"{self.revision!r} is no name of a branch: give letters, digits, '.', '-', '/'.")
        if self.tag is not None and not _TAG.fullmatch(self.tag):
            raise ValueError(f"{self.tag!r} is no name of a tag: give letters, digits, '.', '-', such as v1.0.")
        if self.tag and self.pr:
            raise ValueError("A pull request changes nothing yet that a tag could name: give --tag once it is merged.")


def publish(
    files: Files,
    destination: Destination,
    message: str,
    echo: Callable[[str], None] = print,
    api: HfApi | None = None,
) -> CommitInfo:
    """Upload files in one commit, tag it, and compare.

    Code, weights and settings of an earlier version are removed by the same commit; licences, pictures, folders stay.
    Weights go up before the commit, and what has arrived is not sent again: after an interruption, the same call goes
    on. The commit is refused if somebody else wrote to the branch meanwhile.

    Args:
        files: What to upload.
        destination: Where to.
        message: Of the commit.
        echo: Told of each step.
        api: The client; by default with the token that `hf auth login` keeps, or `HF_TOKEN`.

    Raises:
        PermissionError: if there is no token, or it gives no right to write there.
        ValueError: if the repository holds something else than a reranker of this architecture, is public though a
            private one was asked for, or has the tag for other files, or if what arrived is not what was sent.
        ConnectionError: if the Hub cannot be reached, or breaks off.
    """
    api = api or HfApi()
    repo_id, revision = destination.repo_id, destination.revision
    with one_line_errors(repo_id):
        echo(f"Logged in as {api.whoami()['name']}.")
        _check_architecture(api, files, destination)
        api.create_repo(repo_id, private=destination.private or None, exist_ok=True)
        if revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision, files_metadata=True)
        if destination.private and not before.private:
            raise ValueError(f"{repo_id} is public already: make it private in its settings, or choose another.")
        tagged = _tagged(api, destination)
        if tagged is not None and (tagged != before.sha or _changes(files, before)):
            raise ValueError(f"{repo_id} has a tag {destination.tag} already: choose another.")
        deletions = _deletions(files, before)
        if deletions:
            echo(f"Removes {', '.join(each.path_in_repo for each in deletions)}.")
        commit = api.create_commit(
            repo_id,
            [*_additions(files), *deletions],
            commit_message=message,
            revision=revision,
            create_pr=destination.pr,
            parent_commit=None if destination.pr else before.sha,
        )
        echo(f"Committed {commit.oid}" + (f", as {commit.pr_url}." if commit.pr_url else "."))
        if destination.tag and tagged is None:
            api.create_tag(repo_id, tag=destination.tag, revision=commit.oid)
            echo(f"Tagged {destination.tag}.")
        _compare(api, files, repo_id, commit.oid)
    echo(f"Downloaded it again: all {len(files)} files are what was sent.")
    return commit


def _tagged(api: HfApi, destination: Destination) -> str | None:
    """The commit that the tag stands for by now."""
    refs = api.list_repo_refs(destination.repo_id)
    return next((each.target_commit for each in refs.tags if each.name == destination.tag), None)


def _changes(files: Files, before: Any) -> bool:
    """Whether a repository would be another with these files."""
    there = {each.rfilename: each.lfs.sha256 if each.lfs else each.blob_id for each in before.siblings or []}
    large = {each.rfilename for each in before.siblings or [] if each.lfs}
    return bool(_deletions(files, before)) or any(
        there.get(name) != (_sha256_of(content) if name in large else git_hash(_bytes_of(content)))
        for name, content in files.items()
    )


def _additions(files: Files) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name, content) for name, content in sorted(files.items())]


def _deletions(files: Files, before: Any) -> list[CommitOperationDelete]:
    """Shards and code of an earlier version would be loaded, or downloaded, with the new ones."""
    there = {each.rfilename for each in before.siblings or [] if "/" not in each.rfilename}
    gone = [name for name in sorted(there - files.keys()) if any(fnmatch(name, each) for each in _REPLACED)]
    return [CommitOperationDelete(name) for name in gone]


def _check_architecture(api: HfApi, files: Files, destination: Destination) -> None:
    repo_id, revision = destination.repo_id, destination.revision
    with tempfile.TemporaryDirectory() as aside:
        try:
            path = api.hf_hub_download(repo_id, "config.json", revision=revision, cache_dir=aside)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return
        except RemoteEntryNotFoundError:
            return _check_empty(api, destination)
        config = json.loads(Path(path).read_bytes())
    # Published checkpoints name a class that transformers does not have.
    if not isinstance(config, dict):
        raise ValueError(f"{repo_id} has a config.json that is none: choose another --repo-id.")
    known = [each for each in config.get("architectures") or [] if hasattr(transformers, each)]
    if known:
        raise ValueError(f"{repo_id} holds a {known[0]}, which is no reranker of ours: choose another --repo-id.")
    ours, theirs = _architecture(json.loads(_bytes_of(files["config.json"]))), _architecture(config)
    for name in _ARCHITECTURE:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{destination.repo_id} holds a model with {name} {theirs.get(name)!r}, this one has "
                f"{ours.get(name)!r}: choose another --repo-id, or --revision."
            )


def _check_empty(api: HfApi, destination: Destination) -> None:
    held = api.list_repo_files(destination.repo_id, revision=destination.revision)
    others = [name for name in held if not any(fnmatch(name, each) for each in _NO_MODEL)]
    if others:
        raise ValueError(
            f"{destination.repo_id} holds {others[0]}, but no config.json: it is for something else, so choose another "
            "--repo-id."
        )


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _compare(api: HfApi, files: Files, repo_id: str, revision: str) -> None:
    with tempfile.TemporaryDirectory(prefix="querit-upload-") as aside:
        folder = api.snapshot_download(repo_id, revision=revision, cache_dir=aside)
        for name, content in files.items():
            arrived = Path(folder, name)
            if not arrived.is_file() or sha256(arrived) != _sha256_of(content):
                raise ValueError(f"{repo_id}@{revision}: {name} is not what was sent; upload it again.")


def _sha256_of(content: Path | bytes) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)


def _bytes_of(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


@contextmanager
def one_line_errors(repo_id: str) -> Iterator[None]:
    """What the Hub or the network answer, as one sentence that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise PermissionError("There is no token: hf auth login, or set HF_TOKEN to one that may write.") from None
    except HFValidationError as error:
        raise ValueError(f"{repo_id} is no name of a repository: {error}") from None
    except HfHubHTTPError as error:
        raise _of_status(error, repo_id) from error
    except RuntimeError as error:
        # What an upload of weights ends with; the answer of the Hub, or of the network, is behind it.
        cause = error.__cause__
        raise (
            _of_status(cause, repo_id) if isinstance(cause, HfHubHTTPError) else _broken_off(cause or error)
        ) from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise _broken_off(error) from error


def _broken_off(error: BaseException) -> ConnectionError:
    return ConnectionError(
        f"The connection to the Hub broke off ({error or type(error).__name__}). Give the same command again: weights "
        "that have arrived are not sent twice."
    )


def _of_status(error: HfHubHTTPError, repo_id: str) -> Exception:
    status = error.response.status_code if error.response is not None else None
    said = error.server_message or str(error).splitlines()[0]
    if status == 401:
        return PermissionError("The Hub does not accept this token: hf auth login, or set HF_TOKEN to a valid one.")
    if status == 403:
        return PermissionError(f"This token may not write to {repo_id}: take one with write access, or your own name.")
    if status == 409:
        return ValueError(f"{repo_id}: there is such a tag or repository already ({said}).")
    if status == 412:
        return ConnectionError(f"Somebody else wrote to {repo_id} at the same time: give the same command again.")
    if status == 429:
        return ConnectionError(f"The Hub asks to wait ({said}): give the same command again, in a while.")
    if status is not None and status < 500:
        return ValueError(f"The Hub refused what was sent to {repo_id} ({status}): {said}")
    return ConnectionError(
        f"The Hub answered {status}. Give the same command again: weights that have arrived are not sent twice."
    )
