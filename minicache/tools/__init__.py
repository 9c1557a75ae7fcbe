"""What every command has in common: whatever goes wrong is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from minicache.files import lies_in, temporary_for
from minicache.reading import read_whole, understood
from minicache.unet import UNet
from minicache.words import Prompts

# torch's words, on every device
TOO_LITTLE_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "size calculation overflowed",
                     "bad_alloc")  # fmt: skip
MOST = 10**8  # of whatever a flag counts: who asks for more has mistyped it


class Debug(argparse.Action):
    """--debug is MINICACHE_DEBUG=1, for this process and those that it starts; it leaves nothing in the Namespace."""

    def __call__(self, *_: Any) -> None:
        os.environ["MINICACHE_DEBUG"] = "1"


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one sentence and not the whole usage; epilogs keep their lines.

    doc: a module's, whose first paragraph is the description, and the rest the epilog.
    """

    def __init__(self, doc: str | None = None, **settings: Any):
        if doc is not None:
            settings["description"], _, settings["epilog"] = doc.partition("\n\n")
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        what = "show where an error comes from, as MINICACHE_DEBUG=1 in the environment does"
        self.add_argument("--debug", action=Debug, nargs=0, default=argparse.SUPPRESS, help=what)

    def parse_args(self, *args: Any, **more: Any) -> argparse.Namespace:
        """As argparse, but '' is refused: a variable of the shell that is not set. A prompt alone may be empty.

        What is to be written at NEW/../X is X, whether NEW is there or not, so that an older X is seen.
        """
        parsed = super().parse_args(*args, **more)
        if empty := [name for name, value in vars(parsed).items() if value == "" and name != "negative"]:
            self.error(f"the argument {empty[0]} is empty")
        for name, value in vars(parsed).items():
            if name in ("out", "dst") and value and not Path(value).parent.exists() and ".." in Path(value).parts:
                setattr(parsed, name, type(value)(os.path.realpath(value)))
        return parsed

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file, flush=True)  # argparse misses that the disk is full

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help shows what is allowed\n")


