"""Downloads: what a repository of a hub holds, which of it is wanted, and files that come whole and checked.

Hugging Face is listed through huggingface_hub, ModelScope through its HTTP API; both send files by plain HTTP, from
any byte on, so one transfer serves them. Keys come from the environment (HF_TOKEN, MODELSCOPE_API_TOKEN), and are sent
to the hub's own host alone, not to where it redirects.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import http.client
import json
import logging
import os
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from .errors import InputError, Unfinished, raise_problems
from .files import hash_file, hash_json

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
BLOCK = 1 << 20  # bytes read at a time
TRIES = 6  # in a row without a byte of progress
FIRST_WAIT = 1.0  # seconds before the second try; doubled for each further one
LONGEST_WAIT = 120.0
TIMEOUT = 60  # seconds without a byte
DISK_RESERVE = 100 << 20  # bytes that stay free
MODELSCOPE_PAGE = 200
USER_AGENT = "chinese-llama-toolkit"
# Weights by kind, the first that is there is taken: others hold the same ones again.
WEIGHTS = ((".safetensors",), (".bin",), (".pth", ".pt"), (".gguf",))
OTHER_WEIGHTS = (".h5", ".msgpack", ".ot", ".onnx", ".tflite", ".mlmodel")  # of other frameworks
NAMED = 5  # of many files, in messages


# ---------------------------------------------------------------- what a repository holds


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        path: below the repository's root, with slashes.
        size: bytes.
        sha256: as the hub publishes it; None: it does not.
        git_hash: SHA-1 of the file as git's blob, for small files of Hugging Face.
    """

    path: str
    size: int
    url: str
    sha256: str | None = None
    git_hash: str | None = None

    def matches(self, file: Path) -> bool:
        """Whether a local file is this one: by size and, where one is known, by hash."""
        if not file.is_file() or file.stat().st_size != self.size:
            return False
        if self.sha256:
            return hash_file(file) == self.sha256
        return self.git_hash is None or _git_hash(file) == self.git_hash


@dataclass(frozen=True)
class Repository:
    """What was found under a hub id.

    Attributes:
        revision: the commit, where the hub says which it is; else as it was asked for.
        headers: to be sent to the hub.
    """

    name: str
    kind: Kind
    revision: str
    files: tuple[RemoteFile, ...]
    headers: dict[str, str]

    @property
    def key(self) -> str:
        """Of all that decides what is downloaded, for going on."""
        return hash_json([self.name, self.revision, *([f.path, f.size, f.sha256, f.git_hash] for f in self.files)])


def list_hugging_face(name: str, kind: Kind, revision: str | None) -> Repository:
    """The files of a repository of Hugging Face, or of the mirror HF_ENDPOINT. Raises: InputError."""
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    token = os.environ.get("HF_TOKEN")
    if token and urllib.parse.urlsplit(constants.ENDPOINT).hostname not in ("huggingface.co", "hf.co"):
        logger.warning(
            "HF_TOKEN is sent to HF_ENDPOINT, %s; unset it unless you trust that server", constants.ENDPOINT
        )
    api = HfApi(token=token or False)
    try:
        commit = str(api.repo_info(name, repo_type=kind, revision=revision).sha)
        entries = list(api.list_repo_tree(name, repo_type=kind, revision=commit, recursive=True))
    except OfflineModeIsEnabled:
        raise InputError("HF_HUB_OFFLINE is set, which forbids downloads; unset it") from None
    except Exception as error:  # of huggingface_hub, and of the library it asks with, whose name changes
        raise InputError(_refusal(name, kind, revision, constants.ENDPOINT, "HF_TOKEN", error)) from None
    files = [
        RemoteFile(
            entry.path,
            entry.size,
            hf_hub_url(name, entry.path, repo_type=kind, revision=commit),
            entry.lfs.sha256 if entry.lfs else None,
            None if entry.lfs else entry.blob_id,
        )
        for entry in entries
        if isinstance(entry, RepoFile)
    ]
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return Repository(name, kind, commit, _checked(name, files), headers)


def list_modelscope(name: str, kind: Kind, revision: str | None) -> Repository:
    """The files of a repository of ModelScope, or of the host MODELSCOPE_DOMAIN. Raises: InputError."""
    host = os.environ.get("MODELSCOPE_DOMAIN") or "modelscope.cn"
    endpoint = (host if "://" in host else f"https://{host}").rstrip("/")
    revision = revision or "master"
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    # Older parts of the API read the cookie, newer ones the header.
    headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
    root = f"{endpoint}/api/v1/{kind}s/{urllib.parse.quote(name)}/repo"
    entries: list[dict[str, Any]] = []
    page = 1
    while True:
        query = {"Revision": revision, "Recursive": "True"}
        if kind == "dataset":  # comes in pages
            query |= {"PageNumber": str(page), "PageSize": str(MODELSCOPE_PAGE)}
        address = f"{root}/{'tree' if kind == 'dataset' else 'files'}?{urllib.parse.urlencode(query)}"
        try:
            reply = _read_json(address, headers)
            found = reply["Data"]["Files"]
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            raise InputError(_refusal(name, kind, revision, endpoint, "MODELSCOPE_API_TOKEN", error)) from None
        entries += found
        if kind == "model" or len(found) < MODELSCOPE_PAGE:
            break
        page += 1
    files = [
        RemoteFile(
            str(entry["Path"]),
            int(entry["Size"]),
            f"{root}?{urllib.parse.urlencode({'Revision': revision, 'FilePath': entry['Path']})}",
            str(entry.get("Sha256") or "").lower() or None,
        )
        for entry in entries
        if entry.get("Type") != "tree"
    ]
    return Repository(name, kind, revision, _checked(name, files), headers)


