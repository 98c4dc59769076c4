"""Writes the tables of README.md and docs/performance.md between their marker comments, from the files in
benchmarks/results.

python benchmarks/readme_table.py            # writes them
python benchmarks/readme_table.py --check    # exit code 1 if a document has another one
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from plots import script_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
POINTS = "<!-- end to end: python benchmarks/readme_table.py -->"
MECHANISMS = "<!-- ablations: python benchmarks/readme_table.py -->"
COMMITS = "<!-- commits: python benchmarks/readme_table.py -->"
BEGIN, END = "<!-- results: python benchmarks/readme_table.py -->", "<!-- end of results -->"
Result = dict[str, Any]
# What was measured and the result; a third, where a row was measured at another commit than its file's.
Lines = Iterator[tuple[str, ...]]


def thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def called(model: str) -> str:
    """A checkpoint or preset in words: benchmarks/target, and what ``make bench-target`` leaves."""
    return "trained target" if model.startswith(("bench-run/", "benchmarks/target")) else model


def held_out(result: Result) -> Lines:
    rows = result["rows"]
    ups = [row["speedup"] for row in rows]
    same = sum(row["identical"] for row in rows)
    yield (
        f"embedded model, prompt lookup, {len(rows)} held-out files, {result['prompt_tokens']} tokens of prompt",
        f"{statistics.median(ups):.2f}x decoding one token at a time ({min(ups):.2f} to {max(ups):.2f}), "
        f"{result['mean_acceptance_length']:.2f} tokens a step, identical tokens in {same} of {len(rows)}",
    )


def acceptance(result: Result) -> Lines:
    for name in dict.fromkeys(row["prompts"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["prompts"] == name and row["drafter"] != "self"]
        best = max(rows, key=lambda row: row["mean_acceptance_length"])
        yield (
            f"embedded model, longest drafts accepted, {name}",
            f"{best['mean_acceptance_length']:.2f} tokens a step ({best['drafter']}, {best['tree']})",
        )


def held_out_bounds(result: Result) -> Lines:
    yield (
        f"class approx, embedded model, {len(result['rows'])} stored strategies, other held-out text behind "
        f"{result['context']:,} tokens",
        f"{sum(row['inside'] for row in result['rows'])} of {len(result['rows'])} diverge less than the bound by which "
        "they are admitted",
    )


def prefill(result: Result) -> Lines:
    for row in result["rows"]:
        dense = ""
        if "dense_seconds" in row:
            dense = f"; dense attention alone {row['dense_seconds']:.1f} s ({row['dense_implementation']})"
        if "nsa_kernel_seconds" in row:
            dense += f", attention's launches {row['nsa_kernel_seconds']:.1f} s"
        yield (
            f"prefill of {row['tokens']:,} tokens, {row['preset']}",
            f"{row['seconds']:.1f} s, {row['peak_bytes'] / 1e9:.1f} GB at most{dense}",
        )


def verify_layer(result: Result) -> Lines:
    """At 64K with 32/8 heads, 70 % of overlap and the groups that the kernels choose; the file has the others."""
    for row in sorted(result["rows"], key=lambda row: (row["batch"], row["width"])):
        if (row["heads"], row["context"], row["overlap"]) != ("32x8", 64, "70") or not row["default"]:
            continue
        peer = "" if row["peer"] is None else f", peer {row['peer']} µs"
        peer += f", XLA {row['xla']:.0f} µs" if isinstance(row.get("xla"), float) else ""
        yield (
            f"one layer, {thousands(1024 * row['context'])}, {row['heads'].replace('x', '/')} heads, batch "
            f"{row['batch']}, T = {row['width']}, C = {row['group']}",
            f"{row['refresh']:.0f} µs{peer}, HBM floor {row['floor']:.0f} µs; reuse layer {row['reuse']:.0f} µs",
            row.get("commit", ""),
        )


def selection(result: Result) -> Lines:
    cases = list(dict.fromkeys(row["case"] for row in result["rows"]))
    times = {(row["case"], row["variant"].split()[0]): row["median"] for row in result["rows"]}
    largest = max(cases, key=lambda case: times[case, "top_k"])
    ours, theirs = times[largest, "pallas"], times[largest, "top_k"]
    yield f"block selection, {largest}", f"{ours:.0f} µs, lax.top_k {theirs:.0f} µs"


def compress(result: Result) -> Lines:
    """At the 8B shape, of eight sequences' chains of 16; the file has the others."""
    times = {(row["case"], row["variant"].split()[0]): row["median"] for row in result["rows"]}
    case = "D128-B8-T16"
    if (f"{case}-one", "xla") in times and (f"{case}-none", "xla") in times:
        one, none = ([times[f"{case}-{used}", variant] for variant in ("pallas", "xla")] for used in ("one", "none"))
        yield (
            f"φ of one layer, {case}",
            f"{one[0]:.0f} µs where a block ends in each sequence, XLA's code {one[1]:.0f} µs; "
            f"{none[0]:.0f} and {none[1]:.0f} µs where none does",
        )


