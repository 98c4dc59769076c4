"""Draws result files: each one's picture goes beside it. From the files alone; nothing is measured.

python benchmarks/plots.py                                   # all under benchmarks/results
python benchmarks/plots.py benchmarks/results/nvidia-h100    # a folder, or files
"""

from __future__ import annotations

import argparse
import collections
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot, ticker

RESULTS = Path(__file__).parent / "results"
Result = dict[str, Any]


def title(result: Result, text: str, figure: pyplot.Figure) -> str:
    """What is drawn, of what and by which command (of several the first), in lines that fit the figure."""
    command, more, _ = result["command"].partition("; ")
    return textwrap.fill(
        f"{text}: {result['device']}, commit {result['commit']}, {command}{' and other runs' if more else ''}",
        int(13 * figure.get_figwidth()),
    )


def middle(bars: int) -> float:
    """Of a group of ``bars`` bars, each as wide as 1 of their number and one."""
    return (bars - 1) / 2 / (bars + 1)


def acceptance(result: Result, path: Path) -> None:
    """Above, tokens a step by tree; below, acceptance by position in the longest chain."""
    rows = result["rows"]
    sets, drafters, trees = ([*dict.fromkeys(row[name] for row in rows)] for name in ("prompts", "drafter", "tree"))
    longest = max((tree for tree in trees if tree.startswith("chain")), key=lambda tree: int(tree.split(":")[1]))
    figure, axes = pyplot.subplots(2, len(sets), figsize=(5.5 * len(sets), 7), sharey="row", squeeze=False)
    for column, name in enumerate(sets):
        for place, drafter in enumerate(drafters):
            mine = {row["tree"]: row for row in rows if row["prompts"] == name and row["drafter"] == drafter}
            at = [index + place / (len(drafters) + 1) for index in range(len(trees))]
            lengths = [mine[tree]["mean_acceptance_length"] for tree in trees]
            axes[0][column].bar(at, lengths, 1 / (len(drafters) + 1), label=drafter)
            rates = mine[longest]["acceptance_per_position"]
            axes[1][column].plot(range(1, len(rates) + 1), rates, marker="o", label=drafter)
        axes[0][column].set_title(name)
        axes[0][column].set_xticks([index + middle(len(drafters)) for index in range(len(trees))], trees)
        axes[1][column].set_xlabel(f"drafted token of {longest}")
    axes[0][0].set_ylabel("tokens a step")
    axes[1][0].set_ylabel("accepted, of the steps that drafted it")
    axes[0][0].legend()
    write(figure, path, dpi=110)


def refresh_reuse(result: Result, path: Path) -> None:
    """Step time and divergence against the number of refresh layers."""
    rows = result["rows"]
    has_kl = any("mean KL" in row for row in rows)
    figure, axes = pyplot.subplots(1, 1 + has_kl, figsize=(5 * (1 + has_kl), 4), squeeze=False)
    panels = [(axes[0, 0], "step, µs", "step, µs", False)]
    if has_kl:
        panels.append((axes[0, 1], "mean KL", "mean KL to all-refresh, nats", True))
    kinds = sorted({(row["schedules"], row["compressed"]) for row in rows if row["schedules"] != "all refresh"})
    for axis, name, label, logarithmic in panels:
        for kind in kinds:
            points = [row for row in rows if (row["schedules"], row["compressed"]) == kind and name in row]
            if not logarithmic:
                points = [row for row in rows if row["schedules"] == "all refresh"] + points
            if points:
                axis.plot([row["refresh"] for row in points], [row[name] for row in points], "o-",
                          label=f"{kind[0]}, compressed output {kind[1]}")  # fmt: skip
        axis.set_xlabel("refresh layers")
        axis.set_xticks(sorted({row["refresh"] for row in rows}))
        axis.set_ylabel(label)
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.1 * max(row[name] for row in rows))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    shape = f"context {result['context']}, batch {result['batch']}, T = {result['width']}"
    figure.suptitle(f"{result['model']}, {shape}, {result['device']}", fontsize=10)
    write(figure, path, dpi=120)


