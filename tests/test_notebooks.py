"""The notebooks: committed without outputs, and every cell runs."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where they run, one after another: the cold start that the first makes serves all. Their
    kernel "python3" is this very interpreter, whatever else is installed by that name."""
    kernelspec = pytest.importorskip("ipykernel.kernelspec")
    made = tmp_path_factory.mktemp("notebooks")
    kernelspec.write_kernel_spec(made / "jupyter" / "kernels" / "python3")
    return made


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_valid_and_has_no_outputs(path):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.cells[0].cell_type == "markdown"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(path, folder, monkeypatch):
    """An error in a cell is the test's."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name, value in {
        "JUPYTER_DATA_DIR": str(folder / "jupyter"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'notebooks'}",
        "JAX_PLATFORMS": "cpu",
        "ISOLATION": "process",
    }.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert ran and all(cell.execution_count for cell in ran)