def refresh_reuse(result: Result) -> Lines:
    """With about a third of the layers refreshing, and with one."""
    layers = max(row["refresh"] for row in result["rows"])
    counts = {row["refresh"] for row in result["rows"]} - {layers}
    if not counts:  # cut off behind its first row
        return
    for refresh in sorted({min(counts, key=lambda count: abs(count - layers / 3)), min(counts)}, reverse=True):
        found = {row["compressed"]: row["speed-up"] for row in result["rows"]
                 if row["refresh"] == refresh and row["schedules"] == "uniform"}  # fmt: skip
        if not found:
            continue
        speeds = ", ".join(f"{speed:.2f}x with compressed output {kind}" for kind, speed in found.items())
        yield (
            f"{refresh} of {layers} layers refreshing, {result['model']}, {thousands(result['context'])}, batch "
            f"{result['batch']}, T = {result['width']}",
            f"{speeds}, over all refreshing",
        )


def end_to_end(result: Result) -> Lines:
    """Of each workload, batch and temperature the best fixed strategy and the planner, in class exact, at the longest
    context; identical tokens before others."""
    rows = [row for row in result["rows"] if "speedup" in row and row["precision"] == "exact"
            and row["strategy"] != "none"]  # fmt: skip
    dtype = f", {result['dtype']}" if "dtype" in result else ""
    of = "embedded model" if result.get("checkpoint") == "embedded" else "trained target"

    def same(row: dict[str, Any]) -> bool:
        count, _, texts = row.get("identical", "0 of 1").partition(" of ")
        return count == texts

    points = dict.fromkeys((row["batch"], row["temperature"], row["workload"]) for row in rows)
    for batch, temperature, workload in sorted(points, key=lambda point: point[:2]):
        mine = [row for row in rows if (row["batch"], row["temperature"], row["workload"])
                == (batch, temperature, workload)]  # fmt: skip
        longest = max(row["context"] for row in mine)
        here = [row for row in mine if row["context"] == longest]
        best = max((row for row in here if row["strategy"] != "auto"), key=lambda row: (same(row), row["speedup"]))
        planned = "".join(f"; the planner {row['speedup']:.2f}x, {row.get('identical', '-')}" for row in here
                          if row["strategy"] == "auto" and row.get("commit") == best.get("commit"))  # fmt: skip
        how = "greedy" if temperature == 0 else f"temperature {temperature}"
        yield (
            f"end to end, {of}, {workload}, {thousands(longest)}, batch {batch}, {how}, class exact{dtype}",
            f"{best['speedup']:.2f}x one token at a time ({best['strategy']}), "
            f"{best['tokens_per_second']:.0f} tokens/s, {best['mean_acceptance_length']:.2f} tokens a step, "
            f"identical {best.get('identical', '-')}{planned}",
            best.get("commit", ""),
        )


def train_target(result: Result) -> Lines:
    runs = [run for run in result["runs"] if run["command"][0] == "train"]
    if "parameters" in result:
        loss, tokens = runs[-1]["summary"]["held_out_loss"], sum(run["summary"]["tokens"] for run in runs)
        yield (
            f"target of {result['parameters'] / 1e6:.0f}M parameters (benchmarks/target)",
            f"held-out loss {loss:.2f} nats a token after {tokens / 1e6:.1f}M tokens; "
            f"{sum(run['wall_seconds'] for run in result['runs']):.0f} s with its draft head",
        )
    yield from end_to_end(result)


def strict(result: Result) -> Lines:
    rows = result["rows"]
    cases = [name for name in rows[0] if name.startswith(("greedy", "sampled"))]
    same, every = (sum(row[name] for row in rows for name in names) for names in (cases, ["prompts"] * len(cases)))
    fewest, most = (f([row["prompts"] for row in rows]) for f in (min, max))  # of a run that was cut, not all alike
    yield (
        f"class strict, {len({row['drafter'] for row in rows})} drafters, {len(result['trees'])} trees, "
        f"{most if fewest == most else f'{fewest} to {most}'} prompts each, alone and in batches, {result['dtype']}",
        f"{same:,} of {every:,} texts as decoded one token at a time, to the bit",
    )


