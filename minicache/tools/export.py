"""A network as two graphs, full and partial, for runtimes without Python: what DeepCache needs, and nothing else.

    python -m minicache export --ckpt tiny_cifar10 --out graphs      # needs pip install 'minicache[onnx]'
    python graphs/example.py 100 5                                   # DeepCache in 40 lines of onnxruntime and NumPy

    full:    x [B, C, H, W], t [1] int64                                   -> eps like x, cached_U
    partial: x, t, cached_U [B, *cached_shape] of the last full pass       -> eps
B is free; H and W are the network's. network.json has the shape, the branch and alphas_bar.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from minicache.checkpoints import REGISTRY, fingerprint, load, shape_of
from minicache.files import replacing
from minicache.tools import Parser, make_folder
from minicache.unet import UNet

FORMATS = ("onnx", "pt2")
OURS = ("network.json", "full.*", "partial_b*.*", "example.py")  # of any format and branch


class Graph(nn.Module):
    """One of the network's two passes as a module of its own, since torch exports modules."""

    def __init__(self, unet: UNet, forward: Callable[..., Tensor | tuple[Tensor, Tensor]]):
        super().__init__()
        self.unet, self.pass_ = unet, forward

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.pass_(*inputs)


def refuse_context(unet: UNet) -> None:
    if unet.config.context_dim:
        raise ValueError("this network takes a context, for which the exported graphs have no input")


@torch.no_grad()
def programs(unet: UNet, branch: int) -> dict[str, ExportedProgram]:
    """full and partial, for any batch size; ValueError for a network that takes a context."""
    refuse_context(unet)
    size, C = unet.config.image_size, unet.config.in_channels
    cached_U = torch.zeros(2, *unet.cached_shape(branch, size, size))
    x, t, B = torch.zeros(2, C, size, size), torch.tensor([500]), {0: Dim("B")}
    full = Graph(unet, lambda x, t: unet.forward_full(x, t, branch))
    partial = Graph(unet, lambda x, t, cached_U: unet.forward_partial(x, t, cached_U, branch))
    return {
        "full": torch.export.export(full, (x, t), dynamic_shapes=((B, None),)),
        "partial": torch.export.export(partial, (x, t, cached_U), dynamic_shapes=((B, None, B),)),
    }


def save_onnx(path: Path, program: ExportedProgram, outputs: list[str]) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
    inputs = ["x", "t", "cached_U"][: len(program.graph_signature.user_inputs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(
            program, f=path, dynamo=True, input_names=inputs, output_names=outputs, external_data=False,
            verbose=False,
        )  # fmt: skip


def save_pt2(path: Path, program: ExportedProgram) -> None:
    torch.export.save(program, packed := io.BytesIO())  # on a full disk, torch itself ends the process
    path.write_bytes(packed.getbuffer())


def main(args: argparse.Namespace) -> None:
    out, ending = Path(args.out), args.format
    if ending == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(f"--format onnx needs {error.name}: pip install 'minicache[onnx]'") from None
    if args.ckpt in REGISTRY:
        refuse_context(shape_of(args.ckpt))  # before it is downloaded
    graphs = {"full": f"full.{ending}", "partial": f"partial_b{args.branch}.{ending}"}
    names = ["network.json", *graphs.values(), *["example.py"] * (ending == "onnx")]
    if there := [each.name for pattern in OURS for each in out.glob(pattern)]:  # the graphs of one branch fit together
        raise ValueError(f"{out / there[0]} exists; choose another --out, or remove it")
    unet = load(args.ckpt, memory_format="contiguous")
    size = unet.config.image_size
    unet.cached_shape(args.branch, size, size)  # a branch that is not there is said now
    make_folder(out)
    network = {
        **graphs,
        "shape": [unet.config.in_channels, size, size],
        "branch": args.branch,
        "fingerprint": fingerprint(unet),
        "alphas_bar": unet.diffusion.alphas_bar.tolist(),
    }
    with ExitStack() as stack:  # which renames the first one last: network.json says that the others are there
        files = {name: stack.enter_context(replacing(out / name)) for name in names}
        for kind, program in programs(unet, args.branch).items():
            if ending == "onnx":
                save_onnx(files[graphs[kind]], program, ["eps", "cached_U"] if kind == "full" else ["eps"])
            else:
                save_pt2(files[graphs[kind]], program)
        if ending == "onnx":
            files["example.py"].write_text(Path(__file__).with_name("onnx_example.py").read_text())
        files["network.json"].write_text(json.dumps(network) + "\n")
    print(f"{out}: {', '.join(names)}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache export", doc=__doc__)
    add = parser.add_argument
    add("--ckpt", default="tiny_cifar10", help="a checkpoint's name or path (default: tiny_cifar10)")
    add("--out", required=True, help="a folder")
    add("--branch", type=int, default=3, help="of the partial graph (default: 3)")
    add("--format", choices=FORMATS, default="onnx", help="onnx (default), or pt2, torch.export's")
    return parser.parse_args(argv)