def end_to_end(result: Result, path: Path) -> None:
    """Speed-up over decoding one token at a time, by workload, context and batch; a panel a class and temperature."""
    rows = [row for row in result["rows"] if "speedup" in row and row["strategy"] != "none"]
    if not rows:
        return
    panels = list(dict.fromkeys((row["precision"], row["temperature"]) for row in rows))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(11, 3.2 * len(panels)), squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        mine = [row for row in rows if (row["precision"], row["temperature"]) == panel]
        strategies = list(dict.fromkeys(row["strategy"] for row in mine))
        groups = list(dict.fromkeys((row["workload"], row["context"], row["batch"]) for row in mine))
        groups.sort(key=lambda group: (group[2], -group[1]))  # workloads as they come
        for place, strategy in enumerate(strategies):
            found = [(groups.index((row["workload"], row["context"], row["batch"])), row["speedup"])
                     for row in mine if row["strategy"] == strategy]  # fmt: skip
            axis.bar([at + place / (len(strategies) + 1) for at, _ in found], [value for _, value in found],
                     1 / (len(strategies) + 1), label=strategy)  # fmt: skip
        axis.axhline(1, color="black", linewidth=0.8)
        names = [f"{workload}\n{context}\nbatch {batch}" for workload, context, batch in groups]
        axis.set_xticks([index + middle(len(strategies)) for index in range(len(groups))], names,
                        fontsize=7 if len(groups) < 16 else 5)  # fmt: skip
        axis.set_ylabel("times as fast")
        axis.set_title(f"class {panel[0]}, temperature {panel[1]:g}", fontsize=9)
        axis.legend(fontsize=7)
    checkpoint = result.get("checkpoint", result.get("measured_by", {}).get("checkpoint"))
    figure.suptitle(title(result, f"decoding against one token at a time: {checkpoint}", figure), fontsize=9)
    write(figure, path, dpi=110)


def shapes(result: Result, path: Path) -> None:
    """Above: step time against T. Below: what a mean acceptance length would gain, from these step times alone."""
    rows = [row for row in result["rows"] if "step_us" in row]
    series = collections.defaultdict(dict)
    for row in rows:
        series[row["preset"], row["context"], row["batch"]][row["width"]] = row["step_us"]
    presets = list(dict.fromkeys(preset for preset, _, _ in series))
    if not presets:
        return
    figure, axes = pyplot.subplots(2, len(presets), figsize=(9.0 * len(presets), 8.5), squeeze=False)
    lengths = measured_lengths(path.parent)
    for column, preset in enumerate(presets):
        above, below = axes[0][column], axes[1][column]
        for (name, context, batch), times in series.items():
            if name != preset:
                continue
            widths = sorted(times)
            label = f"context {context}, batch {batch}"
            above.plot(widths, [times[width] / 1e3 for width in widths], "o-", label=label)
            if 1 in times:
                for width in widths[1:]:
                    # A step gives at least one token and at most T.
                    below.plot([1, width], [times[1] / times[width], width * times[1] / times[width]],
                               label=f"{label}, T = {width}")  # fmt: skip
        for number, (name, length) in enumerate(lengths, 1):
            below.axvline(length, color="gray", linewidth=0.7, linestyle=":", label=f"{number}: {length:.2f}, {name}")
            # On three levels, since lengths lie side by side.
            below.text(length, 0.02 + 0.05 * (number % 3), f" {number}", fontsize=7, color="gray",
                       transform=below.get_xaxis_transform())  # fmt: skip
        above.set_xlabel("T, tokens that a step verifies")
        above.set_ylabel("step, ms")
        above.set_ylim(0, 1.1e-3 * max(time for (name, *_), times in series.items() if name == preset
                                       for time in times.values()))  # fmt: skip
        above.set_title(f"{preset}, random weights")
        above.legend(fontsize=7, loc="upper left")
        below.set_xlabel("mean acceptance length (numbered: measured, on other models, as named)", fontsize=8)
        below.set_ylabel("times as fast as T = 1\nby step times alone: drafting is free here")
        below.axhline(1, color="black", linewidth=0.8)
        below.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.01, 0.5))
        for axis, which in ((above, "x"), (below, "xy")):
            for name in which:
                getattr(axis, f"set_{name}scale")("log", base=2)
                getattr(axis, f"{name}axis").set_major_formatter(ticker.ScalarFormatter())
    figure.suptitle(
        title(result, "step times of random weights, and what acceptance makes of them", figure), fontsize=9
    )
    write(figure, path, dpi=110)
    kernels(result, path.with_name(f"{path.stem}_kernels.png"))