def planner(result: Result) -> Lines:
    if "planner_over_default" in result:  # there when the run has ended
        cells: dict[tuple[Any, ...], dict[str, float]] = {}
        for row in result["rows"]:
            cell = tuple(row[axis] for axis in ("workload", "context", "batch", "temperature"))
            cells.setdefault(cell, {})[row["strategy"]] = row["tokens_per_second"]
        of_best = [cell.pop("planner") / max(cell.values()) for cell in cells.values()]
        # Of which planner: fixed strategies change less.
        commits = (row.get("commit", result["commit"]) for row in result["rows"] if row["strategy"] == "planner")
        sampled = sorted({"sampled" if row["temperature"] else "greedy" for row in result["rows"]})
        yield (
            f"the planner over {len(cells)} {' and '.join(sampled)} cells, {called(result['checkpoint'])}, "
            f"{result['dtype']}",
            f"{result['planner_over_default']:.2f}x lookup chain:4, {result['planner_of_best_by_cell']:.2f} of the "
            f"best fixed strategy by cell ({min(of_best):.2f} to {max(of_best):.2f}; geometric mean); planning "
            f"{100 * result['planning_share']:.1f} % of decoding",
            " and ".join(dict.fromkeys(commits)),
        )


def shapes(result: Result) -> Lines:
    """Beside the step of one token where that was measured at the same commit."""
    axes = ("preset", "context", "batch")
    rows = [row for row in result["rows"] if "step_us" in row]
    single = {tuple(row[axis] for axis in axes): row for row in rows if row["width"] == 1}
    for row in rows:
        if row["width"] == 16:
            one = single.get(tuple(row[axis] for axis in axes), {"commit": None})
            beside = f"{row['step_us'] / one['step_us']:.2f}x T = 1, " if one.get("commit", "") == row.get(
                "commit", "") else ""  # fmt: skip
            yield (
                f"a step of {row['preset']}, {thousands(row['context'])}, batch {row['batch']}, T = 16",
                f"{row['step_us'] / 1e3:.2f} ms, {beside}{row['of_floor']:.2f} of the floor",
                row.get("commit", ""),
            )


def dense_decode(result: Result) -> Lines:
    rows = [row for row in result["rows"] if "tokens_per_second" in row]
    for context, batch in dict.fromkeys((row["context"], row["batch"]) for row in rows):
        mine = [row for row in rows if (row["context"], row["batch"]) == (context, batch)]
        best = max(mine, key=lambda row: row["tokens_per_second"])
        yield (
            f"dense attention, shape of {called(result['model'])}, {thousands(context)}, batch {batch}",
            f"{best['tokens_per_second']:.0f} tokens/s ({best['implementation']})",
        )


GRAPHS = {"on": "in CUDA graphs", "kernels": "kernels alone in CUDA graphs", "off": "without CUDA graphs"}


def overhead(result: Result) -> Lines:
    for row in result["rows"]:
        if "overhead" in row:
            yield (
                f"loop of {called(row['model'])}, {row['case']}, {GRAPHS[row['command_buffers']]}",
                f"step {row['step_us']:.0f} µs, {1 + row['overhead']:.2f} of the sum of its kernels, "
                f"{row['launches']:.0f} launches",
                row.get("commit", ""),
            )  # fmt: skip


def memory(result: Result) -> Lines:
    for row in result["rows"]:
        if row["kind"] == "longest":
            ran = f", a step takes {row['step_us'] / 1e3:.1f} ms" if "step_us" in row else " (computed)"
            yield (
                f"longest context, {row['preset']}, batch 1, {row['memory'] / 1e9:.0f} GB",
                f"{row['longest_context']:,} tokens{ran}",
            )


# By the script that wrote the file, in the table's order.
TABLES: dict[str, Callable[[Result], Lines]] = {
    "train_target": train_target, "end_to_end": end_to_end, "dense_decode": dense_decode, "held_out": held_out,
    "planner": planner, "strict": strict, "held_out_bounds": held_out_bounds,
    "acceptance": acceptance, "shapes": shapes, "overhead": overhead,
    "memory": memory, "refresh_reuse": refresh_reuse, "verify_layer": verify_layer, "selection": selection,
    "compress": compress, "prefill": prefill,
}  # fmt: skip


def table(results: Path = RESULTS) -> str:
    """Markdown: a row a figure, with device, commit and file. Searches for a kernel's config (--tune) have none."""
    lines = ["| measured | result | device, commit | file |", "| --- | --- | --- | --- |"]
    files = {file: json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.rglob("*.json"))}
    for script, rows_of in TABLES.items():
        for file, result in files.items():
            if script_of(result) != script or "--tune" in result["command"]:
                continue
            device = result["device"] if result["device"] != "cpu" else f"{result['cpus']} CPU cores"
            where = file.relative_to(results.parents[1]).as_posix()
            for measured, found, *own in rows_of(result):
                commit = "".join(own) or result["commit"]
                lines.append(f"| {measured} | {found} | {device}, {commit} | [`{file.name}`]({where}) |")
    return "\n".join(lines)


