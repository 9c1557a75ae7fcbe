"""Files that others wrote: whatever is wrong with one is said in one sentence."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LARGEST = 1 << 28  # bytes of a picture or a text
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile inflates others beyond what it is asked for


@contextmanager
def understood(name: str | Path, what: str) -> Iterator[None]:
    """Whatever goes wrong within becomes a ValueError, "NAME is not WHAT: why": what a damaged file, or a value of a
    wrong kind in it, makes Python, Pillow and zipfile raise has many types. A lack of memory alone stays what it is."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error).strip() or type(error).__name__
        raise ValueError(f"{name} is not {what}: {why.splitlines()[0]}") from None


def read_whole(path: Path) -> bytes:
    """A file's content, of at most LARGEST bytes; ValueError for a larger one, and for a pipe, which may not end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no file, but a folder, a pipe or a device")
    if status.st_size > LARGEST:
        raise ValueError(f"{path} has {status.st_size:,} bytes, and must have {LARGEST:,} at most")
    return path.read_bytes()


def unzip(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The content of a file in a zip, likewise; it is never inflated beyond the size that the zip tells."""
    if member.file_size > LARGEST or member.compress_type not in BOUNDED:
        raise ValueError(f"{member.filename} is no stored or deflated file of at most {LARGEST:,} bytes")
    with archive.open(member) as file:
        return file.read(member.file_size)
