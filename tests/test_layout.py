"""The laws of the package: who may import whom, what is a command, how long a file may be."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "minicache"
LIBRARY = [path for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__")]
CORE = [PACKAGE / f"{name}.py" for name in ("unet", "diffusion", "plan", "samplers", "sampling")]


def defines(path: Path, name: str) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.parse(path.read_text()).body)


TOOLS = [path for path in (PACKAGE / "tools").glob("*.py") if defines(path, "main")]


def imports(path: Path, lazy: bool = False) -> set[str]:
    """Which modules of the package a file imports: when it is imported itself, or (lazy) only inside its functions."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    inside = {node for function in functions for node in ast.walk(function)}
    found = set()
    for node in ast.walk(tree):
        if (node in inside) != lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if file_of(name) else node.module for name in modules}
    return {name for name in found if file_of(name)}


def file_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    candidates = (path.with_suffix(".py"), path / "__init__.py") if module.split(".")[0] == "minicache" else ()
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_the_library_knows_neither_commands_nor_other_formats():
    for path in LIBRARY:
        outer = {name for name in imports(path) if name.startswith(("minicache.tools", "minicache.formats"))}
        inner = {name for name in imports(path, lazy=True) if name.startswith(("minicache.tools", "minicache.formats"))}
        assert not outer, path
        assert inner == ({"minicache.formats"} if path.stem == "checkpoints" else set()), path


def test_other_formats_know_no_commands():
    for path in (PACKAGE / "formats").glob("*.py"):
        assert not any(name.startswith("minicache.tools") for name in imports(path) | imports(path, lazy=True)), path


def test_there_are_no_circles():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
               for path in PACKAGE.rglob("*.py")}  # fmt: skip
    graph = {module: imports(path) for module, path in modules.items()}
    assert "minicache.unet" in graph["minicache"] and "minicache.formats.pesser" in graph["minicache.formats"]
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_network_stands_alone_and_counting_needs_no_downloads():
    assert not imports(PACKAGE / "unet.py") | imports(PACKAGE / "unet.py", lazy=True)
    assert not imports(PACKAGE / "cost.py") & {"minicache.files", "minicache.checkpoints"}


def python_m_minicache(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "minicache", *args], cwd=ROOT, capture_output=True, text=True)


def test_every_command_can_be_found():
    listed = python_m_minicache()
    assert listed.returncode == 0 and not listed.stderr
    for path in TOOLS:
        assert defines(path, "parse"), path
        assert f"\n  {path.stem} " in listed.stdout
    unknown = python_m_minicache("no_such_command")
    assert unknown.returncode == 2 and "no_such_command" in unknown.stderr and "Traceback" not in unknown.stderr


def test_no_file_is_too_long_to_read():
    others = {*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")} - {*CORE}
    assert not [path for path in others if lines(path) > 300]


def test_the_core_is_short():
    assert sum(map(lines, CORE)) < 1000 and max(map(lines, CORE)) < 300
