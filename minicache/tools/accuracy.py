"""How often a network draws what it is told: is the picture nearest to a sample one of what its caption names?

    python -m minicache accuracy --ckpt emoji --data FOLDER
    python -m minicache accuracy --ckpt emoji --data FOLDER --plan recipe.json

--data: the captions it was trained on (see train_tiny.py). Two groups of captions are drawn: held-out ones, whose
pictures it has never seen, but only those of the same name in another style; and some of the trained ones, always the
same. A sample is right where, of all pictures, trained and held out, the nearest one has the caption's name, in any
style. Only emoji have styles; in a captions.csv, a name is all words of a caption, in their order, and a held-out
picture is known by its path: a copy elsewhere is another one. Nearest is by the cosine of the pixels in [-1, 1], after
a Gaussian blur of SIGMA pixels (at 32 x 32): a sample may be a pixel off, and guidance makes contrasts stronger. Errors
are binomial standard errors.

Writes accuracy.md, and accuracy.png: samples of both groups, each beside the nearest picture that was trained on.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minicache.captions import CATEGORIES, Captioned, captioned
from minicache.checkpoints import fingerprint, load
from minicache.cost import full_passes
from minicache.files import replacing
from minicache.images import enlargement, labelled, save_png, to_tensor, to_uint8
from minicache.placement import choose_placement, place
from minicache.recipe import Recipe, recipe_from, recipe_from_file
from minicache.samplers import SAMPLERS
from minicache.sampling import STEPS, sample
from minicache.tools import Parser, at_least, markdown, prepare_out, refuse_others
from minicache.words import Vocabulary

SIGMA = 1.0
FIRST = 10  # besides the nearest picture, so many nearest ones are looked at
SHOWN = 36  # samples of each group on the sheet


def features(images: Tensor) -> Tensor:
    """[B, C, S, S] near [-1, 1] -> unit vectors [B, C*S*S], blurred, whose products are cosines."""
    sigma = SIGMA * images.shape[-1] / 32
    reach = math.ceil(3 * sigma)
    bell = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    rows = F.pad(images.clamp(-1, 1).flatten(0, 1)[:, None], (reach,) * 4, value=1.0)  # [B*C, 1, ...] on white
    rows = F.conv2d(F.conv2d(rows, bell.reshape(1, 1, -1, 1)), bell.reshape(1, 1, 1, -1))
    return F.normalize(rows.reshape(len(images), -1), dim=1)


def groups(words: Captioned, num: int) -> dict[str, list[int]]:
    """Which pictures' captions are drawn: at most `num` of those held out, if there are any, and of the others."""
    training = words.training()
    trained = np.random.RandomState(0).permutation(training)[:num].tolist()
    found = {"held out": words.held_out()[:num], "trained": trained}
    return {name: indices for name, indices in found.items() if indices}


def judged(told: list[str], shown: Sequence[set[str]], cosines: Tensor) -> dict[str, Any]:
    """A row of the table. told: the names of the samples' captions; shown: those of each picture, which may have
    several; cosines: [n, N], of the samples to the pictures."""
    ranked = cosines.topk(min(FIRST, len(shown)), dim=1).indices.tolist()
    right = [[name in shown[k] for k in row] for name, row in zip(told, ranked)]
    n = len(told)
    accuracy, among_first = sum(row[0] for row in right) / n, sum(map(any, right)) / n
    return {
        "n": n,
        "right": accuracy,
        "+-": math.sqrt(accuracy * (1 - accuracy) / n),
        f"among the {FIRST} nearest": among_first,
        "by chance": sum(name in names for name in told for names in shown) / n / len(shown),
    }


def chosen_recipe(args: argparse.Namespace, vocabulary: Vocabulary) -> Recipe:
    """What --plan or the flags say; the guidance that suits the network, unless another is asked for."""
    flags = {name: getattr(args, name) for name in ("sampler", "steps", "guidance") if getattr(args, name) is not None}
    if args.plan:
        return recipe_from_file(args.plan, **flags)
    return recipe_from(**{"steps": STEPS, "interval": 1, "branch": 1, "guidance": vocabulary.guidance, **flags})


