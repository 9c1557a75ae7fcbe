"""What a family of foreign files is, and the pattern by which pesser, TensorFlow and diffusers name their modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minicache.checkpoints import PRESETS
from minicache.diffusion import Diffusion
from minicache.unet import UNet, UNetConfig


@dataclass(frozen=True)
class Family:
    """How others write the same network: all that `formats.read` asks of them.

    mine(content): does what a file holds look like theirs?
    tensors(content, raw): the tensors in it by their names; raw: not the averages, where files hold both.
    averages: do their files hold both?
    told(path, content): the config and the diffusion that this file, or one beside it, tells; each None if none does.
    infer(path, tensors, image_size, groups): the config, from shapes; None where image_size or groups is missing.
    keys(unet): our parameter -> theirs, for exactly the parameters of this network.
    """

    mine: Callable[[Mapping[str, Any]], bool]
    keys: Callable[[UNet], dict[str, str]]
    infer: Callable[[Path, Mapping[str, Tensor], int | None, int | None], UNetConfig | None]
    tensors: Callable[[Mapping[str, Any], bool], Mapping[str, Tensor]] = lambda content, raw: content
    averages: bool = False
    told: Callable[[Path, Mapping[str, Any]], tuple[UNetConfig | None, Diffusion | None]] = lambda *_: (None, None)


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
    conv_in: str = "conv_in"
    conv_out: str = "conv_out"

    def modules(self, config: UNetConfig) -> dict[str, str]:
        """Our module path -> theirs, for every module that a network of this config may have."""
        n, levels = config.num_res_blocks, len(config.channel_mult)
        names = {"time.linear1": self.time[0], "time.linear2": self.time[1]}
        names |= {"D.0": self.conv_in, "norm_out": self.norm_out, "conv_out": self.conv_out}

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
        if unet.config.context_dim:
            raise ValueError(f"this format has no network with a context, and so no names for {unet.config}")
        modules = self.modules(unet.config)
        split = (key.rpartition(".") for key in unet.state_dict())
        return {f"{module}.{parameter}": f"{modules[module]}.{parameter}" for module, _, parameter in split}

    def infer(
        self, path: Path, state: Mapping[str, Tensor], image_size: int | None, groups: int | None
    ) -> UNetConfig | None:
        """The config of a bare state dict; shapes tell all of it but image_size and groups.

        PRESETS are recognised by their shapes; None for another network where image_size or groups is missing.
        """

        def first(level: int, j: int = 0) -> Tensor | None:
            return state.get(f"{self.down.format(l=level, j=j)}.{self.leaves.get('conv1', 'conv1')}.weight")

        levels = next(level for level in range(len(state) + 1) if first(level) is None)
        conv_in = f"{self.conv_in}.weight"
        if not levels or conv_in not in state:
            needed = f"{conv_in}, or the first convolution of {self.down.format(l=0, j=0)}"
            raise ValueError(f"{path} is not a network of this kind: it lacks {needed}")
        channels, q = len(state[conv_in]), self.leaves.get("q", "q")
        attends = [level for level in range(levels) if f"{self.down_attn.format(l=level, j=0)}.{q}.weight" in state]
        shapes = {
            "model_channels": channels,
            "channel_mult": tuple(len(first(level)) // channels for level in range(levels)),
            "num_res_blocks": next(j for j in range(len(state) + 1) if first(0, j) is None),
            "in_channels": state[conv_in].shape[1],
        }
        for preset in PRESETS.values():
            size = preset.image_size
            told = {**shapes, "attention_resolutions": tuple(size >> level for level in attends)}
            alike = all(getattr(preset, name) == value for name, value in told.items())
            if alike and image_size in (None, size) and groups in (None, preset.groups):
                return preset
        if image_size is None or groups is None:
            return None
        attention = tuple(image_size >> level for level in attends)
        return UNetConfig(image_size, attention_resolutions=attention, groups=groups, **shapes)
