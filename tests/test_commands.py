"""What all commands share: python -m minicache lists and finds them; errors are one sentence, or a traceback."""

import os
import signal
import subprocess
import sys
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from minicache import __main__ as door
from minicache import tools
from minicache.tools import MOST, Parser, at_least, interruptions, make_folder, markdown, prepare_out, run


def said(capsys, error: BaseException, code: int = 2) -> str:
    def command():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run("minicache x", command)
    assert stopped.value.code == code
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("MINICACHE_DEBUG", "")  # and put back what a test makes of it


def test_every_file_with_a_main_is_a_command_and_onnx_example_is_none():
    known, files = door.commands(), {path.stem for path in Path(tools.__file__).parent.glob("[!_]*.py")}
    assert set(known) == files - {"onnx_example", "methods", "log"}
    assert all(what.endswith(".") or what.endswith("?") for what in known.values())


def test_alone_it_lists_the_commands(monkeypatch, capsys):
    for arguments in ([], ["-h"], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["minicache", *arguments])
        with pytest.raises(SystemExit, match="0"):
            door.main()
        listed = capsys.readouterr().out
        assert all(f"  {name} " in listed for name in door.commands()) and "onnx_example" not in listed


def test_commands_need_no_docstrings():
    command = [sys.executable, "-OO", "-m", "minicache"]
    for arguments, words in (([], "  list  "), (["list", "--help"], "--debug"), (["list"], "tiny_cifar10")):
        done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "") and words in done.stdout