def _read_json(address: str, headers: dict[str, str]) -> Any:
    for number in range(TRIES):
        try:
            with _open(address, headers) as response:
                return json.load(response)
        except (OSError, http.client.HTTPException) as error:
            if number == TRIES - 1 or not _may_pass(error):
                raise
            time.sleep(_pause(number, error))
    raise AssertionError("unreachable")


def _refusal(name: str, kind: Kind, revision: str | None, endpoint: str, variable: str, error: Exception) -> str:
    """What is to be said where a repository cannot be listed."""
    status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    asked = f"{kind} {name}" + (f" at revision {revision}" if revision else "")
    if status in (401, 403, 404):
        return (
            f"{endpoint} has no {asked}, or does not show it without a key ({reason}); check the name, --kind and "
            f"--revision; for a gated or private one accept its terms on its page and set {variable}"
        )
    return f"{asked} cannot be listed at {endpoint}: {reason}; check the network, or pass another --hub"


def _checked(name: str, files: Sequence[RemoteFile]) -> tuple[RemoteFile, ...]:
    """Raises: InputError for names that would lead out of a folder, which no honest hub lists."""
    bad = [f.path for f in files if PurePosixPath(f.path).is_absolute() or {"..", ""} & set(f.path.split("/"))]
    raise_problems([f"{name} lists a file called {path!r}, which leads out of its folder" for path in bad])
    return tuple(sorted(files, key=lambda file: file.path))


# ---------------------------------------------------------------- which of it is wanted


def choose_files(repository: Repository, include: Sequence[str], exclude: Sequence[str]) -> list[RemoteFile]:
    """The files that are downloaded.

    Args:
        include: patterns such as *.json, or folder/; none: of a model its settings and one kind of weights
            (safetensors before .bin before .pth), of a data set everything. Hidden files are left out.
        exclude: patterns of what is left out in any case.
    Raises: InputError for patterns that fit nothing, and for several GGUF files of which none was asked for.
    """
    # Hidden ones are the repository's own; a finished folder would not keep them.
    files = [file for file in repository.files if not any(part.startswith(".") for part in file.path.split("/"))]
    unused = [f"'{pattern}'" for pattern in include if not any(_fits(file.path, pattern) for file in files)]
    if include and unused:
        there = ", ".join(file.path for file in files[:NAMED]) + (", ..." if len(files) > NAMED else "")
        raise InputError(f"--include {', '.join(unused)}: {repository.name} has no such file; it has {there}")
    if include:
        files = [file for file in files if any(_fits(file.path, pattern) for pattern in include)]
    elif repository.kind == "model":
        files = _one_kind_of_weights(files)
    files = [file for file in files if not any(_fits(file.path, pattern) for pattern in exclude)]
    packed = [file.path for file in files if file.path.endswith(".gguf")]
    if not include and len(packed) > 1 and repository.kind == "model":
        names = ", ".join(packed[:NAMED]) + (", ..." if len(packed) > NAMED else "")
        raise InputError(
            f"{repository.name} has {len(packed)} GGUF files ({names}); pass --include with the one you want"
        )
    if not files:
        raise InputError(f"{repository.name}: no file is left; pass another --include or --exclude")
    return files


def _fits(path: str, pattern: str) -> bool:
    if pattern.endswith("/"):
        return path.startswith(pattern)
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path.rpartition("/")[2], pattern)


