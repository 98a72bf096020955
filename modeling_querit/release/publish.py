"""Folders onto the Hub: one commit that holds all or nothing, a tag, and a look at what arrived."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from ..files import sha256

# Contents of files, or where they are, by their paths in the repository.
Files = Mapping[str, Path | bytes]
# The Hub writes it itself.
_KEPT = ".gitattributes"
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
    """

    repo_id: str
    private: bool = False
    revision: str = "main"
    pr: bool = False
    tag: str | None = None


def publish(
    files: Files,
    destination: Destination,
    message: str,
    echo: Callable[[str], None] = print,
    api: HfApi | None = None,
) -> CommitInfo:
    """Upload files in one commit, with which the repository holds these files and no others, tag it, and compare.

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
        ValueError: if the repository holds a model of another architecture, or the tag for something else, or what
            arrived is not what was sent.
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
        before = api.model_info(repo_id, revision=revision)
        _check_tag(api, destination, before.sha)
        commit = api.create_commit(
            repo_id,
            [*_additions(files), *_deletions(files, before)],
            commit_message=message,
            revision=revision,
            create_pr=destination.pr,
            parent_commit=None if destination.pr else before.sha,
        )
        echo(f"Committed {commit.oid}" + (f", as {commit.pr_url}." if commit.pr_url else "."))
        if destination.tag and _check_tag(api, destination, commit.oid) is None:
            api.create_tag(repo_id, tag=destination.tag, revision=commit.oid)
            echo(f"Tagged {destination.tag}.")
        _compare(api, files, repo_id, commit.oid)
    echo(f"Downloaded it again: all {len(files)} files are what was sent.")
    return commit


def _check_tag(api: HfApi, destination: Destination, commit: str) -> str | None:
    """What the tag stands for by now; a ValueError, if that is something else than this commit."""
    refs = api.list_repo_refs(destination.repo_id)
    tagged = next((each.target_commit for each in refs.tags if each.name == destination.tag), None)
    if tagged not in (None, commit):
        raise ValueError(f"{destination.repo_id} has a tag {destination.tag} already: choose another.")
    return tagged


def _additions(files: Files) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name, content) for name, content in sorted(files.items())]


def _deletions(files: Files, before: Any) -> list[CommitOperationDelete]:
    """Shards and code of an earlier version would be downloaded with the new ones."""
    there = {each.rfilename for each in before.siblings or []}
    return [CommitOperationDelete(name) for name in sorted(there - files.keys() - {_KEPT})]


def _check_architecture(api: HfApi, files: Files, destination: Destination) -> None:
    with tempfile.TemporaryDirectory() as aside:
        try:
            path = api.hf_hub_download(
                destination.repo_id, "config.json", revision=destination.revision, cache_dir=aside
            )
        except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError):
            return
        theirs = _architecture(Path(path).read_bytes())
    ours = _architecture(_bytes_of(files["config.json"]))
    for name in _ARCHITECTURE:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{destination.repo_id} holds a model with {name} {theirs.get(name)!r}, this one has "
                f"{ours.get(name)!r}: choose another --repo-id, or --revision."
            )


def _architecture(config: bytes) -> dict[str, Any]:
    found = json.loads(config)
    return found.get("text_config") or found


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
    if status is not None and status < 500:
        return ValueError(f"The Hub refused what was sent to {repo_id} ({status}): {said}")
    return ConnectionError(
        f"The Hub answered {status}. Give the same command again: weights that have arrived are not sent twice."
    )
