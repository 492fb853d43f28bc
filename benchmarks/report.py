"""One report of many runs: every figure beside its limit, then what each benchmark shows, in Markdown and PNGs."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .harness import Table, draw, figure_table
from .timing import reason


def write_report(state: Mapping[str, Any], folder: Path) -> None:
    """Writes report.md and a PNG a stage beside the stages' results.

    Args:
      state: "stages", by name, with "arguments", "status" and "seconds" each; and the "command".
      folder: where their JSON files are.
    """
    from . import BENCHMARKS  # which has the stages among them

    parts, figures, stages = [], [], []
    for name, stage in state["stages"].items():
        stages.append((name, f"`{stage['arguments']}`", stage["status"], f"{stage['seconds']:.0f}"))
        file = folder / f"{name}.json"
        if not file.exists():
            continue
        report, module = json.loads(file.read_text()), BENCHMARKS[stage["arguments"].split()[0]]
        parts.append(f"## {name}")
        if "rehearsal" in report:
            parts.append("REHEARSAL: small shapes prove that this runs, and nothing else.")
        parts.append(f"{report['device']}, {report['date']}, {report['versions']}")
        parts += [f"**FAILED** {failure}" for failure in report.get("failures", [])]
        try:
            parts += [part.markdown() if isinstance(part, Table) else part for part in module.show(report)]
        except (KeyError, IndexError, ValueError) as error:  # of a stage that was cut off early
            parts.append(f"There is too little to show: {reason(error)}")
        if report.get("figures"):
            figures += [figure | {"what": f"{name}: {figure['what']}"} for figure in report["figures"]]
            picture = folder / f"{name}.png"
            with contextlib.suppress(RuntimeError):  # without matplotlib there are no pictures
                if not picture.exists() or picture.stat().st_mtime < file.stat().st_mtime:
                    draw(module, report, picture)
                parts.append(f"![{name}]({name}.png)")
    table = Table("Stages", ("stage", "`ridgeline bench`", "status", "seconds"), stages, names=3)
    head = [f"# {state['command']}", table.markdown(), "## Every figure beside its limit"]
    (folder / "report.md").write_text("\n\n".join([*head, figure_table(figures).markdown(), *parts]) + "\n")