def end_to_end_table(results: Path = RESULTS) -> str:
    """Markdown: every point of the GPUs' ``end_to_end.json``, a column a workload; speed-ups over decoding one token at
    a time in class exact, of the best fixed strategy and of the planner."""
    lines = [
        "| class | sampling | batch | context | edit | code | prose |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for file in sorted(results.glob("nvidia-*/end_to_end.json")):
        rows = [row for row in json.loads(file.read_text(encoding="utf-8"))["rows"] if "speedup" in row]
        axes = ("precision", "temperature", "batch", "context")
        for point in sorted({tuple(row[axis] for axis in axes) for row in rows}):
            here = [row for row in rows if tuple(row[axis] for axis in axes) == point]
            cells = [
                _cell([row for row in here if row["workload"] == workload]) for workload in ("edit", "code", "prose")
            ]
            precision, temperature, batch, context = point
            sampling = "greedy" if temperature == 0 else f"temperature {temperature}"
            lines.append(f"| {precision} | {sampling} | {batch} | {thousands(context)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ablations_table(results: Path = RESULTS) -> str:
    """Markdown: every case of the GPUs' ``ablations.json``: tokens a second and times decoding one token at a time."""
    lines = ["| what changes | case | edit | code | commit |", "| --- | --- | --- | --- | --- |"]
    for file in sorted(results.glob("nvidia-*/ablations.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in result["rows"] if "speedup" in row]
        for which, case in dict.fromkeys((row["set"], row["case"]) for row in rows):
            mine = {row["workload"]: row for row in rows if (row["set"], row["case"]) == (which, case)}
            cells = [
                f"{mine[name]['tokens_per_second']:,.0f}, {mine[name]['speedup']:.2f}x" if name in mine else "-"
                for name in ("edit", "code")
            ]
            commit = next(iter(mine.values())).get("commit", result["commit"])
            lines.append(f"| {which} | {case} | {' | '.join(cells)} | {commit} |")
    return "\n".join(lines)


def commits_table(results: Path = RESULTS) -> str:
    """Markdown: at which commits the rows of each of the H200's files were measured."""
    lines = ["| file | rows by commit |", "| --- | --- |"]
    for file in sorted(results.glob("nvidia-h200/*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        counts = collections.Counter(row.get("commit", result["commit"]) for row in result["rows"])
        rows = ", ".join(f"{count} {commit}" for commit, count in counts.most_common()) or result["commit"]
        lines.append(f"| `{file.name}` | {rows} |")
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    """A point's and workload's figures; without drafts its own class may have another speed than class exact."""
    plain, planned = ([row["speedup"] for row in rows if row["strategy"] == name] for name in ("none", "auto"))
    fixed = [row for row in rows if row["strategy"] not in ("none", "auto")]
    words = [f"{plain[0]:.2f} without drafts"] if plain and rows[0]["precision"] != "exact" else []
    if fixed:
        best = max(fixed, key=lambda row: row["speedup"])
        words.append(f"{best['speedup']:.2f} ({best['strategy'].replace('@', ' ')})")
    return ", ".join(words + [f"planner {speed:.2f}" for speed in planned])


def replaced(text: str, new: str, begin: str = BEGIN) -> str:
    """A document's ``text`` with the ``new`` table behind the marker ``begin``. SystemExit where it lacks a marker."""
    before, first, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not first or not end:
        raise SystemExit(f"got no pair of markers, expected {begin} and {END}")
    return f"{before}{begin}\n{new}\n{END}{after}"


PERFORMANCE = "docs/performance.md"
# Where each table is: document, table, marker.
DOCUMENTS: tuple[tuple[str, Callable[[], str], str], ...] = (
    ("README.md", table, BEGIN), (PERFORMANCE, end_to_end_table, POINTS),
    (PERFORMANCE, ablations_table, MECHANISMS), (PERFORMANCE, commits_table, COMMITS),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a table is another one")
    args = parser.parse_args()
    for name, new_table, begin in DOCUMENTS:
        document = ROOT / name
        old = document.read_text(encoding="utf-8")
        new = replaced(old, new_table(), begin)
        if args.check and new != old:
            raise SystemExit(
                f"{name}: its table is not that of the result files; run python benchmarks/readme_table.py"
            )
        if new != old:
            part = document.with_suffix(".part")
            part.write_text(new, encoding="utf-8")
            os.replace(part, document)


if __name__ == "__main__":
    main()
