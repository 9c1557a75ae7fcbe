"""The benchmark's bookkeeping; its times are the machine's."""

import copy
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, random_unet, relative

from minicache import UNetConfig, placement, uniform
from minicache.checkpoints import PRESETS, save
from minicache.cost import macs, plan_macs
from minicache.placement import choose_placement
from minicache.tools import bench


def run(*flags: str) -> None:
    bench.main(bench.parse([*flags, "--rounds", "2"]))


def test_passes_and_plans(tmp_path, capsys):
    save(tmp_path / "net.pt", unet := random_unet())
    run("--ckpt", str(tmp_path / "net.pt"), "--batch", "1", "2", "--steps", "5", "--out", str(tmp_path),
        "--dtype", "float32", "bfloat16")  # fmt: skip
    tables = json.loads((tmp_path / "bench.json").read_text())
    assert len(tables["passes"]) == 2 * 2 * 4 and not tables["schedules"]  # none is published of this network
    for row in tables["passes"]:
        branch = None if row["pass"] == "full" else int(row["pass"].split()[-1])
        assert row["by MACs"] == pytest.approx(macs(unet) / macs(unet, branch))
        whole = next(
            other for other in tables["passes"] if (other["dtype"], other["batch"]) == (row["dtype"], row["batch"])
        )
        assert row["speed-up"] == pytest.approx(whole["ours, ms"] / row["ours, ms"])
    plans = [row for row in tables["plans"] if "diffusers" not in row["plan"]]
    assert [row["plan"] for row in plans[:4]] == [
        "DDIM-5, uncached", *(f"DDIM-5, N=5, branch {branch}" for branch in (3, 2, 1))]  # fmt: skip
    assert plans[3]["by MACs"] == pytest.approx(5 * macs(unet) / plan_macs(unet, uniform(5, 5, 1)))
    assert {row["dtype"] for row in plans if row.get("PSNR to float32", 0) > 15} == {"bfloat16"}
    assert (tmp_path / "bench.md").read_text().split("\n\n", 1)[1] in capsys.readouterr().out


def test_files_of_others_stay(tmp_path, monkeypatch):
    config = UNetConfig(image_size=2, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=())
    save(tmp_path / "net.pt", random_unet(config))
    monkeypatch.setattr(bench, "diffusers_model", lambda *_: None)
    flags = ["--ckpt", str(tmp_path / "net.pt"), "--batch", "1", "--steps", "0", "--dtype", "float32", "--out"]
    for name in ("bench.md", "bench.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name} exists, and is of no earlier run like this one"):
            run(*flags, str(tmp_path))
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    run(*flags, str(tmp_path))
    run(*flags, str(tmp_path))  # over its own


def test_branches_that_a_network_lacks_are_left_out(tmp_path):
    config = UNetConfig(image_size=2, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=())
    save(tmp_path / "net.pt", unet := random_unet(config))
    assert len(unet.D) == 2
    flags = ["--batch", "1", "--steps", "5", "--dtype", "float32", "--out", str(tmp_path / "out")]
    run("--ckpt", str(tmp_path / "net.pt"), *flags)
    tables = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["pass"] for row in tables["passes"]] == ["full", "branch 1", "branch 2"]
    plans = [row["plan"] for row in tables["plans"] if "diffusers" not in row["plan"]]
    assert plans == ["DDIM-5, uncached", *(f"DDIM-5, N=5, branch {branch}" for branch in (2, 1))]


def test_schedules_are_worked_out_from_passes(tmp_path, monkeypatch):
    """A schedule's time is that of its passes; the column beside it is the paper's."""
    monkeypatch.setitem(PRESETS, "cifar10", SMALL)
    seconds = {}
    original = bench.time_passes
    monkeypatch.setattr(bench, "time_passes", lambda *args: seconds.update(original(*args)) or seconds)
    run("--arch", "cifar10", "--batch", "1", "--steps", "0", "--dtype", "float32", "--out", str(tmp_path))
    tables = json.loads((tmp_path / "bench.json").read_text())
    assert not tables["plans"]
    assert [row["the paper"] for row in tables["schedules"]] == [1.40, 1.61, 1.85, 2.07]
    row, full, part = tables["schedules"][2], seconds["float32", "ours", None], seconds["float32", "ours", 3]
    assert row["schedule"] == "100 steps, N=5, branch 3"
    assert row["ours, here"] == pytest.approx(100 * full / (20 * full + 80 * part))
    unet = random_unet()
    assert row["by MACs"] == pytest.approx(5 / (1 + 4 * macs(unet, 3) / macs(unet)))


