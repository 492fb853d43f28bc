"""Files of request traces: Azure's CSV, and the JSON lines of Mooncake, which say what prompts share.

Azure's (Azure/AzurePublicDataset on GitHub) has the columns TIMESTAMP, ContextTokens and GeneratedTokens. Mooncake's
(kvcache-ai/Mooncake on GitHub; Qin et al., "Mooncake: Trading More Storage for Less Computation", FAST 2025) has an
object a line: "timestamp" in milliseconds, "input_length" and "output_length" in tokens, and "hash_ids", one for each
512 tokens of the prompt, the last of which may be fewer: equal ids stand for equal tokens.
"""

import csv
import datetime
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .request_trace import BLOCK_TOKENS, TraceRequest

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


def read_trace(path: Path) -> list[TraceRequest]:
    """Read a trace, in order of time: Mooncake's form where the name ends in .jsonl, else a CSV.

    In a CSV a timestamp is a date and time as in ISO 8601, or a number of seconds.

    Raises:
      ValueError: a column, field or value that is missing or wrong, naming the file, the line and the remedy.
    """
    rows = _json_rows(path) if path.suffix == ".jsonl" else _csv_rows(path)
    requests: list[TraceRequest] = []
    first = before = None
    for where, name, stamp, time, *rest in rows:
        if before is not None and time < before:
            raise ValueError(f"{where}: {name} {stamp!r} is before that of the request above; sort the file by it")
        first, before = time if first is None else first, time
        requests.append(TraceRequest(time - first, *rest))
    if not requests:
        raise ValueError(f"{path.name} has no requests; give one a line")
    return requests


def write_trace(trace: Sequence[TraceRequest], path: Path) -> None:
    """Write a trace, as it is before it is scaled, in Mooncake's form; prompts that share nothing get ids of their own.

    Times are rounded to milliseconds.
    """
    fresh = itertools.count(1 + max((block for request in trace for block in request.blocks), default=-1))
    with path.open("w", encoding="utf-8") as file:
        for request in trace:
            count = -(-request.prompt_tokens // BLOCK_TOKENS)
            blocks = request.blocks or itertools.islice(fresh, count)
            values = round(request.arrival * 1e3), request.prompt_tokens, request.output_tokens, list(blocks)
            print(json.dumps(dict(zip(_FIELDS, values, strict=True))), file=file)


def _csv_rows(path: Path) -> Iterator[tuple[Any, ...]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path.name}, line 1: no column {missing[0]}, found {rows.fieldnames or 'nothing'}; "
                f"the first line must name the columns {', '.join(COLUMNS)}"
            )
        for row in rows:
            where, stamp = f"{path.name}, line {rows.line_num}", row["TIMESTAMP"]
            yield where, "TIMESTAMP", stamp, _time(stamp, where), *(_length(row[n], n, where) for n in COLUMNS[1:])


def _time(value: str | None, where: str) -> float:
    for parse in (float, lambda text: datetime.datetime.fromisoformat(text)):
        try:
            time = parse(value or "")
        except ValueError:
            continue
        if isinstance(time, datetime.datetime):  # in UTC where no zone is told: an hour is never skipped
            return (time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp()
        if math.isfinite(time):
            return time
    raise ValueError(f"{where}: TIMESTAMP is {value!r}; write it as 2023-11-16 18:15:46.68, or as seconds")


def _length(value: str | None, name: str, where: str) -> int:
    if value is None or not value.strip().isdecimal() or int(value) == 0:
        raise ValueError(f"{where}: {name} is {value!r}; it must be a whole number of tokens, at least 1")
    return int(value)


def _json_rows(path: Path) -> Iterator[tuple[Any, ...]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _json_row(line, f"{path.name}, line {number}")


def _json_row(line: str, where: str) -> tuple[Any, ...]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}; write one object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {line.strip()[:60]}; it must be an object with {', '.join(_FIELDS)}")
    for name in _FIELDS:
        if name not in row:
            raise ValueError(f"{where}: no field {name}; every line must have {', '.join(_FIELDS)}")
    stamp, prompt, output, blocks = (row[name] for name in _FIELDS)
    if isinstance(stamp, bool) or not isinstance(stamp, int | float) or not math.isfinite(stamp):
        raise ValueError(f"{where}: timestamp is {stamp!r}; it must be a number of milliseconds")
    for name, value in (("input_length", prompt), ("output_length", output)):
        if not _is_whole(value) or value < 1:
            raise ValueError(f"{where}: {name} is {value!r}; it must be a whole number of tokens, at least 1")
    if not isinstance(blocks, list) or not all(_is_whole(block) and block >= 0 for block in blocks):
        raise ValueError(f"{where}: hash_ids is {blocks!r:.60}; it must be a list of whole numbers, at least 0")
    count = -(-prompt // BLOCK_TOKENS)
    if len(blocks) != count:
        raise ValueError(
            f"{where}: hash_ids has {len(blocks)} ids, and input_length {prompt} is {count} blocks of {BLOCK_TOKENS} "
            "tokens, the last of which may be shorter; give one id a block"
        )
    return where, "timestamp", stamp, stamp / 1e3, prompt, output, tuple(blocks)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
