"""What every training loop needs around its steps: saved states, a meter, signals."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specsa_jax.checkpoints import store
from specsa_jax.training.config import TrainingError

# The host runs ahead of the device by this many steps before it reads a loss.
LAG = 8


class States:
    """``state/{step}/`` in a run's directory: trees of arrays to go on from, the newest ``keep`` of them."""

    def __init__(self, out: Path, keep: int):
        self.out, self.keep = out, keep

    def path(self, number: int) -> Path:
        return self.out / "state" / str(number)

    def steps(self) -> list[int]:
        """Steps of the whole saved states; Orbax writes under another name and renames."""
        return sorted(int(p.name) for p in (self.out / "state").glob("*") if p.name.isdecimal())

    def save(self, number: int, state: Any) -> None:
        store.write_tree(self.path(number), state)
        kept = {self.path(number) for number in self.steps()[-self.keep :]}
        for old in set((self.out / "state").iterdir()) - kept:  # older states, and what a kill left half written
            shutil.rmtree(old)

    def resumed(self, resume: bool, result: Path) -> int:
        """The step to go on after; 0 for a fresh run. Raises TrainingError, also where ``result`` exists."""
        saved = self.steps()
        if resume:
            if not saved:
                raise TrainingError(f"resume: {self.out} holds no saved state to go on from")
            return saved[-1]
        if saved or result.exists():
            raise TrainingError(f"output: {self.out} holds a run; go on with --resume, or choose another directory")
        return 0


def check_identity(out: Path, identity: dict[str, Any]) -> None:
    """Raises TrainingError where the run in ``out`` was begun with other options (``train``) or parts than these."""
    before = json.loads((out / "run.json").read_text(encoding="utf-8"))
    changed = [
        f"{name}: was {before['train'].get(name)!r}, now {value!r}"
        for name, value in identity["train"].items()
        if before["train"].get(name) != value
    ]
    changed += [f"the {name} changed" for name in identity if name != "train" and before[name] != identity[name]]
    if changed:
        raise TrainingError(f"resume: {out} is another run: " + "; ".join(changed))


class Meter:
    """Tokens a second, with pauses (compilation, evaluation, saving) left out."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._mark = time.monotonic()
        self._recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=20)

    def restart(self) -> None:
        """What came before does not count."""
        self._mark = time.monotonic()

    def add(self, tokens: int) -> float:
        """Counts a step that has just been seen to end; the rate over the last steps, 0.0 before the first."""
        now = time.monotonic()
        if tokens:
            self.tokens, self.seconds = self.tokens + tokens, self.seconds + now - self._mark
            self._recent.append((tokens, now - self._mark))
        self._mark = now
        seconds = sum(s for _, s in self._recent)
        return round(sum(t for t, _ in self._recent) / seconds, 1) if seconds else 0.0

    def overall(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@contextlib.contextmanager
def signals() -> Iterator[list[str]]:
    """Yields a list that gets the name of a SIGINT or SIGTERM; a second one acts as usual."""
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():  # Python lets only the main thread handle signals
        yield received
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_writable(directory: Path) -> None:
    """Makes the directory; raises TrainingError where it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise TrainingError(f"output: {directory}: cannot be written: {os.strerror(error.errno or 0)}") from error