def run(name: str, command: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit; what a person, the disk or the network did wrong is said in a sentence.

    So is a lack of memory. Any other exception is a bug and keeps its traceback; with --debug, all do.
    """
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # it was closed (2>&-), and progress bars would be an error
            setattr(sys, stream, open(os.devnull, "w"))
        if hasattr(getattr(sys, stream), "reconfigure"):
            getattr(sys, stream).reconfigure(errors="backslashreplace")  # a name that cannot be printed is no error
    warnings.showwarning = lambda message, *_: print(f"{name}: {message}", file=sys.stderr)
    try:
        code = command() or 0
        print(end="", flush=True)  # as Python would do it after all this, where nothing is caught
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read what is printed has gone, as `head` does
        drop_output()
        sys.exit(141)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        said = str(error).strip()
        bug = isinstance(error, RuntimeError) and not any(words in said for words in TOO_LITTLE_MEMORY)
        if bug or os.environ.get("MINICACHE_DEBUG") == "1":
            raise
        if isinstance(error, OSError) and error.strerror:
            where = error.filename2 or error.filename  # of a renaming, the new name: the other one is temporary
            said = f"{where}: {error.strerror}" if where else error.strerror
        print(f"{name}: {said.splitlines()[0] if said else type(error).__name__}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # the disk is full there, and Python would try once more
            drop_output()
        sys.exit(2)


def drop_output() -> None:
    """Send what is still to be printed nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """A list that Ctrl-C fills, so that a step is never cut in two; a second Ctrl-C stops at once.

    So do SIGTERM, and SIGHUP, as a terminal that is closed sends it; unless it is ignored, as under nohup.
    """
    interrupted: list[int] = []

    def note(number: int, frame: object) -> None:
        interrupted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def at_least(args: Any, most: int = MOST, **least: int) -> None:
    """ValueError for a flag that is given and less than this, or more than `most`; it may hold a list of numbers."""
    for name, low in least.items():
        given = getattr(args, name)
        for value in (given,) if isinstance(given, int) else given or ():
            if not low <= value <= most:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {low} and at most {most}")


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of rows, column -> cell; a column that a row lacks is empty there, and so is None."""
    names = [*dict.fromkeys(name for row in rows for name in row)]  # the command named list hides the type
    table = [names, ["---"] * len(names), *([row.get(name) for name in names] for row in rows)]

    def text(cell: Any) -> str:
        if isinstance(cell, float):
            return f"{cell:.4g}" if abs(cell) < 10_000 else f"{cell:.0f}"
        return "" if cell is None else str(cell)

    return "".join(f"| {' | '.join(map(text, line))} |\n" for line in table)


def prepare_out(out: Path, endings: tuple[str, ...], folder: bool = True) -> None:
    """Make the folder of --out, or --out itself where it has no ending. ValueError where nothing can be written there.

    folder: whether it may be one.

    To be called before the work, as it would be a pity after it.
    """
    is_folder = out.suffix == ""
    if out.name in ("", "..", *endings):
        raise ValueError(f"--out {out} needs a name: a file, or a folder of its own for the pictures")
    if out.suffix not in endings and not (is_folder and folder):
        allowed = f"must be {', '.join(endings)}" if endings else "is not a folder's"
        allowed += ", or none, for a folder" if endings and folder else ""
        raise ValueError(f"--out {out}: the ending {allowed}")
    if out.exists() and not (out.is_file() or out.is_dir()):
        raise ValueError(f"--out {out} is a device, a pipe or a socket")
    if out.exists() and out.is_dir() != is_folder:
        raise ValueError(f"--out {out}: there is a {'file' if is_folder else 'folder'} of that name")
    make_folder(out if is_folder else out.parent)
    if not is_folder:
        try:
            (temporary := temporary_for(out)).touch()
            temporary.unlink()
            if out.exists():
                open(out, "ab").close()  # it may be protected
        except OSError as error:  # as where its name is too long
            raise ValueError(f"--out {out}: no file of that name can be written ({error.strerror})") from None


def refuse_older(out: Path) -> None:
    """ValueError where the file is there already: a checkpoint or a recipe is worth more than a picture."""
    if out.is_file():
        raise ValueError(f"{out} exists, and is perhaps the work of hours; choose another --out, or remove it")


def make_folder(folder: Path) -> None:
    """Make a folder, and try it, before the work. ValueError where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder}: this folder cannot be made or written to ({error.strerror})") from None


def refuse_unworded(ckpt: str, unet: UNet) -> None:
    """ValueError for a network that must be told what to draw, but not in words: to be called where no flag says it."""
    if unet.config.context_dim and unet.vocabulary is None:
        raise ValueError(f"--ckpt {ckpt} takes a context, but no words: this command knows only prompts of words")


def tell_of_rest(prompts: Prompts, num: int) -> None:
    """Warn where more prompts or classes are asked for than there are pictures to show them."""
    if (many := len(prompts.texts)) > num:
        warnings.warn(f"of {many} prompts or classes, only the first {num} are drawn", stacklevel=2)


def refuse_others(out: str, names: Sequence[str], ours: Callable[[str], bool], apart: str | None = None) -> None:
    """ValueError where the folder --out holds files of these names, unless an earlier run's, which may be replaced.

    ours: whether the text of the first file is that of an earlier run. apart: a folder of pictures that is read, and in
    which --out may not lie. To be called before the work.
    """
    if apart and lies_in(out, apart):
        raise ValueError(f"--out {out} lies in {apart}, whose pictures are read: nothing is added to them")
    with suppress(ValueError), understood(first := Path(out) / names[0], "ours"):
        if ours(read_whole(first).decode()) and not any((Path(out) / name).is_dir() for name in names):
            return
    for name in names:
        if (path := Path(out) / name).exists():
            raise ValueError(f"{path} exists, and is of no earlier run like this one; choose another --out")
