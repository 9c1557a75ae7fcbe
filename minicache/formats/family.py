"""What a family of foreign files is, and the pattern by which all of them name their modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from minicache.checkpoints import PRESETS
from minicache.diffusion import Diffusion
from minicache.reading import understood
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


RESBLOCK = ("norm1", "conv1", "temb_proj", "norm2", "conv2", "shortcut")
ATTENTION = ("norm", "q", "k", "v", "proj_out")
BLOCK = "transformer_blocks.0."
TRANSFORMER = {  # what CompVis, and after them diffusers, call the parts of a Transformer
    **{name: name for name in ("norm", "proj_in", "proj_out")},
    **{name: BLOCK + name for name in ("norm1", "norm2", "norm3")},
    **{f"attn{i}.{name}": f"{BLOCK}attn{i}.to_{name}" for i in (1, 2) for name in ("q", "k", "v")},
    **{f"attn{i}.proj_out": f"{BLOCK}attn{i}.to_out.0" for i in (1, 2)},
    "mlp_in": f"{BLOCK}ff.net.0.proj",
    "mlp_out": f"{BLOCK}ff.net.2",
}
CLASS_TABLE = "cond_stage_model.embedding"  # `tokens`, as CompVis calls it; its last row is the null class


@dataclass(frozen=True)
class Dialect:
    """How others name the same modules.

    {l}: level, {r}: level counted from the deepest, {j}: block of the level, {i}: that of D, {o}: of U, counted from
    the deepest, {last}: where an upsampling stands in its block.
    """

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
    leaves: Mapping[str, str]  # of a ResBlock, where the names differ from ours
    attention: Mapping[str, str] | None  # ATTENTION -> theirs; None: theirs is another one
    transformer: Mapping[str, str] | None = None  # TRANSFORMER; None: they have none
    conv_in: str = "conv_in"
    conv_out: str = "conv_out"

    def modules(self, config: UNetConfig) -> dict[str, str]:
        """Our module path -> theirs, for every module that a network of this config may have."""
        n, levels = config.num_res_blocks, len(config.channel_mult)
        names = {"time.linear1": self.time[0], "time.linear2": self.time[1], "tokens": CLASS_TABLE}
        names |= {"D.0": self.conv_in, "norm_out": self.norm_out, "conv_out": self.conv_out}
        inner = self.transformer if config.context_dim else self.attention
        if inner is None or config.pooled_context:
            raise ValueError("files of this kind have no such attention, and so no names for it")

        def add_block(ours: str, block: str, attn: str) -> None:
            names.update({f"{ours}.{leaf}": f"{block}.{self.leaves.get(leaf, leaf)}" for leaf in RESBLOCK})
            names.update({f"{ours}.attn.{leaf}": f"{attn}.{theirs}" for leaf, theirs in inner.items()})

        for i in range(levels * (n + 1)):
            level, j = divmod(i, n + 1)
            at = {"l": level, "r": levels - 1 - level, "i": i, "o": levels * (n + 1) - 1 - i}
            if j > 0:
                add_block(f"D.{i}", self.down.format(j=j - 1, **at), self.down_attn.format(j=j - 1, **at))
            elif level > 0:
                attends = config.image_size >> level in config.attention_resolutions
                names[f"D.{i}"] = self.downsample.format(**{**at, "l": level - 1})
                names[f"U.{i}.upsample"] = self.upsample.format(last=1 + attends, **at)
            add_block(f"U.{i}.block", self.up.format(j=n - j, **at), self.up_attn.format(j=n - j, **at))
        add_block("M.0", self.mid[0], self.mid_attn)
        add_block("M.1", self.mid[1], "")
        return names

    def keys(self, unet: UNet) -> dict[str, str]:
        """Our parameter -> theirs, for exactly the parameters of this network."""
        modules = self.modules(unet.config)
        split = (key.rpartition(".") for key in unet.state_dict())
        return {f"{module}.{parameter}": f"{modules[module]}.{parameter}" for module, _, parameter in split}

    def infer(
        self, path: Path, state: Mapping[str, Tensor], image_size: int | None, groups: int | None
    ) -> UNetConfig | None:
        """The config of a bare state dict; shapes tell all of it but image_size, groups, heads and `adm`: it is DDPM's.

        PRESETS are recognised by their shapes, with their table of classes or without; None for another network where
        image_size or groups is missing. ValueError for another one with a context.
        """
        with understood(path, "a network of this kind"):
            shapes, attends = self.shapes(state)
        given = {"image_size": image_size, "groups": groups}
        shapes |= {name: value for name, value in given.items() if value is not None}
        unlike = {}  # preset -> what is not alike
        for name, preset in PRESETS.items():
            told = {**shapes, "attention_resolutions": tuple(preset.image_size >> level for level in attends)}
            unlike[name] = [f"{field}={value}" for field, value in told.items() if getattr(preset, field) != value]
        nearest = min(unlike, key=lambda name: len(unlike[name]))
        if not unlike[nearest]:
            preset = PRESETS[nearest]
            table = f"{CLASS_TABLE}.weight" in state
            return preset if table or not preset.num_tokens else replace(preset, num_tokens=None, null_token=0)
        if shapes["context_dim"]:
            raise ValueError(f"{path} is not {nearest}, as {', '.join(unlike[nearest])}; shapes do not tell heads: "
                             "give another network's config=UNetConfig(...)")  # fmt: skip
        if image_size is None or groups is None:
            return None
        return UNetConfig(attention_resolutions=tuple(image_size >> level for level in attends), **shapes)

    def shapes(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[int]]:
        """Fields of the config, and the levels with attention; ValueError for what is no such network."""

        def first(n: int, level: int, j: int = 0) -> Tensor | None:
            block = self.down.format(l=level, j=j, i=level * (n + 1) + 1 + j)
            return state.get(f"{block}.{self.leaves.get('conv1', 'conv1')}.weight")

        n = next(j for j in range(len(state) + 1) if first(0, 0, j) is None)
        conv_in = f"{self.conv_in}.weight"
        if not n or conv_in not in state:
            needed = f"{conv_in}, or the first convolution of {self.down.format(l=0, j=0, i=1)}"
            raise ValueError(f"it lacks {needed}")
        levels = next(level for level in range(len(state) + 1) if first(n, level) is None)
        attns = [self.down_attn.format(l=level, j=0, i=level * (n + 1) + 1) for level in range(levels)]
        channels, keys = len(state[conv_in]), state.get(f"{self.mid_attn}.{TRANSFORMER['attn2.k']}.weight")
        shapes = {
            "model_channels": channels,
            "channel_mult": tuple(len(first(n, level)) // channels for level in range(levels)),
            "num_res_blocks": n,
            "in_channels": state[conv_in].shape[1],
            "context_dim": None if keys is None else keys.shape[1],
        }
        return shapes, [level for level in range(levels) if any(key.startswith(f"{attns[level]}.") for key in state)]
