"""What a run leaves for people: the log file, the loss plot, the progress display."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Record = dict[str, Any]
Listener = Callable[[Record], None]


class Log:
    """``log.jsonl``: one JSON object a step (step, loss, learning_rate, tokens_per_second, held_out_loss if measured).

    Steps count from 1 here: record n is written once n optimiser steps are done.
    """

    def __init__(self, file: Path, first_step: int):
        """Opens the log of a run that goes on after ``first_step`` steps; what a lost run wrote beyond is dropped."""
        self.records = [r for r in read_log(file) if r["step"] <= first_step]
        self._out = file.open("w", encoding="utf-8")
        self._rewrite()

    def _rewrite(self) -> None:
        self._out.seek(0)
        self._out.truncate()
        self._out.writelines(json.dumps(record) + "\n" for record in self.records)
        self._out.flush()

    def amend(self, **values: float) -> None:
        """Adds fields to the last record, if there is one."""
        if self.records:
            self.records[-1].update(values)
            self._rewrite()

    def write(self, record: Record) -> None:
        self.records.append(record)
        self._out.write(json.dumps(record) + "\n")
        self._out.flush()

    def close(self) -> None:
        self._out.close()


def read_log(file: Path) -> list[Record]:
    """The records of a log; none for a file that does not exist. A last line cut short by a kill is dropped."""
    records = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def plot(records: list[Record], file: Path, title: str) -> None:
    """Training and held-out loss over steps, as a PNG."""
    from matplotlib.figure import Figure  # a slow import, needed once

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], lw=0.7, alpha=0.7, label="training")
    held = [r for r in records if "held_out_loss" in r]
    axes.plot([r["step"] for r in held], [r["held_out_loss"] for r in held], lw=2, marker=".", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats / token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def plot_draft(records: list[Record], file: Path, title: str, chain: int) -> None:
    """A draft head's losses, and the acceptance length that its matches predict, over steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    held = [r for r in records if "acceptance_length" in r]
    steps, at = [r["step"] for r in records], [r["step"] for r in held]
    above.plot(steps, [r["loss"] for r in records], lw=0.7, alpha=0.7, label="training")
    above.plot(at, [r["held_out_loss"] for r in held], lw=2, marker=".", label="held out, the target's own text")
    above.set(ylabel="KL (nats / token)", title=title)
    below.plot(at, [r["acceptance_length"] for r in held], lw=2, marker=".", color="tab:green")
    below.set(xlabel="step", ylabel=f"tokens a step, chain:{chain}")
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


class Display:
    """A rich progress bar that listens to a run. Use as a context manager; call with each record."""

    def __init__(self, console: Console, steps: int):
        self.console = console
        self._progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("training", total=steps, text="")
        self._held_out = ""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def __call__(self, record: Record) -> None:
        self._progress.start()  # not before the first record: a run that is refused shows one line
        if "message" in record:
            self.console.print(record["message"], highlight=False, markup=False)
            return
        if "held_out_loss" in record:
            self._held_out = f"  held-out {record['held_out_loss']:.3f}"
            accepted = ""
            if "acceptance_length" in record:
                self._held_out += f"  accepted {record['acceptance_length']:.2f}"
                accepted = f"acceptance length {record['acceptance_length']:.3f}, "
            if not self.console.is_terminal:  # no live bar in a pipe or a log: a line at each evaluation
                self.console.print(
                    f"step {record['step']}: loss {record['loss']:.4f}, held-out loss {record['held_out_loss']:.4f}, "
                    f"{accepted}{record['tokens_per_second']:,.0f} tokens/s", highlight=False,
                )  # fmt: skip
        text = f"loss {record['loss']:.3f}{self._held_out}  {record['tokens_per_second']:,.0f} tokens/s"
        self._progress.update(self._task, completed=record["step"], text=text)
