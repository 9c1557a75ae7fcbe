"""Files that are either whole or not there, and downloads that are verified before anyone reads them."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` at the end, removed if anything goes wrong."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")  # writers go by the ending
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def leftovers(folder: Path) -> Iterator[Path]:
    """Temporary files of processes that were killed."""
    return folder.glob(".*.tmp*")


def digest(path: Path, algorithm: str) -> str:
    """Hex digest of a file; algorithm is one of hashlib's names."""
    hasher = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def cache_folder() -> Path:
    """Where downloads are kept: $MINICACHE_HOME, or ~/.cache/minicache. ValueError for a user without a home."""
    try:
        return Path(os.environ.get("MINICACHE_HOME") or Path.home() / ".cache" / "minicache")
    except RuntimeError:
        raise ValueError("you have no home folder: say in MINICACHE_HOME where downloads are kept") from None


def fetch(url: str, path: Path, checksum: str | None) -> Path:
    """Download url to path, unless it is there; checksum is "algorithm:hex", or None where none is published.

    Continues what was interrupted.

    Raises ConnectionError (with what to do by hand) where the network fails, ValueError where the hash differs.
    """
    algorithm, expected = (checksum or ":").split(":")
    if path.exists():
        if checksum and digest(path, algorithm) != expected:
            raise ValueError(f"{path} has not the {algorithm} {expected} of {url}; remove it, or put the right file")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        _download(url, part)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(
            f"cannot download {path.name} ({reason}); get {url} by hand and put it at {path}"
        ) from None
    if checksum and digest(part, algorithm) != expected:
        part.unlink()
        raise ValueError(f"what {url} sent has not the {algorithm} {expected}, and was thrown away")
    os.replace(part, path)
    return path


def _download(url: str, part: Path) -> None:
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "minicache", "Range": f"bytes={done}-"})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing
            return
        raise
    with response:
        resumed = response.status == 206
        total = int(response.headers.get("Content-Length", 0)) + (done if resumed else 0)
        bar = tqdm(total=total or None, initial=done if resumed else 0, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if resumed else "wb") as file:
            while block := response.read(1 << 20):
                bar.update(file.write(block))
            if total and file.tell() < total:  # what came is kept, and the next try goes on from there
                raise ConnectionError(f"the connection broke after {file.tell()} of {total} bytes")
