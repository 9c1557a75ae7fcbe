"""The benchmark's bookkeeping; its times are the machine's."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import random_unet

from minicache import UNetConfig, uniform
from minicache.checkpoints import save
from minicache.cost import macs, plan_macs
from minicache.placement import choose_placement
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


def test_every_variant_is_timed_compiled(tmp_path, monkeypatch, graphs):
    """A graph a branch, of each pass; plans run in them, too; none is left out for dynamo's limit of so many graphs."""
    config = UNetConfig(image_size=2, model_channels=32, channel_mult=(1,), num_res_blocks=2, attention_resolutions=())
    save(tmp_path / "net.pt", random_unet(config))
    monkeypatch.setattr(bench, "diffusers_models", lambda *_: {})
    monkeypatch.setattr(bench, "choose_placement", lambda device, dtype="float32", compile=True: choose_placement(
        "cpu", dtype, compile=compile))  # fmt: skip
    with torch._dynamo.config.patch(cache_size_limit=2):
        bench.main(bench.parse(["--ckpt", str(tmp_path / "net.pt"), "--batch", "1", "--rounds", "2", "--steps", "5"]))
    assert len(graphs) == 2 * 3


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_clock_waits_for_the_device(monkeypatch, kind):
    events = []
    monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda *_: events.append("wait"))
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: events.append("clock") or len(events)))
    bench.timed({"a": lambda: events.append("run")}, 2, "runs", torch.device(kind))
    assert events == ["wait", "clock", "run", "wait", "clock"] * 3


def test_wrong_flags():
    for flags, words in (
        (["--rounds", "1"], "--rounds 1"),
        (["--batch", "0"], "--batch 0"),
        (["--steps", "1"], "--steps 1"),
    ):
        with pytest.raises(ValueError, match=f"{words} must be at least"):
            bench.main(bench.parse(flags))