def main(args: argparse.Namespace) -> None:
    at_least(args, num=1, batch_size=1)
    ours = ("accuracy.md", "accuracy.png")
    refuse_others(str(args.out), ours, lambda text: text.startswith(f"{args.ckpt} ("), apart=args.data)
    if not Path(args.data).exists():
        raise ValueError(f"there is no folder {args.data}")
    words = captioned(args.data, args.categories)
    if words is None:
        raise ValueError(f"--data {args.data} has no captions")
    unet = load(args.ckpt)
    if unet.vocabulary is None:
        raise ValueError(f"--ckpt {args.ckpt} knows no words")
    if words.vocabulary().words != unet.vocabulary.words:
        doubt = "was it trained on these captions, and no others? Else, the groups mean nothing"
        warnings.warn(f"{args.data} has not just the words that {args.ckpt} knows: {doubt}", stacklevel=2)
    if unet.config.in_channels != 3:
        raise ValueError(f"pictures of 3 channels are judged, and {args.ckpt} draws {unet.config.in_channels}")
    recipe, weights, size = chosen_recipe(args, unet.vocabulary), fingerprint(unet), unet.config.image_size
    settings, ids = recipe.settings(weights), unet.vocabulary.encode(*words.captions)
    pictures = words.images(size)
    prepare_out(args.out, ())
    unet = place(unet, choose_placement(args.device, "float32", compile=False))
    alike: dict[bytes, list[int]] = {}  # a picture that has several captions, or files, is one
    for i, picture in enumerate(pictures.numpy()):
        alike.setdefault(picture.tobytes(), []).append(i)
    once, shown = zip(*((same[0], {words.names[i] for i in same}) for same in alike.values()))
    known, training = features(to_tensor(pictures)), words.training()
    rows, sheet, labels = [], [], []
    for name, indices in groups(words, args.num).items():
        seeds = range(len(indices))
        drawn = sample(unet, seeds, context=ids[indices], batch_size=args.batch_size, progress=True, **settings).cpu()
        cosines = features(drawn) @ known.T
        told = [words.names[i] for i in indices]
        rows.append({"captions": name, **judged(told, shown, cosines[:, once])})
        nearest = pictures[training][cosines[:SHOWN, training].argmax(dim=1)].numpy()
        sheet.append(np.concatenate([to_uint8(drawn[:SHOWN]), nearest], axis=2))
        labels += [f"{words.captions[i]} ({name})" for i in indices[:SHOWN]]
    how = f"{recipe.label}, {recipe.steps} steps, guidance {recipe.guidance:g}"
    passes = full_passes(unet, recipe.plan, recipe.guidance)
    report = f"{args.ckpt} ({weights}): {how}, {passes:.1f} full passes\n\n{markdown(rows)}"
    with replacing(args.out / "accuracy.md") as temporary:
        temporary.write_text(report)
    print(report)
    save_png(args.out / "accuracy.png", labelled(np.concatenate(sheet), labels, 6, enlargement(size)))
    print(f"{args.out / 'accuracy.png'} (left: sample, right: the nearest picture trained on)")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache accuracy", doc=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="a checkpoint that knows words")
    add("--data", required=True, help="a folder with captions, or with emoji")
    categories = {"type": lambda text: tuple(text.split(",")), "default": CATEGORIES}
    add("--categories", **categories, help=f"what was learned of emoji (default: {','.join(CATEGORIES)})")
    add("--out", type=Path, default=Path("accuracy"), help="a folder (default: accuracy)")
    add("--num", type=int, default=200, help="captions of each group, at most (default: 200)")
    add("--sampler", choices=SAMPLERS, help="(default: ddim)")
    add("--steps", type=int, help=f"(default: {STEPS})")
    add("--guidance", type=float, help="(default: what suits the network)")
    add("--plan", metavar="FILE", help="a recipe (JSON) that sets the sampler, the guidance and what is cached")
    add("--batch-size", type=int, default=50, help="(default: 50)")
    add("--device", default="auto", help="cpu, cuda, mps; default: cuda or mps where there is one, else cpu")
    return parser.parse_args(argv)