def measured_lengths(folder: Path) -> list[tuple[str, float]]:
    """(of what, mean acceptance length) of the embedded model's drafters, and of models that ran end to end there: of
    each workload the longest by a fixed strategy, greedy, at batch 1 and the longest context."""
    found = []
    for row in harness.read(RESULTS / "cpu" / "acceptance.json")["rows"]:
        if row["prompts"] == "held-out" and row["tree"] == "chain:4" and row["drafter"] != "self":
            found.append((f"embedded, {row['drafter']} {row['tree']}", row["mean_acceptance_length"]))
    for file in (folder / f"{name}.json" for name in ("end_to_end", "train_target")):
        rows = harness.read(file)["rows"] if file.exists() else []
        best: dict[str, Result] = {}
        for row in rows:
            point = row["precision"], row["temperature"], row["batch"]
            if point != ("exact", 0, 1) or row["strategy"] in ("none", "auto") or "mean_acceptance_length" not in row:
                continue

            def rank(one: Result) -> tuple[int, float]:
                return one["context"], one["mean_acceptance_length"]

            best[row["workload"]] = max(best.get(row["workload"], row), row, key=rank)
        found += [(f"{file.stem}, {row['workload']} {row['context']}, {row['strategy']}", row["mean_acceptance_length"])
                  for row in best.values()]  # fmt: skip
    return found


def kernel_class(name: str) -> str:
    """What a kernel's name says of its work."""
    if name.startswith(("nsa_", "commit")) or name == "others":
        return name.split(".")[0]
    if any(part in name.lower() for part in ("gemm", "nvjet", "cutlass", "cublas", "xmma", "dot")):
        return "matrix products"
    return "copies" if "memcpy" in name.lower() or "memset" in name.lower() else "XLA's other kernels"


def kernels(result: Result, path: Path) -> None:
    """Of each row with kernels a bar: what its step is made of, beside the step's time and the floor."""
    rows = [row for row in result["rows"] if row.get("kernels")]
    if not rows:
        return
    rows.sort(key=lambda row: (row["preset"], row["context"], row["batch"], row["width"]))
    parts = []
    for row in rows:
        sums: collections.Counter[str] = collections.Counter()
        for name, time in row["kernels"].items():
            sums[kernel_class(name)] += time
        parts.append(sums)
    names = sorted({name for sums in parts for name in sums}, key=lambda name: -sum(sums[name] for sums in parts))
    figure, axis = pyplot.subplots(figsize=(10, 0.4 * len(rows) + 2))
    left = [0.0] * len(rows)
    for place, name in enumerate(names):
        values = [sums[name] / 1e3 for sums in parts]
        axis.barh(range(len(rows)), values, left=left, label=name, color=pyplot.get_cmap("tab20")(place % 20))
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.plot([row["step_us"] / 1e3 for row in rows], range(len(rows)), "k|", markersize=12, label="step")
    axis.plot([row["floor_us"] / 1e3 for row in rows], range(len(rows)), "r|", markersize=12, label="floor")
    axis.set_yticks(range(len(rows)), [f"{row['preset']}, {row['context']}, batch {row['batch']}, T = {row['width']}"
                                       for row in rows], fontsize=7)  # fmt: skip
    axis.invert_yaxis()
    axis.set_xlabel("ms")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_title(title(result, "kernels of a step", figure), fontsize=8)
    write(figure, path, dpi=110)


def overhead(result: Result, path: Path) -> None:
    """The trace of about one step of each row, as a timeline: a line a stream, a colour a kind of kernel."""
    rows = [row for row in result["rows"] if row.get("timeline")]
    if not rows:
        return
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(14, 1.6 * len(rows) + 1), squeeze=False)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        events = [line.split("\t") for line in row["timeline"]]
        streams = sorted({stream for _, _, stream, _ in events})
        kinds = sorted({kernel_class(name) for *_, name in events})
        for place, kind in enumerate(kinds):
            for level, stream in enumerate(streams):
                bars = [(float(start), float(duration)) for start, duration, where, name in events
                        if where == stream and kernel_class(name) == kind]  # fmt: skip
                axis.broken_barh(bars, (level - 0.4, 0.8), facecolors=pyplot.get_cmap("tab10")(place % 10),
                                 label=kind if level == 0 else None)  # fmt: skip
        axis.axvline(row["step_us"], color="black", linewidth=0.8)
        axis.set_yticks(range(len(streams)), streams, fontsize=6)
        axis.set_title(f"{row['model']}, {row['case']}, context {row['context']}, "
                       f"CUDA graphs {row['command_buffers']}: "
                       f"step {row['step_us']:.0f} µs (line), kernels {row['kernel_us']:.0f} µs in "
                       f"{row['launches']:.0f} launches", fontsize=8)  # fmt: skip
        axis.legend(fontsize=6, loc="upper right")
    axes[-1, 0].set_xlabel("µs")
    figure.suptitle(title(result, "about one step of the trace", figure), fontsize=9)
    write(figure, path, dpi=130)


