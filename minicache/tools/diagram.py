"""A network as a picture, drawn from the live object: D_i on the way down, M, U_i on the way up, and what is cached.

python -m minicache diagram --ckpt emoji --branch 1 --out idea.svg
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

from minicache.checkpoints import PRESETS, shape_of
from minicache.files import replacing
from minicache.tools import Parser, prepare_out
from minicache.unet import Downsample, UNet

BOX, HEIGHT = 46, 22  # of a box
PITCH, GAP = 34, 10  # from row to row; more between levels
LEFT, RIGHT = 120, 466  # where the boxes of D and of U begin
DOWN, UP = LEFT + BOX // 2, RIGHT + BOX // 2  # the lines on which features go down, and up
MIDDLE = (LEFT + RIGHT) // 2  # where M begins
LIVE, DEEP, EDGE = "#dceefb", "#ececec", "#d1442f"  # a partial step runs it; only a full step does; cached_U


def diagram(unet: UNet, branch: int = 3) -> str:
    """SVG: a row for each pair D_i, U_i, the outermost on top, and M below them.

    A partial step of this branch runs the coloured boxes alone; the red edge is cached_U, from U[branch] (or M) to
    U[branch - 1]. ValueError for a branch that the network has not.
    """
    side = unet.config.image_size
    shape = unet.cached_shape(branch, side, side)
    ys, sides = rows(unet)
    pairs = "outermost pair" if branch == 1 else f"{branch} outermost pairs"
    said = f"a partial step runs the {pairs}; a full step runs everything"
    parts = [*ends(ys[0]), *levels(ys, sides), text(MIDDLE + BOX // 2, 22, said, "middle")]
    for i, y in enumerate(ys[:-1]):
        parts += pair(i, y, live=i < branch)
    parts += [*descent(ys), *ascent(ys, branch), box(MIDDLE, ys[-1], "M", live=False), *cut(ys, branch, shape)]
    return document(parts, width=RIGHT + BOX + 170, height=ys[-1] + 40)


def rows(unet: UNet) -> tuple[list[int], list[int]]:
    """The top of each pair's row, and of M's below them; the side of the image that each D_i emits."""
    side, y, ys, sides = unet.config.image_size, 46, [], []
    for D_i in unet.D:
        if isinstance(D_i, Downsample):
            side, y = side // 2, y + GAP
        ys.append(y)
        sides.append(side)
        y += PITCH
    return [*ys, y + GAP], sides


def ends(y: int) -> list[str]:
    """x_t comes in at the first row, and eps goes out."""
    line = y + HEIGHT // 2
    return [
        edge([(LEFT - 34, line), (LEFT, line)]),
        edge([(RIGHT + BOX, line), (RIGHT + BOX + 34, line)]),
        text(LEFT - 40, y + 15, "x_t", "end"),
        text(RIGHT + BOX + 40, y + 15, "eps", "start"),
    ]


def levels(ys: list[int], sides: list[int]) -> list[str]:
    """The side of the image, where it changes; of the first row below x_t."""
    changes = [i for i in range(len(sides)) if i == 0 or sides[i] != sides[i - 1]]
    return [text(LEFT - 40, ys[i] + (15 if i else 35), f"{sides[i]} x {sides[i]}", "end") for i in changes]


def pair(i: int, y: int, live: bool) -> list[str]:
    """D_i, U_i and the skip between them."""
    line = y + HEIGHT // 2
    skip = edge([(LEFT + BOX, line), (RIGHT, line)], dashes="4 3")
    return [box(LEFT, y, f"D[{i}]", live), box(RIGHT, y, f"U[{i}]", live), skip]


def descent(ys: list[int]) -> list[str]:
    """From each D_i to the next, and from the last one to M."""
    *inner, last, M = ys
    steps = [edge([(DOWN, above + HEIGHT), (DOWN, below)]) for above, below in zip(inner, [*inner[1:], last])]
    return [*steps, edge([(DOWN, last + HEIGHT), (DOWN, M + HEIGHT // 2), (MIDDLE, M + HEIGHT // 2)])]


def ascent(ys: list[int], branch: int) -> list[str]:
    """From M to the last U_i, and from each to the one above; that into U[branch - 1] is cached_U."""
    *inner, last, M = ys
    steps = [[(UP, below), (UP, above + HEIGHT)] for above, below in zip(inner, [*inner[1:], last])]
    steps += [[(MIDDLE + BOX, M + HEIGHT // 2), (UP, M + HEIGHT // 2), (UP, last + HEIGHT)]]
    return [edge(step, *((EDGE, 3) if i + 1 == branch else ())) for i, step in enumerate(steps)]


def cut(ys: list[int], branch: int, shape: tuple[int, int, int]) -> list[str]:
    """A line across, below what a partial step runs, with the name and the shape of what it is given."""
    y = (ys[branch - 1] + HEIGHT + ys[branch]) / 2
    line = f'<line x1="{LEFT - 34}" x2="{UP - 12}" y1="{y}" y2="{y}" stroke="{EDGE}" stroke-dasharray="7 5"/>'
    name = f"cached_U {' x '.join(map(str, shape))}"
    return [line, text(UP + 12, y + 4, name, "start", f'fill="{EDGE}" font-weight="bold"')]


def box(x: int, y: int, name: str, live: bool) -> str:
    fill = LIVE if live else DEEP
    frame = f'<rect x="{x}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="4" fill="{fill}" stroke="#555"/>'
    return frame + text(x + BOX // 2, y + 15, name, "middle")


def edge(points: list[tuple[float, float]], color: str = "#555", width: float = 1.2, dashes: str = "") -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    marker = "red" if color == EDGE else "grey"
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" '
        f'stroke-dasharray="{dashes}" marker-end="url(#{marker})"/>'
    )


def text(x: float, y: float, words: str, anchor: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {style}>{escape(words)}</text>'


def document(parts: list[str], width: int, height: int) -> str:
    """The SVG that holds these parts, and the heads of their arrows."""
    markers = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="{size}" markerHeight="{size}" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{color}"/></marker>'
        for name, color, size in (("grey", "#555", 6), ("red", EDGE, 4))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><defs>{markers}</defs>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def main(args: argparse.Namespace) -> None:
    prepare_out(args.out, (".svg",), folder=False)
    svg = diagram(shape_of(args.ckpt), args.branch)
    with replacing(args.out) as temporary:
        temporary.write_text(svg)
    print(args.out)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache diagram", doc=__doc__)
    which = f"a checkpoint, or one of {', '.join(PRESETS)} (default: emoji)"
    parser.add_argument("--ckpt", default="emoji", help=which)
    parser.add_argument("--branch", type=int, default=1, help="pairs that stay alive (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("idea.svg"), help="(default: idea.svg)")
    return parser.parse_args(argv)
