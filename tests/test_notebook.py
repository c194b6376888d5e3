"""The notebook of the documents: clean as it is committed, and it runs."""

import json
import os
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOK = json.loads((ROOT / "docs" / "first-encoder.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_it_holds_no_outputs():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in CODE)


@pytest.mark.slow
def test_its_cells_run_to_a_picture_of_neighbours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    matplotlib.use("Agg")
    names: dict[str, object] = {}
    for cell in CODE:
        exec("".join(cell["source"]), names)  # as a kernel would
        if cell["id"] == "settings":
            names["epochs"] = "2"
    share = int(capsys.readouterr().out.split("%")[0].split()[-1])
    assert share > 30  # of ten classes
    with Image.open(tmp_path / "neighbours.png") as picture:
        assert picture.size == (700, 500)
    assert (tmp_path / "first" / "encoder" / "model.safetensors").is_file()
