"""The notebook and the page about Python, executed as a reader would."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.doc_tables import DOCS
from tests.support.tiny_federation import ROOT, python

FIRST_RUN = DOCS / "notebooks" / "first-run.ipynb"
SHORT = {
    '"run.rounds": 4': '"run.rounds": 1',
    '"data.limit": 1200': '"data.limit": 300',
    '"data.test-size": 200': '"data.test-size": 60, "train.steps": 2',
}


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    """Shortened in `make test`, as it is in `make test-slow`."""
    notebook = nbformat.read(FIRST_RUN, as_version=4)
    assert notebook.cells[1].source.count("run.rounds") == 1
    for long, short in SHORT.items() if not whole else ():
        assert long in notebook.cells[1].source
        notebook.cells[1].source = notebook.cells[1].source.replace(long, short)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # which a command run in this process sets
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    outputs = [x for cell in notebook.cells for x in cell.get("outputs", ())]
    assert any("image/png" in x.get("data", {}) for x in outputs), "no plot"
    told = "".join(x["text"] for x in outputs if x.get("name") == "stderr")
    assert "Warning" not in re.sub(r".*tqdm.*\n.*tqdm.*\n", "", told), told  # without ipywidgets
    shown = "".join(str(x.get("data", {}).get("text/plain", "")) for x in outputs)
    assert "Run('runs/first-run': fedex" in shown
    if whole:
        nbformat.write(notebook, tmp_path / "executed.ipynb")


def test_the_notebook_is_kept_without_outputs() -> None:
    """They would be of one machine, and in every difference."""
    notebook = nbformat.read(FIRST_RUN, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
def test_the_page_about_python_runs_from_top_to_bottom(tmp_path: Path) -> None:
    text = (DOCS / "use" / "python.md").read_text()
    blocks = dict(re.findall(r'```python title="([^"]+)"\n(.*?)```', text, flags=re.S))
    (tmp_path / "mine.py").write_text(blocks["mine.py"])
    script = "\n".join(blocks[title] for title in ("run", "use", "run it"))
    apps = [f"exec({blocks[title]!r}, {{}})" for title in ("server_app.py", "client_app.py")]
    go = f"import os; os.chdir({str(tmp_path)!r})\n"
    ran = python(go + "\n".join([script, *apps]), timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "evaluation.sure" in ran.stdout
    last = ran.stdout.rstrip().splitlines()[-1].split()
    assert float(last[2]) > 0.9, "the page's own model learns the sea from the wood"
