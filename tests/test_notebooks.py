"""Every notebook runs from its first cell to its last, then the solutions of its exercises, with errors fatal."""

import os
import re

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("sklearn")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
GLOSSARY = ROOT / "notebooks" / "GLOSSARY.md"


def solutions(notebook) -> list[str]:
    """The Python in the last cell, which has the exercises."""
    return re.findall(r"```python\n(.*?)```", notebook.cells[-1].source, re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_and_its_solutions_run(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # this copy, whether or not one is installed
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.parametrize("path", [*NOTEBOOKS, GLOSSARY], ids=lambda path: path.stem)
def test_links_between_notebooks_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+\.(?:ipynb|md))\)", path.read_text()):
        assert (path.parent / link).is_file(), link


def test_there_are_notebooks():
    assert NOTEBOOKS and all(path.stat().st_size < 1_000_000 for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_short_and_asks_before_it_shows(path):
    markdown = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]
    text = "\n".join(markdown)
    prose = re.sub(r"```python\n.*?```|\$\$.*?\$\$|<[^>]+>", "", text, flags=re.DOTALL)  # no code, no equation, no tag
    assert len(prose.split()) <= 1000
    assert text.count("**Predict before you run") == 2 and "](GLOSSARY.md)" in text
