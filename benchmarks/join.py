"""Puts result files of one script together: parts that several GPUs have measured, or rows measured anew.

Rows that agree in ``--by`` are one: the first file's counts, so the newest comes first and a file that is there already
last. The joined file has the first one's commit, and rows of another carry their own; its ``command`` is that of all
parts from which a row is left. Files of another script, device or model are refused. planner.py's sums are taken again;
of end_to_end.py texts are left out, and classes that were measured without class exact get their speed-up over that of
the same commit, or else of another, which the row then names (``over_commit``); of shapes.py, steps are set beside that
of one token only where it is of the same commit.

    python benchmarks/join.py part1.json part2.json --by workload,context,batch,strategy --out FILE
    python benchmarks/join.py new.json FILE --by case,variant --out FILE                # FILE's other rows stay
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import planner
from plots import script_of

Result = dict[str, Any]
# What must be the same in all files that have it.
SAME = ("device", "backend", "model", "fingerprint", "dtype", "implementation")
NOTE = "rows with a commit of their own were measured at that one, by the same script on the same kind of device"


def joined(results: Sequence[tuple[str, Result]], by: Sequence[str]) -> Result:
    """The rows of ``results`` (name, result file), the first of each that agree in the fields ``by``.

    Raises ValueError for files that do not belong together, and for rows without those fields.
    """
    (_, first), *_ = results
    rows: dict[tuple[Any, ...], Result] = {}
    commands: list[str] = []
    for name, result in results:
        if script_of(result) != script_of(first):
            raise ValueError(f"{name}: got results of {script_of(result)}, expected those of {script_of(first)}")
        for field in SAME:
            if field in result and field in first and result[field] != first[field]:
                raise ValueError(f"{name}: {field}: got {result[field]!r}, expected {first[field]!r}")
        known = len(rows)
        for row in result["rows"]:
            missing = [field for field in by if field not in row]
            if missing:
                raise ValueError(f"by: got {', '.join(missing)}, which rows of {name} lack; they have {', '.join(row)}")
            commit = row.get("commit", result["commit"])
            own = {} if commit == first["commit"] else {"commit": commit}
            rows.setdefault(tuple(row[field] for field in by), {k: v for k, v in row.items() if k != "commit"} | own)
        if len(rows) > known:
            commands += re.sub(r" --out \S+", " --out", result["command"]).split("; ")
    found = first | {"command": "; ".join(dict.fromkeys(commands)), "rows": list(rows.values())}
    if "complete" in first:
        found["complete"] = all(result.get("complete", True) for _, result in results)
    if any("commit" in row for row in rows.values()):
        found["note"] = next((result["note"] for _, result in results if "note" in result), NOTE)
    if script_of(first) == "planner":
        found |= planner.summary(found["rows"])
    if script_of(first) == "end_to_end":
        _complete(found["rows"], first["commit"])
    if script_of(first) == "shapes":
        _set_beside(found["rows"])
    return found | {"rows": found.pop("rows")}


def _complete(rows: Sequence[Result], commit: str) -> None:
    """Speed-ups of end_to_end.py's rows, over decoding one token at a time in class exact; their texts go. ``commit``:
    of the rows that name none."""
    axes = ("context", "batch", "temperature", "workload")
    exact: dict[tuple[Any, ...], dict[str, float]] = {}  # by point and commit, tokens a second
    for row in rows:
        if (row["precision"], row["strategy"]) == ("exact", "none") and "tokens_per_second" in row:
            point = tuple(row.get(axis) for axis in axes)
            exact.setdefault(point, {})[row.get("commit", commit)] = row["tokens_per_second"]
    for row in rows:
        row.pop("tokens", None)
        bases = exact.get(tuple(row.get(axis) for axis in axes))
        if "speedup" not in row and "tokens_per_second" in row and bases:
            own = row.get("commit", commit)
            if own not in bases:
                own = row["over_commit"] = next(iter(bases))
            row["speedup"] = row["tokens_per_second"] / bases[own]


def _set_beside(rows: Sequence[Result]) -> None:
    """Steps of shapes.py over that of one token: what a row says may be of one that is here no more."""
    axes = ("preset", "context", "batch", "commit")
    single = {tuple(row.get(axis) for axis in axes): row["step_us"] for row in rows
              if row["width"] == 1 and "step_us" in row}  # fmt: skip
    for row in rows:
        row.pop("over_decode", None)
        if "step_us" in row and (one := single.get(tuple(row.get(axis) for axis in axes))):
            row["over_decode"] = row["step_us"] / one


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="result files, the newest first")
    parser.add_argument("--by", required=True, help="the fields that tell rows apart, with commas between them")
    args = parser.parse_args()
    if args.out == "":
        parser.error("--out: got no path, expected one: what is joined has no usual place")
    found = joined([(str(file), harness.read(file)) for file in args.files], args.by.split(","))
    print(f"{len(found['rows'])} rows of {len(args.files)} files")
    if args.out:
        harness.write(Path(args.out), found)


if __name__ == "__main__":
    harness.run(main)