def test_an_unknown_command_is_refused():
    wrong = subprocess.run([sys.executable, "-m", "minicache", "bnech"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "there is no command 'bnech'" in wrong.stderr and "Traceback" not in wrong.stderr


def test_what_went_wrong_is_one_sentence(capsys):
    for error, sentence in (
        (ValueError("--num 0 is too few\nand more"), "--num 0 is too few"),
        (FileNotFoundError(2, "No such file or directory", "x.pt"), "x.pt: No such file or directory"),
        (IsADirectoryError(21, "Is a directory", ".x.1.tmp", None, "x"), "x: Is a directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ConnectionError("no network"), "no network"),
        (ValueError(), "ValueError"),
        (OSError(), "OSError"),
        (MemoryError(), "MemoryError"),
    ):
        assert said(capsys, error) == f"minicache x: {sentence}\n"


@pytest.mark.parametrize("message", [
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "MPS backend out of memory (MPS allocated: 1.0 GB)",
    "std::bad_alloc",
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4",
    "Storage size calculation overflowed with sizes=[1000000000000000000, 3, 32, 32]",
    "[enforce fail at alloc_cpu.cpp:75] data. DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes.",
])  # fmt: skip
def test_too_little_memory_is_no_bug(capsys, message):
    assert said(capsys, RuntimeError(message)) == f"minicache x: {message}\n"


@pytest.mark.parametrize("message", [
    "CUDA error: an illegal memory access was encountered",
    "Expected more than one memory format",
    "",
])  # fmt: skip
def test_other_runtime_errors_keep_their_traceback(message):
    def command():
        raise RuntimeError(message)

    with pytest.raises(RuntimeError):
        run("minicache x", command)


def test_debug_shows_tracebacks(monkeypatch):
    parser = Parser(prog="x", doc="A command.")
    parser.add_argument("--num", type=int, default=1)

    def command():
        assert vars(parser.parse_args(["--debug", "--num", "3"])) == {"num": 3}
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        run("x", command)
    assert "MINICACHE_DEBUG=1" in parser.format_help()


def test_a_warning_is_one_sentence(capsys):
    with warnings.catch_warnings(), pytest.raises(SystemExit, match="0"):
        warnings.simplefilter("always")
        run("minicache x", lambda: warnings.warn("mind the gap", stacklevel=1))
    assert capsys.readouterr().err == "minicache x: mind the gap\n"


def test_what_is_empty_names_nothing(capsys):
    parser = Parser(prog="x")
    parser.add_argument("--real")
    parser.add_argument("--negative")
    assert parser.parse_args(["--negative", ""]).negative == ""
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--real", ""])
    assert "x: the argument real is empty; " in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--help"]])
def test_what_cannot_be_printed_is_one_sentence(arguments, unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "minicache", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    sentence = f"minicache{' list' * ('list' in arguments)}: No space left on device\n"
    assert (done.returncode, done.stderr) == (2, sentence)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell of POSIX")
def test_nobody_need_listen():
    code = "from tqdm import tqdm; from minicache.tools import run; run('x', lambda: sum(tqdm([0, 3], disable=None)))"
    closed = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable, code]
    assert subprocess.run(closed, cwd=ROOT).returncode == 3


def test_an_interruption_exits_as_the_shell_expects(capsys):
    assert said(capsys, KeyboardInterrupt(), 130) == ""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_what_is_ignored_stays_ignored():
    """As nohup has it of a terminal that is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptions() as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted == [signal.SIGTERM] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_lies_beyond_a_folder_that_is_not_there_is_seen(tmp_path, monkeypatch):
    """Once that folder is made, an older file there would be replaced."""
    monkeypatch.chdir(tmp_path)
    parser = Parser(prog="x")
    parser.add_argument("--out")
    parser.add_argument("dst", type=Path, nargs="?")
    for given, meant in (("new/../x.pt", "x.pt"), ("new/a/../..", "")):
        parsed = parser.parse_args([given, "--out", given])
        assert parsed.dst == tmp_path / meant and parsed.out == str(tmp_path / meant)
    assert parser.parse_args(["--out", "../x.pt"]).out == "../x.pt"


def test_what_is_counted_has_bounds():
    import_module("minicache.tools.list")  # where it hides the type
    at_least(SimpleNamespace(num=None, batch=[1, MOST], seed=0), num=1, batch=1, seed=0)
    for num, batch, words in (
        (0, [1], "--num 0 must be at least 1 and at most 100000000"),
        (10**9, [1], "--num 1000000000 must be"),
        (1, [1, 0], "--batch 0 must be"),
        (1, [2**61], "--batch 2305843009213693952 must be"),
    ):
        with pytest.raises(ValueError, match=words):
            at_least(SimpleNamespace(num=num, batch=batch), num=1, batch=1)


def test_a_folder_is_tried_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/nowhere")):
        with pytest.raises(ValueError, match=f"{folder}: this folder cannot be made or written to"):
            make_folder(folder)
    make_folder(tmp_path / "two" / "deep")
    assert not list((tmp_path / "two" / "deep").iterdir())


def test_a_protected_file_is_told_before_the_work(tmp_path, monkeypatch):
    (out := tmp_path / "x.png").write_text("mine")
    prepare_out(out, (".png",))
    assert out.read_text() == "mine"

    def refuse(path, *_):
        raise PermissionError(1, "Operation not permitted", path)

    monkeypatch.setattr("builtins.open", refuse)  # root may write to any file
    with pytest.raises(ValueError, match=r"x\.png: no file of that name can be written \(Operation not permitted\)"):
        prepare_out(out, (".png",))


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such files")
def test_the_name_of_an_output_is_tried_before_the_work(tmp_path):
    for name in (".", "..", f"{tmp_path}/..", ".json", f"{tmp_path}/.json"):
        with pytest.raises(ValueError, match=f"--out {name} needs a name"):
            prepare_out(Path(name), (".json", ".npz"))
    os.mkfifo(tmp_path / "p.npz")
    with pytest.raises(ValueError, match=r"p\.npz is a device, a pipe or a socket"):
        prepare_out(tmp_path / "p.npz", (".npz",))
    (tmp_path / "p.npz").unlink()
    long = tmp_path / ("x" * 235 + ".json")  # while it is written, its name is longer
    with pytest.raises(ValueError, match=r"--out .*x\.json: no file of that name can be written \(File name too long"):
        prepare_out(long, (".json",))
    (tmp_path / "old.json").write_text("kept")
    for path in (tmp_path / "old.json", tmp_path / "new.json"):
        prepare_out(path, (".json",))
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"] and (tmp_path / "old.json").read_text() == "kept"


def test_what_an_earlier_run_wrote_may_be_replaced_and_no_folder(tmp_path):
    check = partial(tools.refuse_others, str(tmp_path), ("a.md", "b.png"), lambda text: text == "ours")
    check()
    (tmp_path / "a.md").write_text("ours")
    check()
    (tmp_path / "b.png").mkdir()
    with pytest.raises(ValueError, match=r"b\.png exists|a\.md exists"):
        check()


def test_a_table_has_a_column_for_all_that_any_row_says():
    assert markdown(
        [{"pass": "full", "ms": 12345.6}, {"pass": "branch 1", "ms": 1.23456, "diffusers": None, "n": 2}]
    ) == (
        "| pass | ms | diffusers | n |\n"
        "| --- | --- | --- | --- |\n"
        "| full | 12346 |  |  |\n"
        "| branch 1 | 1.235 |  | 2 |\n"
    )
