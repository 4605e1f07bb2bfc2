"""The notebook runs from top to bottom, and says what is missing where something is."""

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from embedded.config import REPOSITORY
from gun_detection import stages
from gun_detection.settings import Settings

_FILE = REPOSITORY / "notebooks" / "exploration.ipynb"


@pytest.fixture
def notebook() -> NotebookNode:
    return nbformat.read(_FILE, as_version=4)


def test_it_is_stored_without_outputs(notebook: NotebookNode) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_it_draws_a_data_set_a_model_and_its_errors(
    notebook: NotebookNode, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody's own configuration, and nothing left in the home folder.
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))

    def ingest() -> None:
        stages.ingest("synthetic:60:1", settings)

    def make_champion() -> None:
        model = stages.train(settings, None, "smoke", {"max_steps": 1})["model_id"]
        assert stages.gate(settings, model, None, "trial", "a test")["passed"]
        stages.promote(settings, model, "a test", "a test", stages.require_passed(settings, model))

    remedies: list[tuple[str, Callable[[], None]]] = [
        ("there is no data set yet", ingest),
        ("there is no champion yet", make_champion),
    ]
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            if said := execute(client, cell, index):
                message, remedy = remedies.pop(0)
                assert message in said
                remedy()
                assert execute(client, cell, index) is None
    assert not remedies
    for cell in notebook.cells:
        # Galleries of failures may be empty; every plot is drawn.
        if "\nplt.show()" in cell.source:
            assert len(images(cell)) == 1, cell.source
        if cell.cell_type == "code":
            assert all(output.get("name") != "stderr" for output in cell.outputs), cell.outputs
    examples = next(cell for cell in notebook.cells if 'gallery("Training pictures"' in cell.source)
    assert len(images(examples)) == 1


def execute(client: NotebookClient, cell: NotebookNode, index: int) -> str | None:
    """What the cell failed with, if it did."""
    try:
        client.execute_cell(cell, index)
    except CellExecutionError as error:
        return str(error.evalue)
    return None


def images(cell: NotebookNode) -> list[str]:
    return [data["image/png"] for o in cell.outputs if "image/png" in (data := o.get("data", {}))]
