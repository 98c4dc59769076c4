"""Which approximate strategies a user's bound admits: those whose measured divergence is inside it, and no other.

Measured is what was measured in the dtype that the engine computes in: rounding differs between dtypes, and with it
which blocks are selected.
"""

from __future__ import annotations

import dataclasses
import math

from specsa_jax.checkpoints.records import Measurement, Records
from specsa_jax.schedule import Sharing
from specsa_jax.strategy import Strategy


class PrecisionError(ValueError):
    """An approximate strategy that the bound does not admit; the message lists the nearest that it does."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """How far next-token distributions may be from those of class exact; both must hold where both are given.

    Attributes:
      max_kl: of the mean KL divergence, nats; ``inf``: whatever it is, measured or not.
      min_top1: of the fraction of tokens after which the most probable next token is the same.

    A strategy is inside if the confidence bound of its measurement is, at each context length measured.

    Raises ValueError for bounds that nothing or no number can meet.
    """

    max_kl: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        for name, value, highest in (("max_kl", self.max_kl, math.inf), ("min_top1", self.min_top1, 1.0)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= highest):
                wanted = "a number of nats, at least 0" if name == "max_kl" else "a fraction from 0 to 1"
                raise ValueError(f"{name}: got {value!r}, expected {wanted}")

    @property
    def given(self) -> bool:
        return self.max_kl is not None or self.min_top1 is not None

    @property
    def finite(self) -> bool:
        """Whether there is something that it does not admit."""
        return self.given and (self.max_kl != math.inf or bool(self.min_top1))

    def admits(self, measured: Measurement) -> bool:
        """Whether the measurement is inside, whatever it speaks of (:func:`admitted`)."""
        inside = self.max_kl is None or measured.mean_kl <= self.max_kl
        return inside and (self.min_top1 is None or measured.top1 >= self.min_top1)

    def describe(self) -> str:
        words = [f"max_kl = {self.max_kl:g}"] if self.max_kl is not None else []
        return " and ".join(words + ([f"min_top1 = {self.min_top1:g}"] if self.min_top1 is not None else []))


def check_bound(strategy: Strategy, sharing: Sharing, bound: Bound) -> None:
    """What can be refused without a look at measurements. Raises ValueError for a bound outside class approx, for an
    approximation without a bound, and for what teacher-forced measurements cannot speak of."""
    if bound.given and strategy.precision != "approx":
        name = "max_kl" if bound.max_kl is not None else "min_top1"
        raise ValueError(
            f"{name}: got {getattr(bound, name)} in precision {strategy.precision!r}, which diverges by nothing, "
            "expected precision 'approx'"
        )
    if bound.finite and strategy.acceptance == "typical":
        raise ValueError(f"acceptance: got 'typical', whose divergence is not measured, with {bound.describe()}, "
                         "expected a lossless one, such as 'coupled'")  # fmt: skip
    if not sharing.approximates:
        return
    if not bound.given:
        raise ValueError(
            f"max_kl, min_top1: got neither for the approximate strategy {sharing.describe()}, expected a bound; "
            "max_kl=inf admits whatever it does"
        )
    if bound.finite and sharing.group_mode == "shared" and strategy.drafter and not strategy.template.is_chain:
        raise ValueError(f"group_mode: got 'shared' with tree {strategy.tree} and {bound.describe()}, expected a "
                         "chain: text alone measures no other tree's groups")  # fmt: skip


def admitted(records: Records, bound: Bound, dtype: str, reach: int) -> list[Measurement]:
    """The measurements by which an engine that computes in ``dtype`` may use their strategies within ``bound``, for
    contexts of up to ``reach`` tokens."""
    return [m for m in records.measurements if m.dtype == dtype and m.reach >= reach and bound.admits(m)]


def admit(records: Records, bound: Bound, dtype: str, sharing: Sharing, width: int, reach: int) -> None:
    """Checks a strategy that approximates against what was measured.

    Args:
      dtype: that the engine computes in.
      width: T, tokens that a step verifies.
      reach: the longest context that will be decoded, tokens.

    Raises PrecisionError for a strategy that is not measured, not in this dtype, not so far, or outside the bound; it
    lists those inside, the nearest to the bound first.
    """
    if not bound.finite:
        return
    inside, found = admitted(records, bound, dtype, reach), records.find(sharing, width)
    measured = found.get(dtype)
    if measured in inside:
        return
    name = sharing.describe()
    if sharing.group_mode == "shared":
        name += f", T = {width}"
    if measured is None:
        chain = f" --shared {sharing.group} --width {width}" if sharing.group_mode == "shared" else ""
        drop = "" if sharing.keep_compressed else " --drop-compressed"
        command = f"specsa precision CHECKPOINT --schedule {sharing.schedule or 'all'}{drop}{chain}"
        reason = f"is not measured for this model ({command})"
        if found:
            reason = f"is measured in {' and '.join(found)}, not in the engine's {dtype} ({command} measures anew)"
    elif not bound.admits(measured):
        reason = f"has {_figures(measured)}, outside {bound.describe()}"
    else:
        reason = f"is measured at contexts up to {measured.reach} tokens, and the request reaches {reach}"
    inside.sort(key=lambda m: m.top1 if bound.max_kl is None else -m.mean_kl)
    listed = [f"{m.describe()} ({_figures(m)})" for m in inside[:5]]
    raise PrecisionError(f"strategy: {name} {reason}; the nearest that can: {'; '.join([*listed, 'all refresh (0)'])}")


def _figures(measured: Measurement) -> str:
    return (f"mean KL <= {measured.mean_kl:.2g} and top-1 agreement >= {measured.top1:.4f} at "
            f"{measured.confidence:.0%} confidence")  # fmt: skip