def _one_kind_of_weights(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    kinds = [kind for kind in WEIGHTS if any(file.path.endswith(kind) for file in files)]
    left_out = (*OTHER_WEIGHTS, *(suffix for kind in kinds[1:] for suffix in kind))
    kept = [file for file in files if not file.path.endswith(left_out)]
    # Mistral's repositories hold the weights once more, in one file of their own names.
    if any(file.path.startswith("model") and file.path.endswith(".safetensors") for file in kept):
        kept = [file for file in kept if not fnmatch.fnmatchcase(file.path, "consolidated*.safetensors")]
    return kept


# ---------------------------------------------------------------- bringing it here


def check_space(folder: Path, needed: int) -> None:
    """Raises: InputError if the disk that will hold `folder` has not so many bytes free."""
    place = next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free - DISK_RESERVE
    if needed > free:
        raise InputError(
            f"--output_dir {folder}: {needed / 1e9:.2f} GB are needed, {max(free, 0) / 1e9:.2f} GB are free there; "
            "free some, or pass a folder on another disk"
        )


def partial_name(path: Path) -> Path:
    """Where the beginning of a file is kept until it is whole."""
    return path.with_name(f".{path.name}.part")


def bytes_here(folder: Path, file: RemoteFile) -> int:
    """How much of a file an earlier run left: all of it under its own name, which only checked files get."""
    path = folder / file.path
    if path.is_file():
        return file.size
    part = partial_name(path)
    return min(part.stat().st_size, file.size) if part.is_file() else 0


def download_files(repository: Repository, folder: Path, connections: int, progress: Callable[[int], None]) -> None:
    """Bring all files into a folder, several at once, each checked before it gets its name.

    Args: progress: told of bytes as they come, negative where some have to come again; called by several threads.
    Raises: Unfinished where the same command may go on; InputError where it cannot.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(connections) as pool:
        waiting = [pool.submit(_bring, file, folder, repository.headers, progress, stop) for file in repository.files]
        try:
            for each in wait(waiting, return_when=FIRST_EXCEPTION).done:
                each.result()
        except BaseException:  # Ctrl-C too: the threads end with the next block
            stop.set()
            for each in waiting:
                each.cancel()
            raise


def _bring(
    file: RemoteFile, folder: Path, headers: dict[str, str], progress: Callable[[int], None], stop: threading.Event
) -> None:
    path = folder / file.path
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = partial_name(path)
    for again in (True, False):
        _transfer(file, part, headers, progress, stop)
        if stop.is_set():
            return
        if file.matches(part):
            break
        part.unlink()
        progress(-file.size)
        if not again:
            raise Unfinished(
                f"{file.path}: what came, twice, has not the hash that the hub publishes; the server, or a proxy "
                "between, changes it: pass another --hub, or try again later"
            )
        logger.warning("%s: its hash is not the published one; downloading it again", file.path)
    with open(part, "rb") as content:
        os.fsync(content.fileno())
    os.replace(part, path)


def _transfer(
    file: RemoteFile, part: Path, headers: dict[str, str], progress: Callable[[int], None], stop: threading.Event
) -> None:
    """Append to `part` until it has the file's size, going on after each break."""
    failures = 0
    with _kept_where_the_disk_is_full(file.path), open(part, "ab") as output:
        output.truncate(min(output.tell(), file.size))
        while (start := output.seek(0, os.SEEK_END)) < file.size and not stop.is_set():
            try:
                # identity: bytes of a packed reply are not those that ranges count.
                asked = {**headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
                with _open(file.url, asked) as response:
                    if start and response.status != 206:  # the server sends the whole file
                        output.truncate(0)
                        progress(-start)
                    elif start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                        raise http.client.HTTPException("it sent another part than was asked for")
                    for block in _blocks(response, stop):
                        output.write(block)
                        progress(len(block))
                        failures = 0
                if output.tell() > file.size:
                    excess = output.tell() - file.size
                    output.truncate(0)
                    progress(-file.size - excess)
                    raise http.client.HTTPException(f"it sent {excess} bytes more than the file has")
                if output.tell() < file.size and not stop.is_set():
                    raise http.client.HTTPException("the connection ended early")
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if getattr(error, "code", None) == 416:  # no such part: what is there is not of this file
                    output.truncate(0)
                    progress(-start)
                failures += 1
                if failures >= TRIES or not _may_pass(error):
                    raise Unfinished(
                        f"{file.path}: {_reason(error)}; run the same command again to go on with what is there"
                    ) from None
                pause = _pause(failures - 1, error)
                logger.warning("%s: %s; going on in %.0f s", file.path, _reason(error), pause)
                stop.wait(pause)


@contextlib.contextmanager
def _kept_where_the_disk_is_full(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Unfinished(f"no space left while writing {name}; free some, then run the same command again") from None


def _blocks(response: Any, stop: threading.Event) -> Iterator[bytes]:
    # read1: a slow line shows progress, and a broken one keeps what came.
    while not stop.is_set() and (block := response.read1(BLOCK)):
        yield block


def _may_pass(error: Exception) -> bool:
    """Whether another try can succeed."""
    return not isinstance(error, urllib.error.HTTPError) or error.code in (408, 416, 429) or error.code >= 500


def _pause(failures: int, error: Exception) -> float:
    """Seconds until the next try: as the server asks (Retry-After), else longer each time."""
    asked = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
    return min(float(asked) if asked.isdecimal() else FIRST_WAIT * 2**failures, LONGEST_WAIT)


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error) or type(error).__name__


class _KeepsKeys(urllib.request.HTTPRedirectHandler):
    """Sends no key to another host, such as the one that stores large files: urllib itself would."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urllib.parse.urlsplit(newurl)[:2] != urllib.parse.urlsplit(req.full_url)[:2]:
            for name in ("Authorization", "Cookie"):
                new.remove_header(name)
        return new


def _open(address: str, headers: dict[str, str]) -> Any:
    request = urllib.request.Request(address, headers={"User-Agent": USER_AGENT, **headers})
    return urllib.request.build_opener(_KeepsKeys).open(request, timeout=TIMEOUT)


def _git_hash(file: Path) -> str:
    digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(file, "rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
