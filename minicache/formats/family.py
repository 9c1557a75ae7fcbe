"""What a family of foreign files is, and the pattern by which pesser, TensorFlow and diffusers name their modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from minicache.diffusion import Diffusion
from minicache.unet import CIFAR10, LSUN_256, UNet, UNetConfig


@dataclass(frozen=True)
class Family:
    """How others write the same network: all that `formats.read` asks of them. content: of a file, as it was read."""

    mine: Callable[[Mapping[str, Any]], bool]  # does this content look like theirs?
    keys: Callable[[UNet], dict[str, str]]  # our parameter -> theirs, for exactly the parameters of this network
    infer: Callable[[Path, Mapping[str, Tensor], int | None], UNetConfig]  # the config, from shapes: Dialect.infer
    # the tensors in this content by their names; ema: the averages, where there are raw weights, too
    tensors: Callable[[Mapping[str, Any], bool], Mapping[str, Tensor]] = lambda content, ema: content
    # what files beside this one tell
    told: Callable[[Path], tuple[UNetConfig | None, Diffusion | None]] = lambda path: (None, None)


@dataclass(frozen=True)
class Dialect:
    """How others name the same modules. {l}: level, {r}: level counted from the deepest, {j}: block of the level."""

    time: tuple[str, str]
    norm_out: str
    down: str
    down_attn: str
    downsample: str
    mid: tuple[str, str]
    mid_attn: str
    up: str
    up_attn: str
    upsample: str
    leaves: Mapping[str, str]  # of blocks and attention, where the names differ from ours

    def modules(self, config: UNetConfig) -> dict[str, str]:
        """Our module path -> theirs, for every module that a network of this config may have."""
        n, levels = config.num_res_blocks, len(config.channel_mult)
        names = {"time.linear1": self.time[0], "time.linear2": self.time[1]}
        names |= {"D.0": "conv_in", "norm_out": self.norm_out, "conv_out": "conv_out"}

        def add_block(ours: str, block: str, attn: str) -> None:
            for leaf in ("norm1", "conv1", "temb_proj", "norm2", "conv2", "shortcut"):
                names[f"{ours}.{leaf}"] = f"{block}.{self.leaves.get(leaf, leaf)}"
            for leaf in ("norm", "q", "k", "v", "proj_out"):
                names[f"{ours}.attn.{leaf}"] = f"{attn}.{self.leaves.get(leaf, leaf)}"

        for i in range(levels * (n + 1)):
            level, j = divmod(i, n + 1)
            at = {"l": level, "r": levels - 1 - level}
            if j > 0:
                add_block(f"D.{i}", self.down.format(j=j - 1, **at), self.down_attn.format(j=j - 1, **at))
            elif level > 0:
                names[f"D.{i}"] = self.downsample.format(l=level - 1)
                names[f"U.{i}.upsample"] = self.upsample.format(**at)
            add_block(f"U.{i}.block", self.up.format(j=n - j, **at), self.up_attn.format(j=n - j, **at))
        add_block("M.0", self.mid[0], self.mid_attn)
        add_block("M.1", self.mid[1], "")
        return names

    def keys(self, unet: UNet) -> dict[str, str]:
        """Our parameter -> theirs, for exactly the parameters of this network."""
        modules = self.modules(unet.config)
        split = (key.rpartition(".") for key in unet.state_dict())
        return {f"{module}.{parameter}": f"{modules[module]}.{parameter}" for module, _, parameter in split}

    def infer(self, path: Path, state: Mapping[str, Tensor], image_size: int | None) -> UNetConfig:
        """The config of a bare state dict. Shapes tell all but the image size, which the presets' shapes imply."""

        def first(level: int, j: int = 0) -> Tensor | None:
            return state.get(f"{self.down.format(l=level, j=j)}.conv1.weight")

        levels = next(level for level in range(len(state) + 1) if first(level) is None)
        if not levels or "conv_in.weight" not in state:
            raise ValueError(
                f"{path} is not a network of this kind: it lacks conv_in, or the first block on the way down"
            )
        widths, channels = [len(first(level)) for level in range(levels)], len(state["conv_in.weight"])
        attends = [f"{self.down_attn.format(l=level, j=0)}.{self.leaves.get('q', 'q')}.weight" in state
                   for level in range(levels)]  # fmt: skip

        def config(size: int) -> UNetConfig:
            return UNetConfig(
                image_size=size,
                model_channels=channels,
                channel_mult=tuple(width // channels for width in widths),
                num_res_blocks=next(j for j in range(len(state) + 1) if first(0, j) is None),
                attention_resolutions=tuple(size >> level for level in range(levels) if attends[level]),
                in_channels=state["conv_in.weight"].shape[1],
            )

        if image_size is not None:
            return config(image_size)
        for preset in (CIFAR10, LSUN_256):
            if config(preset.image_size) == replace(preset, dropout=0.0):
                return preset
        raise ValueError(
            f"{path} is a bare state dict, and its shapes do not tell its image size: pass config=UNetConfig(...), "
            "or convert it first, with python -m minicache convert SRC DST --image-size PIXELS"
        )
