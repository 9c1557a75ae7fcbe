"""P. Esser's conversions of Ho et al.'s weights; DeepCache's official code and ermongroup/ddim read the same names."""

from __future__ import annotations

from minicache.formats.family import ATTENTION, Dialect, Family

NAMES = Dialect(
    time=("temb.dense.0", "temb.dense.1"),
    norm_out="norm_out",
    down="down.{l}.block.{j}",
    down_attn="down.{l}.attn.{j}",
    downsample="down.{l}.downsample.conv",
    mid=("mid.block_1", "mid.block_2"),
    mid_attn="mid.attn_1",
    up="up.{l}.block.{j}",
    up_attn="up.{l}.attn.{j}",
    upsample="up.{l}.upsample.conv",
    leaves={"shortcut": "nin_shortcut"},
    attention={leaf: leaf for leaf in ATTENTION},
)
PESSER = Family(
    mine=lambda content: any(str(key).startswith("down.") for key in content),
    keys=NAMES.keys,
    infer=NAMES.infer,
)
