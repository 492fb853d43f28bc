"""Runs the notebooks and stores their outputs, with a hash of the source that made them beside.

    python notebooks/execute.py                          # all of them
    python notebooks/execute.py notebooks/02_*.ipynb     # some
    python notebooks/execute.py --check                  # run nothing; say what is stale or missing

The figure of the cell tagged "thumbnail" is stored under notebooks/figures too, where the READMEs find it.
"""

import argparse
import base64
import copy
import hashlib
import json
import os
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

HERE = Path(__file__).parent
SECONDS = 300  # that a cell may take
LINES = 20  # that a cell of code may have


def notebooks() -> list[Path]:
    """In reading order."""
    return sorted(HERE.glob("[0-9]*.ipynb"))


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with new outputs, run top to bottom in a kernel of its own.

    Raises:
      CellExecutionError: a cell raised; with its source and traceback.
    """
    made = copy.deepcopy(notebook)
    NotebookClient(made, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in made.cells:  # times of this run say nothing
        cell.metadata.pop("execution", None)
    made.metadata["ridgeline"] = {"source_sha256": source_hash(made)}
    return made


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """Of the text and code of all cells, in order."""
    source = json.dumps([[cell.cell_type, cell.source] for cell in notebook.cells])
    return hashlib.sha256(source.encode()).hexdigest()


def figures(cell: nbformat.NotebookNode) -> list[bytes]:
    """The PNG images among a cell's outputs."""
    found = [output.get("data", {}).get("image/png") for output in cell.get("outputs", [])]
    return [base64.b64decode(image) for image in found if image]


def thumbnail(notebook: nbformat.NotebookNode) -> bytes | None:
    """The figure that stands for the notebook."""
    tagged = [cell for cell in notebook.cells if "thumbnail" in cell.metadata.get("tags", [])]
    return next((image for cell in tagged for image in figures(cell)), None)


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What keeps the notebook from being published: stale or missing outputs, cells too long, noise."""
    found = []
    if notebook.metadata.get("ridgeline", {}).get("source_sha256") != source_hash(notebook):
        found.append("outputs are stale: the source has changed since they were made")
    if thumbnail(notebook) is None:
        found.append('no cell with a figure is tagged "thumbnail"')
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        if len(cell.source.splitlines()) > LINES:
            found.append(f"cell {index} has {len(cell.source.splitlines())} lines; {LINES} are allowed")
        if cell.source.count("plt.show()") != len(figures(cell)):
            found.append(f"cell {index} shows {cell.source.count('plt.show()')} figures and has {len(figures(cell))}")
        for output in cell.outputs:
            text = json.dumps({key: value for key, value in output.get("data", output).items() if key != "image/png"})
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"cell {index} has an error or a warning among its outputs: {text[:300]}")
            if path := re.search(r"(?<![\w.])/(?:home|root|tmp|usr|opt|work|mnt)/\S*", text):
                found.append(f"cell {index} has a path of one machine among its outputs: {path[0]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=notebooks(), metavar="FILE")
    parser.add_argument("--check", action="store_true", help="run nothing; exit 1 if an output is stale or missing")
    args = parser.parse_args()
    failed = False
    for file in tqdm(args.files, unit="notebook", disable=True if args.check else None, leave=False):
        notebook, started = nbformat.read(file, as_version=4), time.perf_counter()
        if not args.check:
            try:
                notebook = executed(notebook)
            except CellExecutionError as error:
                parser.exit(1, f"{file.name}: {error}\n")
            _store(file, nbformat.writes(notebook).encode() + b"\n")
            if image := thumbnail(notebook):
                _store(file.parent / "figures" / f"{file.stem}.png", image)
            print(f"{file.name}: {time.perf_counter() - started:.0f} s")
        for problem in problems(notebook):
            print(f"{file.name}: {problem}")
            failed = True
    parser.exit(int(failed))


def _store(file: Path, content: bytes) -> None:
    file.parent.mkdir(exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, file)


if __name__ == "__main__":
    main()
