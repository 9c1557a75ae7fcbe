"""Files that are whole or not there, locks, and downloads; the only server here is on this machine."""

import errno
import functools
import hashlib
import http.server
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT

from minicache import files, load
from minicache.checkpoints import REGISTRY, Entry, locate
from minicache.files import MACHINE, fetch, locked, replacing

CONTENT = bytes(range(256)) * 5000
CHECKSUM = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT at any path, from where the client asks; forgets to, at /whole. /404 is an error, /length=x a lie.

    At /endless there is no length, and no end.
    """

    def do_GET(self):
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"]).group(1))
        self.server.starts.append(start)
        if error := re.fullmatch(r"/(\d{3})", self.path):
            return self.send_error(int(error[1]))
        if start >= len(CONTENT):
            return self.send_error(416)
        start = 0 if self.path == "/whole" else start
        self.send_response(206 if start else 200)
        if self.path == "/endless":
            self.end_headers()
            with suppress(ConnectionError):
                while True:
                    self.wfile.write(CONTENT)
        length = self.path.partition("=")[2]
        self.send_header("Content-Length", length or str(len(CONTENT) - start))
        if length:  # else the client reads no more than what is announced
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        body = CONTENT[start : self.server.breaks_at]
        with suppress(ConnectionError):
            self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if length else body)
            self.server.goes_on.wait()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.starts, server.breaks_at, server.url = [], None, f"http://127.0.0.1:{server.server_port}"
        server.goes_on = threading.Event()
        server.goes_on.set()
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_download(server, tmp_path):
    path = tmp_path / "cache" / "file.bin"
    assert fetch(f"{server.url}/file", path, CHECKSUM, 2).read_bytes() == CONTENT
    assert fetch("http://127.0.0.1:9/never-asked", path, CHECKSUM, 2) == path
    assert [file.name for file in path.parent.iterdir()] == ["file.bin"] and server.starts == [0]


@pytest.mark.parametrize("done", [1000, len(CONTENT)])
@pytest.mark.parametrize("kind", ["file", "whole"])
def test_download_goes_on_where_it_stopped(server, tmp_path, done, kind):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:done])
    assert fetch(f"{server.url}/{kind}", tmp_path / "file.bin", CHECKSUM, 2).read_bytes() == CONTENT
    assert server.starts == [done] and not (tmp_path / "file.bin.part").exists()


def test_download_that_breaks_off_is_kept_and_continued(server, tmp_path):
    server.breaks_at = 50_000
    with pytest.raises(ConnectionError, match="broke after 50000"):
        fetch(f"{server.url}/file", tmp_path / "file.bin", CHECKSUM, 2)
    assert (tmp_path / "file.bin.part").stat().st_size == 50_000
    server.breaks_at = None
    assert fetch(f"{server.url}/file", tmp_path / "file.bin", CHECKSUM, 2).read_bytes() == CONTENT
    assert server.starts == [0, 50_000]


def test_download_of_something_else_is_thrown_away(server, tmp_path):
    with pytest.raises(ValueError, match="thrown away"):
        fetch(f"{server.url}/file", tmp_path / "file.bin", "md5:" + "0" * 32, 2)
    assert contents(tmp_path) == {"file.bin.part": b""}
    (tmp_path / "file.bin").write_bytes(b"put here by hand, but wrong")
    with pytest.raises(ValueError, match=r"file\.bin has not the sha256"):
        fetch(f"{server.url}/file", tmp_path / "file.bin", CHECKSUM, 2)


@pytest.mark.parametrize(
    "path, words",
    [
        ("416", "Requested Range Not Satisfiable"),
        ("length=many", "announces 'many' bytes"),
        ("length=-5", "announces '-5' bytes"),
        ("length=" + "9" * 5000, "announces '99999"),
        ("length=4000001", "announces 4000001 bytes, more than twice the right size"),
        ("length=1000", "sends more than 1000 bytes"),
        ("endless", "sends more than 4000000 bytes"),
    ],
    ids=lambda value: value[:14],
)
def test_a_server_that_lies_is_said_in_a_sentence(server, tmp_path, path, words):
    """And nothing that it sent is kept."""
    with pytest.raises(
        ConnectionError, match=f"^cannot download file.bin .*{words}.*; get http.* by hand and put it at"
    ):
        fetch(f"{server.url}/{path}", tmp_path / "file.bin", None, 2)
    assert contents(tmp_path) == {"file.bin.part": b""}


needs_locks = pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")


@needs_locks
def test_of_many_who_need_a_file_one_downloads_it(server, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: fetch(f"{server.url}/file", tmp_path / "file.bin", CHECKSUM, 2), range(8)))
    assert set(paths) == {tmp_path / "file.bin"} and server.starts == [0]
    assert contents(tmp_path) == {"file.bin": CONTENT}


@needs_locks
def test_whoever_waited_for_one_that_was_killed_goes_on_where_it_stopped(server, tmp_path):
    server.breaks_at = (1 << 20) + 1000  # the client writes each MiB
    server.goes_on.clear()
    part, arguments = tmp_path / "file.bin.part", (f"{server.url}/file", str(tmp_path / "file.bin"), CHECKSUM)
    code = "import sys, pathlib, minicache.files as f; f.fetch(sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3], 2)"
    first = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT)
    while not part.exists() or part.stat().st_size < 1 << 20:
        assert first.poll() is None
        time.sleep(0.01)
    server.breaks_at = None
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(fetch, arguments[0], tmp_path / "file.bin", CHECKSUM, 2)
        time.sleep(0.2)
        assert server.starts == [0] and not second.done()
        first.kill()
        first.wait()
        server.goes_on.set()
        assert second.result(30).read_bytes() == CONTENT
    assert server.starts == [0, 1 << 20] and contents(tmp_path) == {"file.bin": CONTENT}


@needs_locks
def test_a_part_that_leads_elsewhere_is_not_followed(server, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "file.bin.part").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(OSError, match=r"file\.bin\.part"):
        fetch(f"{server.url}/file", tmp_path / "file.bin", CHECKSUM, 2)
    assert (tmp_path / "mine.txt").read_text() == "mine" and not server.starts


@needs_locks
def test_file_systems_without_locks_will_do(server, tmp_path, monkeypatch):
    def flock(handle, kind):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    assert fetch(f"{server.url}/file", tmp_path / "file.bin", CHECKSUM, 2).read_bytes() == CONTENT


def test_a_file_whose_hash_nobody_published_is_taken_with_a_warning(server, tmp_path, monkeypatch):
    """It says what the file's own hash is; downloaded, or put there by hand."""
    monkeypatch.setenv("MINICACHE_HOME", str(tmp_path))
    monkeypatch.setitem(REGISTRY, "unpublished", Entry(f"{server.url}/model.ckpt", None, 1, True, None))
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"not verified.*{CHECKSUM.split(':')[1]}"):
            assert locate("unpublished") == tmp_path / "unpublished.ckpt"
    assert (tmp_path / "unpublished.ckpt").read_bytes() == CONTENT and server.starts == [0]