def test_large_networks_are_timed_at_the_papers_branch():
    args = bench.parse(["--arch", "sd15"])
    shape, paper, placements = bench.completed(args)
    assert (args.batch, args.branch, args.steps, args.rounds, list(placements)) == ([2], [2], 0, 3, ["float32"])
    seconds = {("float32", who, b): s for who, b, s in (("ours", None, 4.0), ("ours", 2, 1.0), ("diffusers", None, 5.0),
                                                         ("DeepCache", None, 5.5), ("DeepCache", 2, 1.5))}  # fmt: skip
    row = next(row for row in bench.schedule_rows(shape, paper, seconds, 2) if "N=5" in row["schedule"])
    assert row["the paper"] == 2.11 and row["GMACs a step"] == pytest.approx(113.5, abs=0.1)
    assert row["ours, here"] == pytest.approx(50 * 4 / (10 * 4 + 40 * 1))
    assert row["DeepCache, here"] == pytest.approx(50 * 5 / (10 * 5.5 + 40 * 1.5))


LATENT = {"context_dim": 24, "adm": True, "attention_resolutions": (16, 8)}
CLASSES = {"num_tokens": 5, "null_token": 4}


@pytest.mark.parametrize("branch, fields", [(1, {}), (2, {}), (3, {}), (1, LATENT | CLASSES), (2, LATENT)])
def test_the_same_network_takes_part_three_times(branch, fields):
    """diffusers' full pass is ours, and so is the partial pass of DeepCache's helper."""
    pytest.importorskip("diffusers")
    unet = random_unet(UNetConfig(**{**asdict(SMALL), "num_res_blocks": 2, **fields}))
    model = bench.diffusers_model(unet, choose_placement("cpu", "float32")).double()
    unet.double()  # as both round, each in its way; timesteps are embedded in float32 still
    torch.manual_seed(0)
    x, t, context = bench.inputs(unet, 2)
    eps, cached_U = unet.forward_full(x, t, branch, context)
    assert relative(model(x, t, context).sample, eps) < 5e-6
    pytest.importorskip("DeepCache")
    twin = bench.helped(model, branch, [t, t - 1])
    assert relative(twin(x, t, context).sample, eps) < 5e-6
    moved = unet.forward_partial(x + 0.1, t - 1, cached_U, branch, context)
    assert relative(twin(x + 0.1, t - 1, context).sample, moved) < 5e-6
    assert relative(model(x + 0.1, t - 1, context).sample, moved) > 1e-3  # and is unlike the full pass


def test_pictures_that_are_compared_were_told_the_same(monkeypatch):
    unet, told = random_unet(UNetConfig(**{**asdict(SMALL), **LATENT})), []
    monkeypatch.setattr(bench, "sample", lambda unet, seeds, plan, context: told.append(context) or torch.zeros(2, 3))
    args = bench.parse(["--ckpt", "x", "--steps", "10"])
    bench.plan_rows({"float32": unet, "float64": copy.deepcopy(unet).double()}, {}, 2, args)
    assert {each.dtype for each in told} == {torch.float32, torch.float64}
    assert all(torch.equal(each.float(), told[0].float()) for each in told)


def test_every_variant_is_timed_compiled(tmp_path, monkeypatch, graphs):
    """A graph a branch, of each pass; plans run in them, too; none is left out for dynamo's limit of so many graphs."""
    config = UNetConfig(image_size=2, model_channels=32, channel_mult=(1,), num_res_blocks=2, attention_resolutions=())
    save(tmp_path / "net.pt", random_unet(config))
    monkeypatch.setattr(bench, "diffusers_model", lambda *_: None)
    monkeypatch.setattr(placement, "cpu_capabilities", dict)  # passes are timed in the dtype that plans run in: float32
    monkeypatch.setattr(bench, "choose_placement", lambda device, dtype, memory_format, compile: choose_placement(
        "cpu", dtype, memory_format, compile is not False))  # fmt: skip
    with torch._dynamo.config.patch(cache_size_limit=2):
        run("--ckpt", str(tmp_path / "net.pt"), "--batch", "1", "--steps", "5")
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
        (["--batch", "8", "0"], "--batch 0"),
        (["--batch", "1000000000000000000"], "--batch 1000000000000000000"),
        (["--steps", "1"], "--steps 1"),
        (["--steps", "5000"], "--steps 5000"),
    ):
        with pytest.raises(ValueError, match=f"{words} must be at least"):
            bench.main(bench.parse(flags))
