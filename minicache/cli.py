"""What every command has in common: whatever goes wrong is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import sys
from typing import Callable, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one sentence and not the whole usage; epilogs keep their lines."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help shows what is allowed\n")


def run(name: str, command: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit; what a person, the disk or the network did wrong is said without a traceback."""
    try:
        sys.exit(command() or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
