"""A small classifier of CIFAR-10, whose features make a Frechet distance that needs no download.

    python -m minicache classifier --data cifar10-train.zip --test cifar10-test.zip --out cifar10_classifier.pt

--data and --test: "cifar10" (downloaded, hash checked), or a folder or zip with one folder of images a class. FID's
own features are those of Inception, trained on ImageNet (`fid`); these are 128 numbers that tell ten
classes apart, and Frechet distances in them are comparable with each other alone.
"""

from __future__ import annotations

import argparse
import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from minicache.checkpoints import embedded_folder
from minicache.data import labelled
from minicache.files import replacing
from minicache.images import to_tensor
from minicache.placement import choose_device, fastest_dtype
from minicache.tensors import write
from minicache.tools import Parser, at_least, prepare_out, refuse_older

FEATURES = 128
CLASSES = 10


def block(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.blocks = nn.Sequential(block(channels, channels), block(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.blocks(h)


class Classifier(nn.Module):
    """Images [B, 3, 32, 32] in [-1, 1] -> logits [B, 10]."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            block(3, 32), nn.MaxPool2d(2),
            block(32, 64), Residual(64), nn.MaxPool2d(2),
            block(64, FEATURES), Residual(FEATURES), nn.MaxPool2d(2),
            Residual(FEATURES),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """[B, 128]: what the last layer decides by."""
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@torch.no_grad()
def classifier_features(images: np.ndarray) -> Tensor:
    """uint8 [B, 32, 32, 3] -> [B, 128], by the classifier that ships; ValueError for other sizes."""
    if images.shape[1:] != (32, 32, 3):
        raise ValueError(f"the classifier's features are for images [B, 32, 32, 3], not {list(images.shape)}")
    return shipped().features(to_tensor(images))


@cache
def shipped() -> Classifier:
    classifier = Classifier().eval()
    content = torch.load(embedded_folder() / "cifar10_classifier.pt", map_location="cpu", weights_only=True)
    classifier.load_state_dict({name: tensor.float() for name, tensor in content["state_dict"].items()})
    return classifier


@torch.no_grad()
def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    classifier.eval()
    device = classifier.head.weight.device
    right = [
        (classifier(to_tensor(part.to(device))).argmax(1).cpu() == truth).sum().item()
        for part, truth in zip(images.split(500), labels.split(500))
    ]
    return sum(right) / len(labels)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flipped and shifted by up to 4 pixels, each at random: uint8 [B, 32, 32, 3] -> [B, 3, 32, 32] in [-1, 1]."""
    x = F.pad(to_tensor(images), (4, 4, 4, 4), mode="reflect")
    dx, dy = torch.randint(9, (2, len(x), 1), generator=generator)
    line = torch.arange(32)
    x = x[torch.arange(len(x))[:, None, None], :, (line + dy)[:, :, None], (line + dx)[:, None, :]]  # [B, 32, 32, 3]
    x = x.permute(0, 3, 1, 2)
    return torch.where((torch.rand(len(x), generator=generator) < 0.5)[:, None, None, None], x.flip(3), x)


def train(images: Tensor, labels: Tensor, epochs: int, batch_size: int, lr: float, device: torch.device) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(images) // batch_size)
    rising = 0.3 if steps == 5 else 0.2  # of 5 steps, 0.2 would be one, and torch divides by one less
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=rising)
    generator, dtype = torch.Generator().manual_seed(0), fastest_dtype(device)[0]
    with tqdm(total=steps, unit="step", disable=None) as bar:
        for _ in range(epochs):
            classifier.train()
            order = torch.randperm(len(images), generator=generator)
            for chosen in order[: steps // epochs * batch_size].split(batch_size):
                x = augmented(images[chosen], generator).to(device, memory_format=torch.channels_last)
                with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
                    loss = F.cross_entropy(classifier(x), labels[chosen].to(device), label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix_str(f"loss {loss.item():.3f}")
    return classifier


def checked_data(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and classes to train on, then those to test with; ValueError for flags or classes that do not fit."""
    at_least(args, epochs=1, batch_size=1)
    if not 0 < args.lr < math.inf:
        raise ValueError(f"--lr {args.lr:g} must be positive and finite")
    images, labels, names = labelled(args.data, "train")
    test_images, test_labels, test_names = labelled(args.test, "test")
    if not 2 <= len(names) <= CLASSES:
        raise ValueError(f"--data {args.data} has {len(names)} classes; the classifier tells 2 to {CLASSES} apart")
    if names != test_names:
        raise ValueError(f"--data has the classes {', '.join(names)}, and --test {', '.join(test_names)}")
    if args.batch_size > len(images):
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(images)} images of --data")
    return images, labels, test_images, test_labels


def main(args: argparse.Namespace) -> None:
    images, labels, test_images, test_labels = checked_data(args)
    if (out := Path(args.out)).is_dir():
        raise ValueError(f"--out {out} is a folder; give a file")
    prepare_out(out, (".pt",), folder=False)
    refuse_older(out)
    classifier = train(images, labels, args.epochs, args.batch_size, args.lr, choose_device(args.device))
    state = {
        name: tensor.cpu().half() for name, tensor in classifier.state_dict().items() if tensor.is_floating_point()
    }
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ValueError(f"--lr {args.lr:g}: the weights became NaN or infinite; try a smaller --lr")
    score = accuracy(classifier, test_images, test_labels)
    with replacing(out) as temporary:
        write(temporary, {"state_dict": state, "accuracy": score})
    print(f"{out}: {score:.2%} of {len(test_labels)} test images are classified right")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m minicache classifier", doc=__doc__)
    add = parser.add_argument
    add("--data", default="cifar10", help="to train on (default: cifar10)")
    add("--test", default="cifar10", help="to state the accuracy on (default: cifar10)")
    add("--epochs", type=int, default=6, help="(default: 6)")
    add("--batch-size", type=int, default=250, help="(default: 250)")
    add("--lr", type=float, default=0.2, help="the highest learning rate (default: 0.2)")
    add("--device", default="auto", help="cpu, cuda, mps; default: cuda or mps where there is one, else cpu")
    add("--out", default="cifar10_classifier.pt", help="(default: cifar10_classifier.pt)")
    return parser.parse_args(argv)
