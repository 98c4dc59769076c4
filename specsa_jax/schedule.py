"""Which layers and which queries take another's selected blocks: refresh/reuse schedules, and shared-index grouping.

Both are approximations (arXiv 2605.19893): their divergence is measured (:mod:`specsa_jax.precision`).
"""

from __future__ import annotations

import dataclasses

from pallas_kernels.attention.config import GroupMode


def check_schedule(text: str) -> None:
    """Raises ValueError unless ``text`` reads as a schedule of some model: :func:`parse_schedule` lists the forms."""
    if not isinstance(text, str):
        raise ValueError(f"schedule: got {text!r}, expected a text, such as 'FSSFSS' or 'every:3'")
    kind, colon, number = text.partition(":")
    if text == "all":
        return
    if colon and kind in ("every", "searched"):
        if not number.isascii() or not number.isdecimal() or int(number) < 1:
            raise ValueError(f"schedule: got {text!r}, expected a number of at least 1 behind {kind}:")
        return
    if not text or colon or set(text) - {"F", "S"}:
        raise ValueError(
            f"schedule: got {text!r}, expected a letter a layer, F (refresh) or S (reuse), or all, every:K, searched:K"
        )
    if text[0] != "F":
        raise ValueError(f"schedule: got {text!r}, expected F first: the first layer has nothing below to take from")


def parse_schedule(text: str, layers: int) -> str:
    """A schedule as one letter a layer: ``F``, a refresh layer, selects blocks itself; ``S``, a reuse layer, takes
    those of the nearest refresh layer below for the same query.

    Args:
      text: such letters; ``all``: every layer refreshes; ``every:K``: layers 0, K, 2·K, … do.
      layers: of the model.

    Raises ValueError for a text that is none, and for one of another length than ``layers``. ``searched:K`` is stored
    with a checkpoint, so the engine alone can resolve it: ValueError here.
    """
    check_schedule(text)
    kind, _, number = text.partition(":")
    if kind == "searched":
        raise ValueError(f"schedule: got {text!r}, which only an engine with a checkpoint can resolve")
    if kind in ("all", "every"):
        step = int(number or 1)
        return "".join("S" if layer % step else "F" for layer in range(layers))
    if len(text) != layers:
        raise ValueError(f"schedule: got {text!r}, {len(text)} layers, expected the model's {layers}")
    return text


def uniform_schedule(layers: int, refresh: int) -> str:
    """``refresh`` refresh layers spread evenly over ``layers``. Raises ValueError unless 1 ≤ refresh ≤ layers."""
    if not 1 <= refresh <= layers:
        raise ValueError(f"refresh: got {refresh}, expected 1 to {layers}, the model's layers")
    chosen = {i * layers // refresh for i in range(refresh)}
    return "".join("F" if layer in chosen else "S" for layer in range(layers))


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Who takes whose selection in one model's verification: static, the canonical form of a strategy's choices.

    Attributes:
      schedule: a letter a layer (:func:`parse_schedule`); "": all refresh.
      keep_compressed: reuse layers keep the output of their compressed branch.
      group, group_mode: C adjacent queries are served as a group (0: as the kernels like it). ``merged``: each attends
        to the blocks that it selected. ``shared``: all to those of the group's query with the longest prefix.

    Raises ValueError for a schedule of other letters, and for a group below 0: files hold them, too.
    """

    schedule: str = ""
    keep_compressed: bool = True
    group: int = 0
    group_mode: GroupMode = "merged"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str) or self.schedule.strip("FS") or self.schedule.startswith("S"):
            raise ValueError(f"schedule: got {self.schedule!r}, expected a letter a layer, F or S, F first")
        if not isinstance(self.group, int) or self.group < 0:
            raise ValueError(f"group: got {self.group!r}, expected an integer of at least 0")
        if "S" not in self.schedule:  # one form for one meaning: what is compiled and measured is found by it
            object.__setattr__(self, "schedule", "")
            object.__setattr__(self, "keep_compressed", True)

    @property
    def approximates(self) -> bool:
        """Whether some query attends to blocks that it did not select."""
        return bool(self.schedule) or self.group_mode == "shared"

    def describe(self) -> str:
        """In words; "all refresh" for none."""
        words = [self.schedule] if self.schedule else ["all refresh"]
        if not self.keep_compressed:
            words.append("compressed output dropped")
        if self.group_mode == "shared":
            words.append(f"shared by {self.group}")
        return ", ".join(words)
