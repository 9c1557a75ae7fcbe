"""Many pictures: killed, resumed and shared among processes, the set of images is the same, byte for byte."""

import json
import os
import select
import signal
import subprocess
import sys
import time
import zipfile
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_unet

from minicache import shards
from minicache.checkpoints import save
from minicache.shards import ImageSet, fill
from sample import main, parse

FLAGS = ["--steps", "4", "--num", "11", "--batch-size", "3", "--branch", "2"]


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "net.pt"
    save(path, random_unet())
    return path


def images_of(seeds: range) -> np.ndarray:
    return np.stack([np.full((4, 4, 3), seed % 256, np.uint8) for seed in seeds])


def contents(path: Path) -> bytes | dict[str, bytes]:
    return path.read_bytes() if path.is_file() else {p.name: p.read_bytes() for p in sorted(path.iterdir())}


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_full_disk_leaves_no_shard_that_is_cut(tmp_path):
    """A limit on the size of files stands for the full disk. NumPy's own writing of small arrays does not see it."""
    import resource

    images, before = ImageSet(tmp_path / "x.npz", range(4), 4, {}), resource.getrlimit(resource.RLIMIT_FSIZE)
    images.folder.mkdir()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
        with pytest.raises(OSError):
            images.write(range(4), images_of(range(4)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(images.folder.iterdir())


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", ["x.npz", "folder"])
def test_what_was_interrupted_goes_on(tmp_path, name):
    images = ImageSet(tmp_path / name, range(100, 111), 4, {"plan": [1, 2]})
    drawn = []

    def draw(seeds):
        if len(drawn) == 2:
            raise Interrupted
        drawn.append(seeds)
        return images_of(seeds)

    with pytest.raises(Interrupted):
        fill(images, draw)
    assert not (tmp_path / "x.npz").exists()
    rest = []
    assert fill(images, lambda seeds: (rest.append(seeds), images_of(seeds))[1]) == 3
    assert (drawn, rest) == ([range(100, 104), range(104, 108)], [range(108, 111)])
    assert fill(images, lambda seeds: pytest.fail("drawn twice")) == 0
    fill(ImageSet(tmp_path / "whole" / name, range(100, 111), 4, {"plan": [1, 2]}), images_of)
    assert contents(tmp_path / "whole" / name) == contents(tmp_path / name)
    if name == "x.npz":
        assert not images.folder.exists()
        with np.load(tmp_path / name) as arrays:
            assert np.array_equal(arrays["arr_0"], images_of(range(100, 111)))


@pytest.mark.parametrize("name", ["x.npz", "folder"])
def test_other_settings_are_refused(tmp_path, name):
    out = tmp_path / name

    def broken(seeds):
        if seeds[0]:
            raise Interrupted
        return images_of(seeds)

    with pytest.raises(Interrupted):
        fill(ImageSet(out, range(8), 4, {"eta": 0.5}), broken)
    for _ in ("begun", "complete"):
        with pytest.raises(ValueError, match=r"was made with eta 0.5, not 0.0; choose another --out"):
            fill(ImageSet(out, range(8), 4, {"eta": 0.0}), images_of)
        fill(ImageSet(out, range(8), 4, {"eta": 0.5}), images_of)


@pytest.mark.parametrize("name", ["x.npz", "folder"])
def test_settings_may_change_before_the_first_picture(tmp_path, name):
    def broken(seeds):
        raise Interrupted

    with pytest.raises(Interrupted):
        fill(ImageSet(tmp_path / name, range(4), 4, {"eta": 0.5}), broken)
    assert fill(ImageSet(tmp_path / name, range(4), 4, {"eta": 0.0}), images_of) == 4
    assert fill(ImageSet(tmp_path / name, range(4), 4, {"eta": 0.0}), images_of) == 0


def test_other_settings_are_named(tmp_path):
    plan = {"steps": 9, "refresh": [0, 5]}
    fill(ImageSet(tmp_path / "x", range(1), 4, {"plan": plan}), images_of)
    for other, message in (({"steps": 8}, "plan.steps 9, not 8"), ({"refresh": [0, 4]}, "another plan.refresh")):
        with pytest.raises(ValueError, match=f"was made with {message}; choose another --out"):
            fill(ImageSet(tmp_path / "x", range(1), 4, {"plan": plan | other}), images_of)


@pytest.mark.parametrize("text", ["[1]", "not JSON", '{"name": "an app"}', "[" * 100_000])
def test_a_manifest_of_something_else_is_left_alone(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json tells of something else than pictures drawn here"):
        fill(ImageSet(tmp_path, range(3), 2, {"eta": 0.5}), images_of)
    assert contents(tmp_path) == {"manifest.json": text.encode()}


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
@pytest.mark.parametrize("name", ["x.npz", "folder"])
def test_a_second_run_is_refused_while_one_is_at_work(tmp_path, name):
    images = ImageSet(tmp_path / name, range(4), 2, {"eta": 0.5})

    def draw(seeds):
        with pytest.raises(ValueError, match="is being drawn into by another process"):
            fill(images, images_of)
        return images_of(seeds)

    assert fill(images, draw) == 4
    assert fill(images, images_of) == 0


@pytest.fixture
def second_of_two(monkeypatch):
    """This process is the second of two; nobody is met."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(shards, "meet", lambda: None)


@pytest.mark.parametrize("rank, world", [("abc", "2"), ("2", "2"), ("-1", "2"), ("1", None), ("0", "")])
def test_a_rank_that_torchrun_does_not_set_is_refused(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=f"RANK={rank}, WORLD_SIZE={world or '(1|)'} in the environment"):
        shards.rank_and_world()


def begin(out: Path, **manifest) -> ImageSet:
    """A set whose first run was killed before the first picture."""

    def killed(seeds):
        raise Interrupted

    images = ImageSet(out, range(4), 2, manifest)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setenv("RANK", "0")
        fill(images, killed)
    return images


@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
@pytest.mark.parametrize("name", ["x.npz", "folder"])
def test_what_is_left_of_a_killed_run_keeps_others_out(tmp_path, second_of_two, name):
    """The first process is killed, the second one lives on: nobody may begin anew while it draws."""
    images = begin(tmp_path / name, eta=0.5)

    def draw(seeds):
        with pytest.raises(ValueError, match="is being drawn into by another process"):
            begin(tmp_path / name, eta=0.0)
        return images_of(seeds)

    assert fill(images, draw) == 2
    assert json.loads((images.folder / "manifest.json").read_text())["eta"] == 0.5


def test_what_is_left_of_a_killed_run_does_not_draw_into_another(tmp_path, second_of_two):
    images = begin(tmp_path / "folder", eta=0.5)
    begin(tmp_path / "folder", eta=0.0)
    with pytest.raises(ValueError, match=r"was made with eta 0.0, not 0.5"):
        fill(images, images_of)
    assert [path.name for path in images.folder.iterdir()] == ["manifest.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="no parents there")
def test_a_process_ends_with_its_launcher():
    """Whatever it waits for: the pipe is closed when the process has ended."""
    code = "import os, time, threading; from minicache.shards import end_with; launcher = os.getppid();"
    code += "threading.Thread(target=end_with, args=(launcher,), daemon=True).start();"
    code += "print(launcher, flush=True); time.sleep(600)"  # the launcher may be gone from here on
    launcher = subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" & wait', sys.executable, code], cwd=ROOT, stdout=subprocess.PIPE
    )
    with launcher.stdout as output:
        assert int(output.readline()) == launcher.pid
        launcher.kill()
        assert launcher.wait() == -signal.SIGKILL
        assert select.select([output], [], [], 60)[0] and output.read() == b""


def first_process() -> str:
    """The name of the program that adopts orphans, as far as it is told."""
    try:
        return Path(os.readlink("/proc/1/exe")).name
    except OSError:
        return ""


@pytest.mark.skipif(sys.platform == "win32", reason="no parents there")
@pytest.mark.skipif(first_process().startswith("python"), reason="it passes for torchrun")
def test_a_process_whose_launcher_has_gone_before_meets_nobody():
    """It was still importing torch. The port is closed, and would be tried for days."""
    code = "import os, time; launcher = os.getppid(); print(launcher, flush=True)\n"
    code += "while os.getppid() == launcher: time.sleep(0.01)\n"
    code += "from minicache import shards; shards.meet()"
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    torchrun |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    process = subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" 2>&1 & wait', sys.executable, code],
        cwd=ROOT, env={**os.environ, **torchrun}, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process.stdout as output:
        assert int(output.readline()) == process.pid
        process.kill()
        process.wait()
        assert select.select([output], [], [], 120)[0]
        assert output.read().splitlines()[-1:] == [b"ValueError: torchrun, which has started this process, has gone"]


@pytest.mark.parametrize("name", ["x.npz", "folder"])
def test_threads_are_those_of_the_first_run(tmp_path, name):
    """Sums are split among threads: another number of them changes the last bits."""
    images, seen, before = ImageSet(tmp_path / name, range(6), 2, {"eta": 0.5}), [], torch.get_num_threads()

    def draw(seeds):
        seen.append(torch.get_num_threads())
        if len(seen) == 2:
            raise Interrupted
        return images_of(seeds)

    try:
        torch.set_num_threads(2)
        with pytest.raises(Interrupted):
            fill(images, draw)
        torch.set_num_threads(1)
        assert fill(images, draw) == 4
        assert seen == [2, 2, 2, 2] and torch.get_num_threads() == 1
        assert fill(images, draw) == 0
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [0, -1, "two", 10**9, None])
def test_a_number_of_threads_that_nobody_wrote_is_refused(tmp_path, threads):
    images = begin(tmp_path / "folder", eta=0.5)
    (images.folder / "manifest.json").write_text(json.dumps({"eta": 0.5, "threads": threads}))
    with pytest.raises(ValueError, match="tells of something else"):
        fill(images, images_of)


def interrupted_set(out: Path) -> ImageSet:
    """Two shards of three are there."""
    images = ImageSet(out, range(11), 4, {"eta": 0.5})

    def broken(seeds):
        if seeds[0] == 8:
            raise Interrupted
        return images_of(seeds)

    with pytest.raises(Interrupted):
        fill(images, broken)
    return images


@pytest.mark.parametrize("size", [0, 20, -1])
@pytest.mark.parametrize("name", ["x.npz", "folder"])
def test_a_file_that_is_cut_off_is_drawn_again(tmp_path, name, size):
    images = interrupted_set(tmp_path / name)
    file = images.files(range(4, 8))[0]
    file.write_bytes(file.read_bytes()[:size])
    assert fill(images, images_of) == 4 + 3
    fill(ImageSet(tmp_path / "whole" / name, range(11), 4, {"eta": 0.5}), images_of)
    assert contents(tmp_path / "whole" / name) == contents(tmp_path / name)


def test_a_shard_of_too_few_images_is_drawn_again(tmp_path):
    images = interrupted_set(tmp_path / "x.npz")
    np.save(images.files(range(4, 8))[0], images_of(range(4, 6)))
    assert fill(images, images_of) == 4 + 3
    with np.load(tmp_path / "x.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], images_of(range(11)))


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
@pytest.mark.parametrize("out", ["folder", "x.npz"])
def test_nothing_is_written_through_a_link(tmp_path, out):
    images = interrupted_set(tmp_path / out)
    (tmp_path / "precious.txt").write_text("mine")
    path = images.files(range(4, 8))[0]
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "precious.txt")
    with pytest.raises(ValueError, match=f"{path.name} is a link"):
        fill(images, images_of)
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("out", ["folder", "x.npz"])
@pytest.mark.parametrize("count", [3, 5])
def test_there_is_an_image_for_each_seed(tmp_path, out, count):
    with pytest.raises(ValueError, match=f"{count} images were drawn for 4 seeds"):
        fill(ImageSet(tmp_path / out, range(4), 4, {}), lambda shard: images_of(range(count)))
    assert not [*tmp_path.rglob("*.png"), *tmp_path.rglob("*.np?")]


@pytest.mark.parametrize("other", [np.zeros((4, 4, 5, 3), np.uint8), np.zeros((4, 4, 4, 3), np.float32)])
def test_a_shard_of_other_images_is_named_and_all_are_kept(tmp_path, other):
    images = interrupted_set(tmp_path / "x.npz")
    np.save(images.files(range(4, 8))[0], other)
    with pytest.raises(ValueError, match=r"000000004\.npy holds other images than .*000000000\.npy"):
        fill(images, images_of)
    assert len(list(images.folder.glob("*.npy"))) == 3 and not images.out.exists()


def test_shards_are_removed_only_when_the_npz_reads_back(tmp_path, monkeypatch):
    images = interrupted_set(tmp_path / "x.npz")
    sums = count()
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"arr_0\.npy reads back as something else"):
        patch.setattr(zipfile, "crc32", lambda *_: next(sums))  # what is read has another than what was written
        fill(images, images_of)
    assert len(list(images.folder.glob("*.npy"))) == 3 and not images.out.exists()
    assert fill(images, images_of) == 0 and images.out.exists()


def test_killed_between_the_npz_and_the_end(tmp_path):
    images = ImageSet(tmp_path / "x.npz", range(4), 2, {"eta": 0.5})
    fill(images, images_of)
    images.folder.mkdir()
    (images.folder / "000000000.npy").write_bytes(b"no longer needed")
    (images.folder / "manifest.json").write_text('{"eta": 0.5}')
    assert fill(images, images_of) == 0
    assert not images.folder.exists()


@pytest.mark.parametrize("told", [None, "mine", '{"eta": 0.25}'])
def test_a_folder_of_another_origin_beside_a_complete_npz_stays(tmp_path, told):
    images = ImageSet(tmp_path / "x.npz", range(4), 2, {"eta": 0.5})
    fill(images, images_of)
    images.folder.mkdir()
    (images.folder / "000000000.npy").write_bytes(b"mine")
    if told:
        (images.folder / "manifest.json").write_text(told)
    before = contents(images.folder)
    assert fill(images, images_of) == 0 and contents(images.folder) == before


@pytest.mark.parametrize("before", [True, False])
def test_what_else_lies_beside_the_shards_stays(tmp_path, before):
    images = ImageSet(tmp_path / "x.npz", range(4), 2, {"eta": 0.5})
    images.folder.mkdir()
    if before:
        (images.folder / "notes.txt").write_text("mine")
    assert fill(images, images_of) == 4 and images.folder.exists() == before
    images.folder.mkdir(exist_ok=True)
    (images.folder / "notes.txt").write_text("mine")
    assert fill(images, images_of) == 0
    assert contents(images.folder) == {"notes.txt": b"mine"}


def test_files_of_unknown_origin_are_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "000001.png").write_text("mine")
    np.savez(tmp_path / "x.npz", np.zeros(3))
    (tmp_path / "text.npz").write_text("mine")
    for name, text in (("list", "[1]"), ("number", "1"), ("broken", "{")):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w") as archive:
            archive.writestr("manifest.json", text)
    for name in ("folder", "x.npz", "text.npz", "list.npz", "number.npz", "broken.npz"):
        before = contents(tmp_path / name)
        with pytest.raises(ValueError, match="exists, and nothing tells how it was made"):
            fill(ImageSet(tmp_path / name, range(3), 2, {}), images_of)
        assert contents(tmp_path / name) == before


def launch(net: Path, out: Path, *launcher: str, threads: int = 1, **kwargs) -> subprocess.Popen:
    command = [sys.executable, *launcher, "sample.py", "--ckpt", str(net), *FLAGS, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **kwargs)


def test_two_processes_draw_the_same_bytes_as_one_which_goes_on_with_them(net, tmp_path):
    for out in ("one", "two"):
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--"] * (out == "two")
        done = launch(net, tmp_path / out, *torchrun, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, errors = done.communicate(timeout=120)
        assert done.returncode == 0, errors
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert "6 images drawn by the first of 2 processes" in output and output.count("11 images (seeds 0..10)") == 1
    for path in sorted((tmp_path / "two").glob("*.png"))[4:]:
        path.unlink()
    assert launch(net, tmp_path / "two", threads=2, stdout=subprocess.DEVNULL).wait(120) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_killed_and_begun_again(net, tmp_path):
    """SIGKILL, at whatever point it comes: the same line then gives what an undisturbed run gives."""
    killed = launch(net, tmp_path / "x.npz", stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("x.npz.parts/*.npy")) and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for out in ("x.npz", "y.npz"):
        assert launch(net, tmp_path / out, stdout=subprocess.DEVNULL).wait(120) == 0
    assert contents(tmp_path / "x.npz") == contents(tmp_path / "y.npz")


def test_a_refused_command_leaves_the_place_free(net, tmp_path):
    for flags in (["--eta", "3"], ["--seed", "99999999999999999999"], ["--branch", "9"]):
        with pytest.raises((ValueError, RuntimeError, OverflowError)):
            main(parse(["--ckpt", str(net), *FLAGS, *flags, "--out", str(tmp_path / "x.npz")]))
    assert not list(tmp_path.iterdir())


def test_processes_share_sets_and_not_single_pictures(net, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="not of one picture"):
        main(parse(["--ckpt", str(net), "--out", str(tmp_path / "x.png")]))
