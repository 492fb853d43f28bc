"""How every benchmark runs. It is a module that tells of itself in its docstring and has

add_arguments(parser)   its own options
measure(args)           yields its results, as a dictionary for JSON, whenever there are more of them
show(report)            the same for people: tables, and lines of text
figures(report)         what of them stands beside a limit
plot(report, path)      a picture; where it has none, the figures are drawn as shares of their limits

The last three read what is stored and nothing else, so that a report of many runs can be made of their files. Results
may have "subject" and "device", which go into the file's name, and "failures", with which the command fails.
"""

import argparse
import csv
import dataclasses
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..cli.common import FAILURE, OK, print_notes, terminal, usage_errors
from ..cli.formats import number, print_json, simple_table
from ..roofline.plot import check_plot, new_figure, save_figure
from .environment import Others, record, slug, store
from .limits import REHEARSAL


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a title; the first `names` columns are words, the others figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1

    def print(self) -> None:
        table = simple_table(self.title, *self.columns, names=self.names)
        for row in self.rows:
            table.add_row(*row)
        terminal().print(table)

    def markdown(self) -> str:
        rules = [":--" if index < self.names else "--:" for index in range(len(self.columns))]
        lines = (f"| {' | '.join(cells)} |" for cells in (self.columns, rules, *self.rows))
        return "\n".join([f"**{self.title.strip()}**", "", *lines]) if self.title else "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks have."""
    group = parser.add_argument_group("results")
    group.add_argument("--output", type=Path, metavar="FILE", help="where they are stored (default: here)")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw them to a .png, .pdf or .svg")
    group.add_argument("--json", action="store_true", help="print them as one JSON object instead of tables")
    help = "or print tables in Markdown, or a flat row a measurement, with every setting, as CSV or as JSON lines"
    group.add_argument("--format", choices=("md", "csv", "jsonl"), help=help)


def run(module: ModuleType, args: argparse.Namespace) -> int:
    """Measures, stores after every result, prints and draws; returns the exit code."""
    with usage_errors():
        if args.output is not None and not args.output.absolute().parent.is_dir():
            raise ValueError(f"--output {str(args.output)!r} is in no directory that exists; make it first")
        if args.plot is not None:
            check_plot(args.plot)
    name, others, out, report = module.__name__.rpartition(".")[2], Others(), args.output, {}
    started = time.perf_counter()
    for results in module.measure(args):
        header = report or record(name, args.command)  # not before: a benchmark may set up JAX's devices first
        report = header | results | {"cores_busy_with_others": others.cores()}
        report |= {"rehearsal": True} if REHEARSAL else {}
        out = out or _default_output(report)
        store(report, out)
        if not sys.stderr.isatty():  # where bars are not to be seen
            count = sum(len(rows) for rows in _measurements(report).values())
            print(f"{name}: {count} measured, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if not report:
        return OK
    figures = list(module.figures(report))
    report["figures"] = [figure.as_dict() for figure in figures]
    store(report, out)
    if args.plot is not None:
        draw(module, report, args.plot)
    failures = report.get("failures", [])
    if args.json:
        print_json(report)
        return FAILURE if failures else OK
    if args.format is not None:
        print_flat(report, args.format, module.show(report))
        return FAILURE if failures else OK
    console = terminal()
    for part in module.show(report):
        part.print() if isinstance(part, Table) else print_notes([part])
    for figure in figures:
        if figure.wanted is not None:
            met = "met" if figure.share >= figure.wanted else "NOT MET"
            console.print(
                f"{met}: {figure.what}: {figure.share:.3f} of its limit, wanted {figure.wanted}", soft_wrap=True
            )
    for failure in failures:
        console.print(f"FAILED: {failure}", markup=False, soft_wrap=True)
    drawn = f", the plot in {args.plot}" if args.plot else ""
    console.print(f"The results are in {out}{drawn}.", highlight=False, soft_wrap=True)
    return FAILURE if failures else OK


def print_flat(report: Mapping[str, Any], format: str, shown: Iterable[Table | str]) -> None:
    """A report as Markdown, as `shown`, or as rows for a spreadsheet or a data frame."""
    if format == "md":
        print("\n\n".join(part.markdown() if isinstance(part, Table) else part for part in shown))
        return
    rows = list(flat_rows(report))
    if format == "jsonl":
        for row in rows:
            print_json(row)
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def flat_rows(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row a measurement, with all that the whole report says besides; names within names are joined by dots.

    Lists of numbers, such as all timings of a spread, are left out.
    """
    lists = _measurements(report)
    settings = _flat({name: value for name, value in report.items() if name not in lists})
    if not lists:
        yield settings
    for name, rows in lists.items():
        for row in rows:
            yield settings | {"measurement": name} | _flat(row)


def _measurements(report: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """The lists of a report that have a measurement each."""
    lists = {name: value for name, value in report.items() if name != "figures" and isinstance(value, list)}
    return {name: value for name, value in lists.items() if value and all(isinstance(row, Mapping) for row in value)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            flat[f"{prefix}{name}"] = value
    return flat


def _default_output(report: dict[str, Any]) -> Path:
    words = [report["benchmark"], *filter(None, [slug(report.get("subject") or "")]), slug(report["device"])]
    return Path(f"{'-'.join(words)}.json")


def draw(module: ModuleType, report: dict[str, Any], path: Path) -> None:
    """The benchmark's picture of a report."""
    if hasattr(module, "plot"):
        return module.plot(report, path)
    shares = {figure["what"]: figure["share"] for figure in report["figures"]}
    figure = new_figure(figsize=(10, 1 + 0.28 * len(shares)))
    axes = figure.subplots()
    axes.barh(range(len(shares)), shares.values())
    axes.set_yticks(range(len(shares)), shares, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("share of the limit")
    axes.set_title(f"{report['benchmark']} on {report['device']}")
    save_figure(figure, path, dpi=130)


def figure_table(figures: Iterable[dict[str, Any]]) -> Table:
    """Stored figures beside their limits."""
    rows = [
        (
            figure["what"],
            f"{figure['value']:,.3g} {figure['unit']}",
            f"{figure['limit']:,.3g}",
            f"{figure['share']:.3f}",
            "" if figure["wanted"] is None else f"{figure['wanted']}{'' if figure['met'] else ', NOT MET'}",
        )
        for figure in figures
    ]
    return Table("", ("figure", "measured", "limit", "share", "wanted"), rows)


def milliseconds(seconds: float) -> str:
    """Without the unit."""
    return f"{seconds * 1e3:.3f}" if seconds < 1e-3 else number(seconds * 1e3)
