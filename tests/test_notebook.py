"""The notebook runs from top to bottom, and the pages that stand in the repository are of today's scripts."""

import html
import re

import nbclient
import nbformat
import pytest
from program import ROOT

NOTEBOOK = ROOT / "notebooks" / "attn_cnn.ipynb"


def page_of_the_notebook():
    outputs = (output for cell in nbformat.read(NOTEBOOK, as_version=4).cells for output in cell.get("outputs", []))
    return html.unescape("".join(output.get("data", {}).get("text/html", "") for output in outputs))


@pytest.mark.parametrize("page", [page_of_the_notebook, (ROOT / "docs" / "demo.html").read_text])
def test_pages_in_the_repository_have_todays_scripts_and_style(page):
    text = page()
    files = [path for path in (ROOT / "attn_cnn" / "explorer" / "static").iterdir() if path.suffix in (".js", ".css")]
    assert len(files) > 5 and [path.name for path in files if path.read_text().strip() not in text] == []


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))  # so that it installs nothing
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "JAX computes on" in printed
    (accuracy,) = re.findall(r"runs/notebook is finished: .* test accuracy ([\d.]+\d)", printed)
    assert float(accuracy) > 0.97  # as the README promises of its first command, which trains the same
    kinds = [kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert kinds.count("image/png") == 2 and kinds.count("text/html") >= 1
