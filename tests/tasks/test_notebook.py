"""examples/look_at_a_run.ipynb runs from its first cell to its last, on a run of one round."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="runs notebooks: install the extra dev")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_notebook_shows_a_run_scores_and_paints(train, monkeypatch):
    import nbformat

    folder, _ = train("first", rounds=1)
    monkeypatch.setenv("RUN", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples/look_at_a_run.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert "1 of 1 rounds, finished" in printed
    assert "\nbase " in printed or printed.startswith("base ")
    assert "trained " in printed
    assert len(pictures) == 3
    assert pictures[1] != pictures[2]
