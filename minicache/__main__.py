"""python -m minicache COMMAND ...; alone, it lists the commands.

Each is a file in minicache/tools/ with a docstring, `parse(argv)` and `main(args)`.
"""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path

from minicache.tools import run


def commands() -> dict[str, str]:
    """Name -> the first line of its docstring, of every file in tools/ that has a function `main`."""
    found = {}
    for path in sorted((Path(__file__).parent / "tools").glob("*.py")):
        tree = ast.parse(path.read_bytes())  # read, not imported, which takes longer
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main() -> None:
    name, known = sys.argv[1] if len(sys.argv) > 1 else "--help", commands()
    if name in ("-h", "--help"):
        lines = [f"  {command:11} {what}" for command, what in known.items()]
        about = (__doc__ or "").strip()  # which python -OO leaves out
        run("minicache", lambda: print(about, "", *lines, sep="\n"))
    elif name not in known:
        print(f"minicache: there is no command {name!r}; there are {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    else:
        tool = import_module(f"minicache.tools.{name}")
        run(f"minicache {name}", lambda: tool.main(tool.parse(sys.argv[2:])))


if __name__ == "__main__":
    main()
