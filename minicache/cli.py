"""What every command has in common: errors become one sentence and exit code 2."""

from __future__ import annotations

import sys
from typing import Callable, NoReturn


def run(name: str, command: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit; what a person did wrong, or the disk or network, is said without a traceback."""
    try:
        sys.exit(command() or 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
