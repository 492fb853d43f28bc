"""Runs notebooks top to bottom and stores their outputs, with a hash of the source that made them.

python notebooks/execute.py                       # all
python notebooks/execute.py notebooks/01_*.ipynb  # some
"""

import argparse
import copy
import hashlib
import json
import os
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm

HERE = Path(__file__).parent
SECONDS = 600  # that a cell may take


def source_hash(notebook: nbformat.NotebookNode) -> str:
    """Of the text and code of all cells, in order."""
    source = json.dumps([[cell.cell_type, cell.source] for cell in notebook.cells])
    return hashlib.sha256(source.encode()).hexdigest()


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with new outputs, run in a kernel of its own.

    Raises:
      CellExecutionError: a cell raised; with its source and traceback.
    """
    made = copy.deepcopy(notebook)
    NotebookClient(made, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in made.cells:  # times and ids of this run say nothing
        cell.metadata.pop("execution", None)
    made.metadata["ridgeline"] = {"source_sha256": source_hash(made)}
    return made


def figures(notebook: nbformat.NotebookNode) -> int:
    """Images among the outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")), metavar="FILE")
    args = parser.parse_args()
    for file in tqdm(args.files, unit="notebook", disable=None, leave=False):
        started = time.perf_counter()
        try:
            made = executed(nbformat.read(file, as_version=4))
        except CellExecutionError as error:
            parser.exit(1, f"{file.name}: {error}\n")
        partial = file.with_name(file.name + ".partial")
        nbformat.write(made, partial)
        os.replace(partial, file)
        print(f"{file.name}: {figures(made)} figures, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
