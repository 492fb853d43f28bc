"""Every notebook runs, and what is committed of it is what its source makes."""

import copy

import jax
import nbformat
import pytest

import execute

NOTEBOOKS = execute.notebooks()


@pytest.fixture(params=NOTEBOOKS, ids=lambda file: file.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_there_are_nine_in_reading_order():
    assert [file.stem[:3] for file in NOTEBOOKS] == [f"{n:02}_" for n in range(1, 10)]


def test_it_runs_and_makes_every_figure(notebook, request, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    if request.node.callspec.id != "08_many_requests":  # which runs for longer than it compiles
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    if "target_mesh" in str(notebook.cells):
        request.getfixturevalue("plugin")
    made = execute.executed(notebook)
    assert execute.problems(made) == []


def test_its_outputs_are_those_of_its_source(notebook):
    nbformat.validate(notebook)
    assert execute.problems(notebook) == []


def test_the_checks_see_what_is_wrong():
    good = nbformat.read(NOTEBOOKS[0], as_version=4)

    def found(change):
        bad = copy.deepcopy(good)
        change(bad, next(cell for cell in bad.cells if "thumbnail" in cell.metadata.get("tags", [])))
        return " ".join(execute.problems(bad))

    def warned(text):
        return nbformat.v4.new_output("stream", name="stderr", text=text)

    assert found(lambda bad, cell: None) == ""
    assert "stale" in found(lambda bad, cell: bad.cells[0].update(source="# Other"))
    assert "shows 1 figures and has 0" in found(lambda bad, cell: cell.update(outputs=[]))
    assert "tagged" in found(lambda bad, cell: cell.metadata.pop("tags"))
    assert "21 lines" in found(lambda bad, cell: cell.update(source="pass\n" * 21))
    assert "a warning" in found(lambda bad, cell: cell.outputs.append(warned("DeprecationWarning")))
    assert "/home/someone" in found(lambda bad, cell: cell.outputs.append(warned("in /home/someone/file.py")))


def test_a_cell_that_raises_fails():
    bad = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(execute.CellExecutionError, match="ZeroDivisionError"):
        execute.executed(bad)


def test_the_list_shows_each_with_its_figure():
    text = (execute.HERE / "README.md").read_text()
    places = [text.index(f"]({file.name})") for file in NOTEBOOKS]
    assert places == sorted(places)
    for file in NOTEBOOKS:
        assert f'src="figures/{file.stem}.png"' in text
        stored = (execute.HERE / "figures" / f"{file.stem}.png").read_bytes()
        assert stored == execute.thumbnail(nbformat.read(file, as_version=4))
    assert sorted(path.stem for path in (execute.HERE / "figures").iterdir()) == [file.stem for file in NOTEBOOKS]
