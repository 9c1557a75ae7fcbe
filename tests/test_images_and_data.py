import hashlib
import io
import os
import shutil
import struct
import tarfile
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from conftest import noise
from PIL import EpsImagePlugin, Image

from minicache import data, reading
from minicache.captions import captioned
from minicache.data import each_image, shapes, source
from minicache.files import replacing
from minicache.images import BAND, fitted, grid, labelled, save_gif, save_png, to_tensor, to_uint8


def test_uint8_clamps_and_rounds():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 3.0]).reshape(7, 1, 1, 1)
    assert to_uint8(x).ravel().tolist() == [0, 0, 0, 128, 191, 255, 255]
    assert to_uint8(noise(2, 3, 4, 5)).shape == (2, 4, 5, 3)
    images = torch.arange(256).reshape(1, 1, 16, 16)
    assert torch.equal(torch.from_numpy(to_uint8(images / 127.5 - 1)[..., 0]), images[0].byte())


def test_a_picture_becomes_a_tensor_and_the_same_picture_again():
    images = np.arange(2 * 8 * 16 * 3, dtype=np.uint16).astype(np.uint8).reshape(2, 8, 16, 3)
    x = to_tensor(images)
    assert x.shape == (2, 3, 8, 16) and x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert np.array_equal(to_uint8(x), images)
    assert torch.equal(to_tensor(torch.from_numpy(images)), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_no_picture(value, dtype):
    x = torch.zeros(2, 3, 4, 4, dtype=dtype)
    x[1, 2, 3, 3] = value
    with pytest.raises(ValueError, match="the pictures hold NaN or infinity; a wider --dtype may help"):
        to_uint8(x)


def test_grid_places_every_image():
    images = np.stack([np.full((4, 4, 3), k, np.uint8) for k in range(5)])
    sheet = grid(images)
    assert sheet.shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    assert [sheet[2 + 6 * (k // 3), 2 + 6 * (k % 3), 0] for k in range(5)] == [0, 1, 2, 3, 4]
    assert (sheet[2 + 6, 2 + 12] == 255).all()


def test_each_label_is_under_its_picture():
    images = np.stack([np.full((8, 8, 3), 100 + k, np.uint8) for k in range(3)])
    sheet = labelled(images, ["", "cat", "dog " * 40], columns=2, scale=10)
    side, pad = 80, 4
    assert sheet.dtype == np.uint8
    assert sheet.shape == (2 * (side + BAND + pad) + pad, 2 * (side + pad) + pad, 3)
    bands = []
    for k in range(4):
        y, x = (pad + at * length for at, length in zip(divmod(k, 2), (side + BAND + pad, side + pad)))
        assert (sheet[y : y + side, x : x + side] == (100 + k if k < 3 else 255)).all()
        bands.append((sheet[y + side : y + side + BAND, x : x + side] < 128).any(axis=2))
        sheet[y : y + side + BAND, x : x + side] = 255
    assert (sheet == 255).all()  # between the cells there is nothing
    assert [band.any() for band in bands] == [False, True, True, False]
    middle = np.flatnonzero(bands[1].any(axis=0))
    assert abs(middle.min() + middle.max() - side) <= 3
    assert not bands[2][-1].any() and not bands[2][:, [0, -1]].any()
    tails = labelled(images[:1], ["a jay jay jay jay jay"], scale=8)[-BAND - 4 : -4, 4:-4] < 128
    assert tails.any() and not tails[-1].any()  # the last line's descenders are all there
    with pytest.raises(ValueError, match="2 labels for 3 pictures"):
        labelled(images, ["a", "b"])


@pytest.mark.parametrize("label", ["", "cat", "the cat sat on the mat", "cat " * 40, "c" * 200, "a " + "c" * 10**6])
@pytest.mark.parametrize("width", [20, 96])
def test_labels_fit(label, width):
    lines, font, pitch = fitted(label, width)
    assert (len(lines) - 1) * pitch + font.getbbox("gj")[3] <= BAND and max(map(font.getlength, lines)) <= width
    assert label.startswith(lines[0]) and (lines[0] != "" or label == "")
    if label == "the cat sat on the mat" and width == 96:
        assert " ".join(lines) == label


def test_files(tmp_path):
    images = to_uint8(noise(3, 3, 8, 8))
    save_png(tmp_path / "a.png", grid(images), scale=2)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * 22, 2 * 22)
    save_gif(tmp_path / "a.gif", [grid(images), grid(images[::-1]), grid(images)])
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3
    grey = to_uint8(noise(2, 1, 8, 8))
    save_png(tmp_path / "grey.png", grid(grey))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise OSError("disk full")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_file_is_replaced_in_one_instant(tmp_path):
    """Renamed, not copied: whoever is reading the old file goes on reading it, and no one ever sees half of the new."""
    path = tmp_path / "file.txt"
    path.write_text("old")
    with open(path) as old:
        with replacing(path) as temporary:
            temporary.write_text("the new one")
            written = temporary.stat().st_ino
        assert old.read() == "old" and path.stat().st_ino == written


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [16, 32])
def test_shapes(size):
    x = shapes(64, size, generator())
    assert x.shape == (64, 3, size, size) and x.min() >= -1 and x.max() <= 1
    assert torch.equal(x, shapes(64, size, generator())) and not torch.equal(x, shapes(64, size, generator(1)))
    dark = (x < -0.6).all(dim=1).float().mean(dim=(1, 2))  # outlines
    assert (dark > 0.005).float().mean() > 0.9
    assert x.flatten(2).std(dim=2).mean() > 0.1 and x.mean(dim=(2, 3)).std() > 0.1


def png(value: int, size: tuple[int, int] = (40, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_folders_and_zips(tmp_path):
    (tmp_path / "pictures" / "class").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for k in range(3):
            (tmp_path / "pictures" / "class" / f"{k}.png").write_bytes(png(100 * k))
            archive.writestr(f"class/{k}.png", png(100 * k))
        archive.writestr("README.txt", "not an image")
        archive.writestr("__MACOSX/class/._0.png", "not an image either")
    folder, zipped = (source(str(tmp_path / name), 16)(50, generator()) for name in ("pictures", "pictures.zip"))
    assert torch.equal(folder, zipped) and folder.shape == (50, 3, 16, 16)
    assert sorted(set(((folder[:, 0, 0, 0] + 1) * 127.5).round().int().tolist())) == [0, 100, 200]
    (tmp_path / "pictures" / "broken.png").write_bytes(png(5)[:40])
    with pytest.raises(ValueError, match=r"broken\.png"):
        source(str(tmp_path / "pictures"), 16)


def test_a_damaged_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", content := png(7))
    damaged = (tmp_path / "x.zip").read_bytes().replace(content[40:50], bytes(10))
    (tmp_path / "x.zip").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.png in .*x\.zip is not an image that can be read"):
        source(str(tmp_path / "x.zip"), 16)


def test_a_picture_of_16_bits_keeps_its_greys(tmp_path):
    """Pillow's own conversion clips: of 65,536 levels it makes all from 255 on white."""
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(levels * 257).save(tmp_path / "grey.png")
    (read,) = each_image(tmp_path, None)
    assert np.array_equal(read, np.repeat(levels[..., None], 3, axis=2))


def test_formats_go_by_the_content_and_run_no_programs(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4), (7, 8, 9)).save(tmp_path / "a.png", "GIF")
    (read,) = each_image(tmp_path, None)
    assert read[0, 0].tolist() == [7, 8, 9]
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was called"))
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(ValueError, match=r"a\.png .*is not an image that can be read: it is none of PNG, JPEG"):
        source(str(tmp_path), 4)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    pipe = os.open(tmp_path / "x.png", os.O_RDWR)
    closing = threading.Timer(3, os.close, [pipe])  # so that whoever reads it fails at last
    closing.start()
    with pytest.raises(ValueError, match=r"x\.png is no file, but a folder, a pipe"):
        source(str(tmp_path), 4)
    closing.cancel()
    os.close(pipe)


def test_a_zip_may_write_folders_as_old_windows_tools_do(tmp_path):
    save_png(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for name in ("cat\\a.png", "dog\\b.png", "cat/c.png"):
            archive.writestr(name, (tmp_path / "a.png").read_bytes())
    _, classes, names = data.labelled(str(tmp_path / "data.zip"), "train")
    assert names == ["cat", "dog"] and classes.tolist() == [0, 0, 1]


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_folders_are_left_out(tmp_path, packed):
    """Jupyter's .ipynb_checkpoints holds old copies, and would be a class."""
    folder = tmp_path / ".all" / "data"  # which may lie in one
    for name in ("cat/a.png", "cat/.ipynb_checkpoints/a-checkpoint.png", ".ipynb_checkpoints/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(folder / name)
    packed_or_not = shutil.make_archive(tmp_path / "data", "zip", folder) if packed else folder
    images, classes, names = data.labelled(str(packed_or_not), "train")
    assert len(images) == len(classes) == 1 and names == ["cat"]


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_folders_that_are_links_are_read_and_each_once(tmp_path):
    for name in ("store/cat", "data"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "store" / "cat" / "a.png").write_bytes(png(5))
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "store" / "cat")
    (tmp_path / "store" / "cat" / "loop").symlink_to(tmp_path / "data")
    assert [name for name, _ in data.image_files(tmp_path / "data")] == [str(tmp_path / "data" / "cat" / "a.png")]


def test_pictures_that_are_left_out_are_told(tmp_path):
    for name in ("a.png", "b.tif", "c.gif", "notes.txt"):
        (tmp_path / name).write_bytes(png(5))
    with pytest.warns(UserWarning, match=r"left out of .*b\.tif and 1 more; taken are \.png, "):
        source(str(tmp_path), 4)


def test_pictures_and_files_of_too_many_bytes_are_not_read(tmp_path, monkeypatch):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zipfile.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8193, 8192, 8, 2, 0, 0, 0)
    path = tmp_path / "large.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"large\.png .*: it has 8193x8192 pixels, more than 67,108,864"):
        source(str(tmp_path), 4)
    path.write_bytes(png(5))
    monkeypatch.setattr(reading, "LARGEST", 50)
    (tmp_path / "captions.csv").write_text("large.png,a cat\n")
    for read in (lambda: source(str(tmp_path), 4), lambda: captioned(tmp_path).images(4)):
        with pytest.raises(ValueError, match=r"large\.png has \d+ bytes, and must have 50 at most"):
            read()
    (tmp_path / "captions.csv").write_text("large.png,a cat\n" * 9)
    with pytest.raises(ValueError, match=r"captions\.csv has 144 bytes, and must have 50"):
        captioned(tmp_path)


def zipped(path, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip with one file, a.png, written to `path`; and its bytes."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.png", content)
    return path.read_bytes()


def test_a_zip_that_inflates_beyond_its_word_fills_no_memory(tmp_path):
    path, bomb = tmp_path / "x.zip", bytes(30_000_000)
    honest = zipped(path, bomb)
    bombs = {
        "too much": (lambda: zipped(path, bomb, zipfile.ZIP_BZIP2), "no stored or deflated file"),
        "a lie": (lambda: path.write_bytes(honest.replace(struct.pack("<I", len(bomb)), struct.pack("<I", 99))), "CRC"),
    }
    for write, words in bombs.values():
        write()
        tracemalloc.start()
        with pytest.raises(ValueError, match=rf"a\.png in .*x\.zip is not an image that can be read: .*{words}"):
            source(str(path), 4)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
        tracemalloc.stop()


def test_zips_that_cannot_be_read_are_sentences(tmp_path):
    path = tmp_path / "x.zip"
    whole = zipped(path, png(7), zipfile.ZIP_STORED)
    central = whole.index(b"PK\x01\x02")
    for at, value, words in (
        (central + 8, 1, "encrypted"),
        (central + 10, 99, "no stored or deflated file"),
        (central + 6, 255, "zip file version"),
        (central, 0, r"x\.zip is not a zip that can be read"),
    ):
        damaged = bytearray(whole)
        damaged[at] = value
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=words) as error:
            source(str(path), 4)
        assert "\n" not in str(error.value)


def test_photos_are_turned_as_their_camera_says(tmp_path):
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 4))  # a white stripe on top; orientation 6: turn it to the right
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.jpg", exif=exif)
    x = source(str(tmp_path), 16)(1, generator())[0]
    assert abs(x[:, :, :3].mean() - x[:, :, -3:].mean()) > 1 > abs(x[:, :3].mean() - x[:, -3:].mean())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_lie_on_white(tmp_path, mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 16, 8))
    image.convert(mode).save(tmp_path / "half.png", **({"transparency": 0} if mode == "P" else {}))
    x = source(str(tmp_path), 16)(1, generator())[0]
    assert (x[:, 8:] == 1).all() and ((x[:, :8] == -1).all() or mode == "P")