def test_offline_error_says_what_to_do(server, tmp_path, monkeypatch):
    with pytest.raises(ConnectionError, match="Not Found"):
        fetch(f"{server.url}/404", tmp_path / "file.bin", CHECKSUM, 2)
    monkeypatch.setenv("MINICACHE_HOME", str(tmp_path / "home"))
    entry = Entry("http://127.0.0.1:9/net.bin", CHECKSUM, 1, True, None)
    monkeypatch.setitem(REGISTRY, "unreachable", entry)
    with pytest.raises(ConnectionError) as error:
        load("unreachable")
    for word in ("unreachable.bin", "http://127.0.0.1:9/net.bin", str(tmp_path / "home" / "unreachable.bin")):
        assert word in str(error.value)


# --- what killed processes leave -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="nobody can ask there which processes live")
def test_what_killed_processes_were_writing_is_removed_and_nothing_else(tmp_path):
    """The next process that writes there cleans up."""
    code = """if True:
        import os, signal
        from minicache.files import replacing
        with replacing("k.npz") as npz, replacing("last.pt") as checkpoint, replacing("folder") as folder:
            npz.write_text("whole, but not there")
            checkpoint.write_text("half")
            (folder / "unet").mkdir(parents=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    living, dead = f".other.npz.{MACHINE}-{os.getppid()}.tmp.npz", f"-{2**22 + 1}.tmp"
    others = {".notes.tmp.txt", living, ".x.png.elsewhere-7.tmp.png", f".x.png.{MACHINE}{dead}.txt"}
    others |= {f".x.png.{platform.node()}-1{dead}.png"}  # of a container of the same name, where it may well live
    for name in others:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".cache.tmp").mkdir()
    with replacing(tmp_path / "k.npz") as temporary:
        temporary.write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".cache.tmp", "k.npz"}


def test_a_file_that_is_mounted_is_written_to(tmp_path, monkeypatch):
    def busy(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    (tmp_path / "x.txt").write_text("old")
    monkeypatch.setattr(os, "replace", busy)
    with replacing(tmp_path / "x.txt") as temporary:
        temporary.write_text("new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_told_with_the_file(tmp_path):
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{tmp_path / 'x.txt'}'")):
        with replacing(tmp_path / "x.txt"), open("/dev/full", "w") as full:
            full.write("new")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such files")
def test_links_and_pipes_are_not_replaced(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    with replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    (tmp_path / "link.png").symlink_to("file")
    with replacing(tmp_path / "link.png") as temporary:
        temporary.write_text(temporary.suffix)
    assert (tmp_path / "file").read_text() == ".png"  # Pillow goes by the ending, and the user said which
    (tmp_path / "link.png").unlink()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "stdout").symlink_to("pipe")
    for name in ("pipe", "stdout"):
        with pytest.raises(ValueError, match="pipe is a device, a pipe or a socket"), replacing(tmp_path / name):
            pass
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 4


@needs_locks
def test_a_lock_is_for_one_or_for_those_who_share_it(tmp_path):
    with locked(tmp_path, "taken") as take:
        for shared in (False, True):
            with pytest.raises(ValueError, match="taken"), locked(tmp_path, "taken", shared):
                pass
        take(shared=True)
        with (
            locked(tmp_path, "taken", shared=True),
            pytest.raises(ValueError, match="taken"),
            locked(tmp_path, "taken"),
        ):
            pass
    with locked(tmp_path, "taken"):
        pass
