"""Files of tensors: read without running any code from them, and written without a second copy in memory."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicache.reading import LARGEST, unzip

LIGHTNING = ("pytorch_lightning.", "lightning.")


class Inert:
    """Stands for a class of Lightning's that a checkpoint of its names beside the tensors; nothing of it is run."""

    def __init__(self, *_: Any):
        pass


def read_file(path: Path) -> dict[str, Any]:
    """What a file holds, loaded without running any code from it; ValueError where it cannot be.

    Where the format allows it, tensors are mapped: they take memory only once they are read.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        if path.suffix == ".npz":
            content = _load_arrays(path)
        elif path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = _load_pickle(path)
        refuse_odd_tensors(content)
    except ImportError:
        raise ValueError(f"{path}: reading .safetensors needs the package: pip install safetensors") from None
    except MemoryError as error:
        raise ValueError(f"{path}: {error}") from None
    except pickle.UnpicklingError:  # whose message advises to load it unsafely
        strip = f"torch.save({{'state_dict': torch.load({str(path)!r}, weights_only=False)['state_dict']}}, 'new.ckpt')"
        message = f"{path} cannot be read as a checkpoint: it holds something else than tensors; if you trust whoever"
        raise ValueError(f"{message} wrote it, keep the tensors alone: {strip}") from None
    except Exception as error:  # what a damaged file makes torch and zipfile raise has many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"{path} cannot be read as a checkpoint (truncated, or another kind of file): {reason}"
        raise ValueError(message) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a state dict: it holds a {type(content).__name__}")
    return content


def refuse_odd_tensors(content: Any) -> None:
    """ValueError for a tensor, however deep, that is not all there as dense real numbers: sparse, quantized, on the
    meta device, or larger than its memory, as one number that is expanded to a billion."""
    left, seen = [content], set()
    while left:
        each = left.pop()
        if isinstance(each, Tensor):
            odd = each.layout != torch.strided or each.is_nested or each.is_quantized or each.is_complex()
            if odd or each.device.type != "cpu" or each.nbytes > each.untyped_storage().nbytes():
                raise ValueError(f"it holds a tensor ({each.dtype}) that is not dense, real and all there")
        elif isinstance(each, dict | list | tuple) and id(each) not in seen:
            seen.add(id(each))  # a list may hold itself
            left.extend(each.values() if isinstance(each, dict) else each)


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz; none is read that is too large for a weight, or of a file that is far smaller than they."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if (total := sum(member.file_size for member in members)) > 2 * path.stat().st_size + LARGEST:
            raise ValueError(f"it would take {total:,} bytes")
        contents = ((member.filename.removesuffix(".npy"), io.BytesIO(unzip(archive, member))) for member in members)
        return {name: np.lib.format.read_array(content, allow_pickle=False) for name, content in contents}


def _load_pickle(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)  # torch < 1.6 wrote files that cannot be
    with open(path, "rb") as file:
        if not mapped and file.read(1) != b"\x80":  # torch would advise to load it unsafely
            raise ValueError("it is neither a whole zip nor a pickle")
    if mapped and not any(name.endswith("data.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise ValueError("it is a zip of other files")
    names = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", lambda path: [])  # torch >= 2.6
    others = [(Inert, name) for name in (names(path) if mapped else []) if name.startswith(LIGHTNING)]
    if not others:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    with torch.serialization.safe_globals(others):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def write(path: Path, content: dict[str, Any]) -> None:
    """torch.save, but a full disk is an OSError; torch itself reports an internal error."""
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
