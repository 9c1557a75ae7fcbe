"""Files that are either whole or not there, and downloads that are verified before anyone reads them."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import platform
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # not on Windows, where processes are not kept apart
    fcntl = None

MACHINE = platform.node()
with suppress(OSError):  # containers may have one name, and each numbers its processes by itself
    MACHINE += f"-{os.stat('/proc/self/ns/pid').st_ino}"
# The name, the machine and the process; writers go by the ending.
TEMPORARY = re.compile(rf"\.(.+)\.{re.escape(MACHINE)}-(\d{{1,9}})\.tmp(\.[^.]+)?")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` at the end, removed if anything goes wrong."""
    named, path = Path(path), Path(os.path.realpath(path))  # what a link leads to is replaced, and not the link
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} is a device, a pipe or a socket, which a file would replace")
    temporary = path.parent / temporary_for(named).name  # writers go by the ending of the name that was given
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent)
    try:
        yield temporary
        put(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # writing to an open file does not tell its name
            error.filename = str(path)
        raise
    finally:
        remove(temporary)


def put(temporary: Path, path: Path) -> None:
    """Rename; or copy, where a file is mounted, as into a container, and can be written to alone."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        shutil.copyfile(temporary, path)


def temporary_for(path: Path) -> Path:
    """Where `replacing` writes what becomes `path`."""
    return path.with_name(f".{path.name}.{MACHINE}-{os.getpid()}.tmp{path.suffix}")


@cache  # once is enough, and a folder of many pictures is slow to list
def sweep(folder: Path) -> None:
    """Remove what processes of this machine were writing into a folder when they were killed."""
    with suppress(OSError):  # it is somebody else's
        for file in folder.iterdir():
            ours = TEMPORARY.fullmatch(file.name)
            if ours and Path(ours[1]).suffix == (ours[3] or "") and not alive(int(ours[2])):
                remove(file)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def alive(process: int) -> bool:
    """Whether there is a process of that number; always True on Windows, where asking would end it."""
    try:
        return os.name == "nt" or os.kill(process, 0) is None
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        return True


@contextmanager
def locked(path: Path, refusal: str = "", shared: bool = False) -> Iterator[Callable[[bool], None]]:
    """Hold the lock of a folder or file, which is made if need be; it ends with its process, however that one ends.

    shared: others may share it, too. refusal: of the ValueError where others hold it; without one, wait for them.
    The value is a function that takes the lock anew, shared or not; where that is refused, the lock is lost. File
    systems without locks keep nobody apart.
    """
    if fcntl is None:
        yield lambda shared: None
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)

    def take(shared: bool) -> None:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (fcntl.LOCK_NB if refusal else 0))
        except BlockingIOError:
            raise ValueError(refusal) from None
        except OSError:  # no locks here
            pass

    try:
        take(shared)
        yield take
    finally:
        os.close(handle)


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is that folder (or file) or below it, wherever links lead."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


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


def fetch(url: str, path: Path, checksum: str | None, megabytes: int) -> Path:
    """Download url to path, unless it is there; checksum is "algorithm:hex", or None where none is published.

    Continues what was interrupted, and waits where another process downloads it. Twice `megabytes` is too much.

    Raises ConnectionError (with what to do by hand) where the network fails, ValueError where the hash differs.
    """
    algorithm, expected = (checksum or ":").split(":")
    if path.exists():
        if checksum and digest(path, algorithm) != expected:
            raise ValueError(f"{path} has not the {algorithm} {expected} of {url}; remove it, or put the right file")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with locked(part):
        if path.exists():  # another process was quicker
            part.unlink(missing_ok=True)
            return fetch(url, path, checksum, megabytes)
        try:
            _download(url, part, 2_000_000 * megabytes)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise ConnectionError(
                f"cannot download {path.name} ({reason}); get {url} by hand and put it at {path}"
            ) from None
        if checksum and digest(part, algorithm) != expected:
            os.truncate(part, 0)  # not removed: others may be waiting for its lock
            raise ValueError(f"what {url} sent has not the {algorithm} {expected}, and was thrown away")
        os.replace(part, path)
    return path


def _download(url: str, part: Path, most: int) -> None:
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "minicache", "Range": f"bytes={done}-"})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # nothing is missing
            return
        raise
    with response:
        resumed, length = response.status == 206, response.headers.get("Content-Length", "0")
        if not re.fullmatch(r"\d{1,15}", length):
            raise ConnectionError(f"the server announces {length[:20]!r} bytes")
        total = int(length) and int(length) + (done if resumed else 0)
        if total > most:
            raise ConnectionError(f"the server announces {total} bytes, more than twice the right size")
        bar = tqdm(total=total or None, initial=done if resumed else 0, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if resumed else "wb") as file:
            while file.tell() <= (total or most) and (block := response.read(1 << 20)):
                bar.update(file.write(block))
            if (size := file.tell()) > (total or most):
                file.truncate(0)
                raise ConnectionError(f"the server sends more than {total or most} bytes")
            if size < total:  # what came is kept, and the next try goes on from there
                raise ConnectionError(f"the connection broke after {size} of {total} bytes")
