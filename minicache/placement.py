"""Where and how a network computes: device, dtype, memory format, compilation; and what "auto" chooses, and why.

`choose_placement` decides, `place` carries it out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minicache.unet import UNet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILE = {"auto": "auto", "yes": True, "no": False}  # as flags say it
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Placement:
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    compile: bool
    why: str  # what stands behind the choices that were left to "auto"

    def __str__(self) -> str:
        threads = torch.get_num_threads()
        where = f"cpu ({threads} thread{'s' * (threads > 1)})" if self.device.type == "cpu" else str(self.device)
        kind = {v: k for k, v in (DTYPES | MEMORY_FORMATS).items()}
        return f"{kind[self.dtype]}, {kind[self.memory_format]}{', compiled' * self.compile} on {where}"


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; ValueError for one that is not here.

    auto: cuda where there is one, each of torchrun's processes on its own; else mps where there is one; else the CPU.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which the meta device, for one, has not
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def choose_placement(
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    memory_format: str | torch.memory_format = "auto",
    compile: str | bool = "auto",
) -> Placement:
    """What was asked for, with every "auto" decided by the hardware. ValueError for a name that is not known.

    device: see `choose_device`. dtype, by a name of DTYPES or torch's own: auto is `fastest_dtype`. memory_format,
    by a name of MEMORY_FORMATS or torch's own: auto is channels_last, faster by a tenth or more wherever it was
    measured, but contiguous on mps. compile: auto is True on cuda alone; a CPU takes a minute to compile, and gains
    little over channels_last.
    """
    for name, value, names in (("dtype", dtype, DTYPES), ("memory_format", memory_format, MEMORY_FORMATS)):
        if value not in ("auto", *names, *names.values()):
            raise ValueError(f"{name}={value!r} is none of auto, {', '.join(names)}")
    if compile not in ("auto", True, False):
        raise ValueError(f"compile={compile!r} is none of auto, True, False")
    device, why = choose_device(device), []
    if dtype == "auto":
        dtype, reason = fastest_dtype(device)
        why.append(reason)
    dtype = DTYPES.get(dtype, dtype)
    if memory_format == "auto":
        memory_format = torch.contiguous_format if device.type == "mps" else torch.channels_last
    if compile == "auto":
        compile = device.type == "cuda"
        why.append("compiled, as pays on a GPU" if compile else f"not compiled, which takes a minute on {device.type}")
    return Placement(device, dtype, MEMORY_FORMATS.get(memory_format, memory_format), compile, "; ".join(why))


def fastest_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype in which the device multiplies fastest, and the reason as a part of a sentence.

    bfloat16 where the hardware multiplies it, else float16 on a GPU of NVIDIA's, else float32.
    """
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "bfloat16, which this GPU multiplies"
        return torch.float16, "float16, as this GPU does not multiply bfloat16"
    if device.type == "cpu":
        able = cpu_capabilities()
        for name in ("amx_bf16", "avx512_bf16"):
            if able.get(name):
                return torch.bfloat16, f"bfloat16, which this CPU multiplies ({name})"
    return torch.float32, f"float32, as nothing is known of bfloat16 in this {device.type}'s hardware"


def cpu_capabilities() -> dict[str, Any]:
    """What torch knows of this CPU; older releases know nothing."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def place(unet: UNet, placement: Placement) -> UNet:
    """The network itself, moved, converted and compiled in place."""
    unet.to(placement.device, placement.dtype, memory_format=placement.memory_format)
    if placement.compile:
        graphs = placement.device.type == "cuda"
        unet.forward_full = compiled(unet.forward_full, graphs)
        unet.forward_partial = compiled(unet.forward_partial, graphs)
    return unet


def compiled(forward: Callable, cuda_graphs: bool) -> Callable:
    """One static graph for each shape and branch, whatever the timestep. What it returns is the caller's to keep: the
    outputs of a CUDA graph lie in memory that its next replay overwrites, and so are cloned."""
    graph = torch.compile(forward, dynamic=False, mode="reduce-overhead" if cuda_graphs else None)

    def call(x: Tensor, t: int | Tensor, *args, **kwargs):
        outputs = graph(x, torch.as_tensor(t, device=x.device).reshape(-1), *args, **kwargs)
        if not cuda_graphs:
            return outputs
        return outputs.clone() if isinstance(outputs, Tensor) else tuple(output.clone() for output in outputs)

    return call
