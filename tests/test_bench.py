"""The benchmark's bookkeeping; its times are the machine's."""

import json

import pytest
from conftest import random_unet

from minicache import uniform
from minicache.checkpoints import save
from minicache.cost import macs, plan_macs
from minicache.tools import bench


def test_bench(tmp_path, capsys):
    save(tmp_path / "net.pt", unet := random_unet())
    bench.main(bench.parse(["--ckpt", str(tmp_path / "net.pt"), "--batch", "1", "2", "--rounds", "2", "--steps", "5",
                            "--out", str(tmp_path)]))  # fmt: skip
    rows = [bench.Row(**row) for row in json.loads((tmp_path / "bench.json").read_text())["rows"]]
    assert {row.batch for row in rows} == {1, 2} and {"float32"} <= {row.placement for row in rows}
    by_macs = {row.what: row.by_macs for row in rows if row.by_macs}
    for branch in (1, 2, 3):
        assert by_macs[f"branch {branch}"] == pytest.approx(macs(unet) / macs(unet, branch))
        cached = plan_macs(unet, uniform(5, 5, branch))
        assert by_macs[f"DDIM-5, N=5, branch {branch}"] == pytest.approx(5 * macs(unet) / cached)
    for row in rows:
        assert row.ms > 0 and (row.by_macs is None or row.efficiency == pytest.approx(row.speed_up / row.by_macs))
        assert row.psnr is None or row.psnr > 15
    whole, partial = (next(row.ms for row in rows if row.what == what) for what in ("full pass", "branch 1"))
    assert next(row.speed_up for row in rows if row.what == "branch 1") == pytest.approx(whole / partial)
    assert (tmp_path / "bench.md").read_text().split("\n\n")[1] in capsys.readouterr().out


def test_wrong_flags():
    for flags, words in (
        (["--rounds", "1"], "--rounds 1"),
        (["--batch", "0"], "--batch 0"),
        (["--steps", "1"], "--steps 1"),
    ):
        with pytest.raises(ValueError, match=f"{words} must be at least"):
            bench.main(bench.parse(flags))