def test_half_of_the_pictures_are_flipped(tmp_path):
    image = Image.new("RGB", (16, 16))
    image.putpixel((0, 0), (255, 255, 255))
    image.save(tmp_path / "corner.png")
    x = source(str(tmp_path), 16)(200, generator())
    left, right = (x[:, 0, 0, 0] > 0).float().mean(), (x[:, 0, 0, -1] > 0).float().mean()
    assert left + right == 1 and 0.4 < left < 0.6


def test_cifar10(tmp_path, monkeypatch):
    """The layout of the binary archive: a label, then 1024 red, green and blue values a record."""
    record = np.arange(3073, dtype=np.uint16).astype(np.uint8)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for k in range(1, 6):
            content = (record + k).astype(np.uint8).tobytes() * 2
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{k}.bin")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    monkeypatch.setenv("MINICACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="md5"):
        data.cifar10()
    md5 = hashlib.md5((tmp_path / "cifar-10-binary.tar.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(data, "CIFAR10_CHECKSUM", f"md5:{md5}")
    images, labels = data.cifar10()
    assert images.shape == (10, 32, 32, 3) and images[2, 0, :3, 0].tolist() == [3, 4, 5]
    assert labels.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert source("cifar10", 32)(4, generator()).shape == (4, 3, 32, 32)


def test_a_folder_a_class(tmp_path):
    for name, value in (("b/0.png", 10), ("a/1.png", 20), ("b/2.png", 30)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (value,) * 3).save(tmp_path / name)
    images, labels, names = data.labelled(str(tmp_path), "train")
    assert images[:, 0, 0, 0].tolist() == [20, 10, 30] and labels.tolist() == [0, 1, 1] and names == ["a", "b"]


@pytest.mark.parametrize("name, words", [("nowhere", "no folder or zip of images"), ("empty", "holds no images")])
def test_wrong_sources(tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=words):
        source(str(tmp_path / name), 32)
    with pytest.raises(ValueError, match="CIFAR-10 has 32"):
        source("cifar10", 64)
