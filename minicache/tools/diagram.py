"""A network as a picture, drawn from the live object: D_i on the way down, M, U_i on the way up, and what is cached.

python -m minicache diagram --ckpt tiny --branch 3 --out idea.svg
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

from minicache.checkpoints import shape_of
from minicache.files import replacing
from minicache.tools import Parser
from minicache.unet import Downsample, UNet

BOX, PITCH, GAP = 46, 34, 10  # width of a box; from row to row; more between levels
SKIP = 300  # length of a skip
LIVE, DEEP, EDGE = "#dceefb", "#ececec", "#d1442f"  # a partial step runs it; only a full step does; cached_U


def diagram(unet: UNet, branch: int = 3) -> str:
    """SVG: a row for each pair D_i, U_i, the outermost on top, and M below them.

    A partial step of this branch runs the coloured boxes alone; the red edge is cached_U, from U[branch] (or M) to
    U[branch - 1]. ValueError for a branch that the network has not.
    """
    size, pairs = unet.config.image_size, len(unet.D)
    C, H, W = unet.cached_shape(branch, size, size)
    left, right = 120, 120 + BOX + SKIP
    y, ys, side = 46, [], []
    for D_i in unet.D:
        if isinstance(D_i, Downsample):
            size, y = size // 2, y + GAP
        ys.append(y)
        side.append(size)
        y += PITCH
    ys.append(y + GAP)  # M's
    parts = []

    def box(x: int, y: int, name: str, live: bool) -> None:
        parts.append(
            f'<rect x="{x}" y="{y}" width="{BOX}" height="22" rx="4" fill="{LIVE if live else DEEP}" stroke="#555"/>'
            f'<text x="{x + BOX // 2}" y="{y + 15}" text-anchor="middle">{escape(name)}</text>'
        )

    def edge(points: list[tuple[float, float]], color: str = "#555", width: float = 1.2, dashes: str = "") -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" '
            f'stroke-dasharray="{dashes}" marker-end="url(#{"red" if color == EDGE else "grey"})"/>'
        )

    down, up = left + BOX // 2, right + BOX // 2
    edge([(left - 34, ys[0] + 11), (left, ys[0] + 11)])
    edge([(right + BOX, ys[0] + 11), (right + BOX + 34, ys[0] + 11)])
    parts.append(f'<text x="{left - 40}" y="{ys[0] + 15}" text-anchor="end">x_t</text>')
    parts.append(f'<text x="{right + BOX + 40}" y="{ys[0] + 15}">eps</text>')
    for i in range(pairs):
        live = i < branch
        box(left, ys[i], f"D[{i}]", live)
        box(right, ys[i], f"U[{i}]", live)
        edge([(left + BOX, ys[i] + 11), (right, ys[i] + 11)], dashes="4 3")  # the skip
        if i in (0, *(j for j in range(1, pairs) if side[j] != side[j - 1])):
            parts.append(
                f'<text x="{left - 40}" y="{ys[i] + 15 + 20 * (i == 0)}" text-anchor="end">{side[i]} x {side[i]}</text>'
            )
        if i + 1 < pairs:
            edge([(down, ys[i] + 22), (down, ys[i + 1])])
            if i + 1 != branch:
                edge([(up, ys[i + 1]), (up, ys[i] + 22)])
    middle = (left + right) // 2
    box(middle, ys[-1], "M", False)
    edge([(down, ys[-2] + 22), (down, ys[-1] + 11), (middle, ys[-1] + 11)])
    from_below = [(middle + BOX, ys[-1] + 11), (up, ys[-1] + 11), (up, ys[-2] + 22)]
    if branch < pairs:
        edge(from_below)
        edge([(up, ys[branch]), (up, ys[branch - 1] + 22)], EDGE, 3)
        cut = (ys[branch - 1] + 22 + ys[branch]) / 2
    else:
        edge(from_below, EDGE, 3)
        cut = (ys[-2] + 22 + ys[-1]) / 2
    parts.append(
        f'<line x1="20" x2="{up - 12}" y1="{cut}" y2="{cut}" stroke="{EDGE}" stroke-dasharray="7 5"/>'
        f'<text x="{up + 12}" y="{cut + 4}" fill="{EDGE}" font-weight="bold">cached_U {C} x {H} x {W}</text>'
    )
    parts.append(
        f'<text x="{middle + BOX // 2}" y="22" text-anchor="middle">a partial step runs the {branch} outermost '
        f"pairs; a full step runs everything</text>"
    )
    markers = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="{size}" markerHeight="{size}" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{color}"/></marker>'
        for name, color, size in (("grey", "#555", 6), ("red", EDGE, 4))
    )
    width, height = right + BOX + 170, ys[-1] + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><defs>{markers}</defs>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def main(args: argparse.Namespace) -> None:
    svg = diagram(shape_of(args.ckpt), args.branch)
    with replacing(args.out) as temporary:
        temporary.write_text(svg)
    print(args.out)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache diagram", doc=__doc__)
    parser.add_argument("--ckpt", default="tiny", help="a checkpoint, or cifar10 or lsun_256 (default: tiny)")
    parser.add_argument("--branch", type=int, default=3, help="pairs that stay alive (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("idea.svg"), help="(default: idea.svg)")
    return parser.parse_args(argv)
