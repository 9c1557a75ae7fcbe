"""Where and how a network computes: device, dtype, memory format, compilation; and what "auto" chooses, and why.

`choose_placement` decides, `place` carries it out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from minicache.unet import UNet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILE = {"auto": "auto", "yes": True, "no": False}  # as flags say it
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DYNAMO = {
    "cache_size_limit": 256,  # graphs of a pass; dynamo's own limit is 8, and beyond it passes would run uncompiled
    "skip_nnmodule_hook_guards": False,  # a hook that is set after the first pass is called, too
}


@dataclass(frozen=True)
class Placement:
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    compile: bool
    why: str  # what stands behind the choices that were left to "auto"

    def __str__(self) -> str:
        kind = {v: k for k, v in (DTYPES | MEMORY_FORMATS).items()}
        return f"{kind[self.dtype]}, {kind[self.memory_format]}{', compiled' * self.compile} on {self.device}"


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
    except (RuntimeError, AssertionError, ImportError) as error:
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
    """Move and convert a network in place, and return it: a `Compiled` that shares it, where the placement compiles."""
    unet.to(placement.device, placement.dtype, memory_format=placement.memory_format)
    return Compiled(unet) if placement.compile else unet


class Compiled(UNet):
    """A network whose two passes run compiled; weights, hooks and all else are those of the network it is made of.

    What is compiled is no part of the object, and takes the network as an argument: a copy, or what pickle restores,
    runs its own weights.
    """

    def __init__(self, unet: UNet):
        self.__dict__ = unet.__dict__  # shared, not copied: a change of one is a change of both

    def forward_full(
        self, x: Tensor, t: float | Tensor, branch: int = 3, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return compiled(UNet.forward_full, x.is_cuda)(self, x, t, branch, context)

    def forward_partial(
        self, x: Tensor, t: float | Tensor, cached_U: Tensor, branch: int = 3, context: Tensor | None = None
    ) -> Tensor:
        return compiled(UNet.forward_partial, x.is_cuda)(self, x, t, cached_U, branch, context)


@cache
def compiled(forward: Callable, cuda_graphs: bool) -> Callable:
    """A pass of UNet, compiled: one static graph for each shape, dtype and branch, whatever the timestep and weights.

    What it returns is the caller's to keep: the outputs of a CUDA graph lie in memory that its next replay overwrites,
    and so are cloned.
    """
    graph = torch.compile(forward, dynamic=False, mode="reduce-overhead" if cuda_graphs else None)

    def call(unet: UNet, x: Tensor, t: float | Tensor, *inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
        if isinstance(t, Tensor) or 0 <= t <= 999:  # another number is left to the network, which refuses it
            t = torch.as_tensor(t, device=x.device).reshape(-1)  # a number would become a part of the graph
        with torch._dynamo.config.patch(DYNAMO):
            outputs = graph(unet, x, t, *inputs)
        if not cuda_graphs:
            return outputs
        return outputs.clone() if isinstance(outputs, Tensor) else tuple(output.clone() for output in outputs)

    return call