def ablations(result: Result, path: Path) -> None:
    """Speed-up over decoding one token at a time, a panel a set of cases."""
    rows = [row for row in result["rows"] if "speedup" in row and row["set"] != "baseline"]
    if not rows:
        return
    sets = list(dict.fromkeys(row["set"] for row in rows))
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    counts = [len({row["case"] for row in rows if row["set"] == name}) for name in sets]
    figure, axes = pyplot.subplots(len(sets), 1, figsize=(9, 0.45 * sum(counts) + 1.3 * len(sets)), squeeze=False,
                                   gridspec_kw={"height_ratios": [count + 1 for count in counts]},
                                   sharex=True)  # fmt: skip
    for axis, name in zip(axes[:, 0], sets, strict=True):
        cases = list(dict.fromkeys(row["case"] for row in rows if row["set"] == name))
        for place, workload in enumerate(workloads):
            found = [(cases.index(row["case"]), row["speedup"]) for row in rows
                     if row["set"] == name and row["workload"] == workload]  # fmt: skip
            axis.barh([at + place / (len(workloads) + 1) for at, _ in found], [value for _, value in found],
                      1 / (len(workloads) + 1), label=workload)  # fmt: skip
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks([index + middle(len(workloads)) for index in range(len(cases))], cases, fontsize=7)
        axis.invert_yaxis()
        notes = {row["note"] for row in rows if row["set"] == name and row.get("note")}
        axis.set_title(f"{name}{' (' + '; '.join(sorted(notes)) + ')' if notes else ''}", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    axes[-1, 0].set_xlabel("times as fast as one token at a time in class exact")
    shape = f"{result['checkpoint']}, context {result['context']}, batch {result['batch']}"
    figure.suptitle(title(result, f"ablations: {shape}", figure), fontsize=9)
    write(figure, path, dpi=110)


def planner(result: Result, path: Path) -> None:
    """For each cell: the fixed strategies as dots, the planner as a bar."""
    rows, axes, default = result["rows"], ("workload", "context", "batch", "temperature"), "lookup chain:4"
    # The default comes second of a cell's rows: without it, a run was cut off there.
    keys = list(dict.fromkeys(tuple(row[axis] for axis in axes) for row in rows if row["strategy"] == default))
    figure, axis = pyplot.subplots(figsize=(1.2 * len(keys) + 3, 4.5))
    for place, key in enumerate(keys):
        mine = {row["strategy"]: row["tokens_per_second"] for row in rows if tuple(row[a] for a in axes) == key}
        base = mine[default]
        axis.bar(place, mine["planner"] / base, color="tab:blue", label=None if place else "planner")
        others = [speed / base for name, speed in mine.items() if name != "planner"]
        axis.plot([place] * len(others), others, "o", color="black", alpha=0.5, ms=4,
                  label=None if place else "each fixed strategy")  # fmt: skip
    axis.axhline(1.0, color="gray", lw=0.8)
    axis.set_xticks(range(len(keys)), [f"{w}\n{c} tokens\nbatch {b}, T={t:g}" for w, c, b, t in keys], fontsize=7)
    axis.set_ylabel(f"tokens/s, of {default}'s")
    axis.legend()
    axis.set_title(title(result, f"the planner, {result['checkpoint']}", figure), fontsize=8)
    write(figure, path, dpi=110)


def write(figure: pyplot.Figure, path: Path, dpi: int) -> None:
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=dpi)
    pyplot.close(figure)


# By the script that wrote the file.
PLOTS: dict[str, Callable[[Result, Path], None]] = {
    "acceptance": acceptance, "refresh_reuse": refresh_reuse, "end_to_end": end_to_end, "train_target": end_to_end,
    "shapes": shapes, "overhead": overhead, "ablations": ablations, "planner": planner,
}  # fmt: skip


def draw(file: Path, path: Path | None = None) -> bool:
    """Draws a result file to ``path``, by default beside it; False where its kind has no picture. Raises ValueError for
    another file."""
    result = harness.read(file)
    plot = PLOTS.get(script_of(result))
    if plot is not None:
        plot(result, path or file.with_suffix(".png"))
    return plot is not None


def script_of(result: Result) -> str:
    """The name of the script that wrote a result, from its command line."""
    return Path(result["command"].split()[0]).stem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, default=[RESULTS], help="result files and folders of them")
    for path in parser.parse_args().paths:
        if not path.exists():
            raise ValueError(f"paths: got {path}, expected an existing file or folder")
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            if draw(file):
                print(file.with_suffix(".png"))


if __name__ == "__main__":
    harness.run(main)
