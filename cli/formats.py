"""Numbers and tables as the commands print and take them."""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table


def integers(text: str) -> list[int]:
    """An argument such as 1,2,4."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between, such as 1,2,4") from None


def to_json(value: Any, **options: Any) -> str:
    """As JSON, which has no NaN and no infinity: they are null."""
    return json.dumps(_with_numbers(value), allow_nan=False, **options)


def print_json(value: Any) -> None:
    """One value a line, in whatever characters standard output can take."""
    is_unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
    print(to_json(value, ensure_ascii=not is_unicode), flush=True)


def _with_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_numbers(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def simple_table(title: str, *columns: str, names: int = 0) -> Table:
    """A table under a title: `names` columns of words, then figures."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < names else "right", no_wrap=True)
    return table


def number(value: float) -> str:
    """Three digits or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{number(seconds * 1e3)} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} us"


def percent(share: float) -> str:
    """With a digit more where it is small."""
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"
