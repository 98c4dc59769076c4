"""Profiles, costs and counts that nobody measured, for tests."""

import numpy as np

from specsa_jax.checkpoints.records import AtContext, Measurement, Text
from specsa_jax.config import PRESETS
from specsa_jax.planning.costs import Costs
from specsa_jax.planning.profile import (
    DraftTime,
    Interpolation,
    Overlap,
    Point,
    PrefillTime,
    Prior,
    Profile,
    StepTime,
)
from specsa_jax.schedule import Sharing

CONFIG = PRESETS["embedded"]
RATES = {"bandwidth": 4e10, "flops": 1e11, "overhead": 1e-6}
HERE = {"fingerprint": "abc", "device": "cpu"}


def profile(**fields):
    same = {"versions": {"jax": "0"}, "dtype": "float32", "implementation": "xla", "max_context": 8192}
    return Profile(**{**HERE, **same, **RATES, **fields})


def timed(point, seconds):
    return StepTime(point, seconds, 0.9 * seconds, 1.2 * seconds)


def grid():
    return [Point(b, c, t) for b in (1, 8) for c in (512, 2048, 8192) for t in (1, 3, 5, 9, 17, 33)]


def counted(**changes):
    return Costs.from_bytes(CONFIG, "float32", **{**RATES, **changes})


def full_profile():
    """A profile with one of everything."""
    at = AtContext(512, 8, 512, 1.0, 0.1, 0.01, 0.2, 0.3, 0.9, 0.01, 0.8, 0.0, 0.01)
    text = Text("chance", 400, "00")
    sharing = Sharing("FSFSFS", False, 4, "shared")
    points = [*grid(), Point(1, 2048, 17, chain=False), Point(1, 2048, 5, sharing=sharing),
              Point(1, 8192, 5, precision="strict")]  # fmt: skip
    return profile(
        steps=tuple(timed(point, 1e-3 * point.batch * (5 + point.width)) for point in points),
        drafts=(DraftTime("lookup", "chain:4", 1, 2048, 1e-4), DraftTime("head", "best:16:6", 1, 2048, 2e-3)),
        prefills=(PrefillTime(1, 2048, 1.5),),
        priors=(Prior("lookup", "chain:2", "edit", 512, 10, (3, 0, 7), (5, 2, 3), 14),),
        overlaps=tuple(Overlap(layer, 2048, d, 0.9 - 0.1 * d, 0.5) for layer in range(6) for d in (1, 2)),
        measurements=(Measurement(sharing, 5, 0.95, "float32", text, (at,)),), text=text,
        interpolation=Interpolation(3, 0.01, 0.02, 0.03), seconds=12.5,
    )  # fmt: skip


class SlopeCosts:
    """A step takes 1 and ``slope`` for each drafted token; drafting nothing."""

    measured = True

    def __init__(self, slope):
        self.slope = slope

    def step(self, point):
        return 1.0 + self.slope * (point.width - 1)

    def draft(self, *args):
        return 0.0

    def watching(self, *args):
        return 0.0


def histogram(depth, lengths, draftless=0):
    drafted = np.zeros(depth + 1)
    drafted[depth], drafted[0] = len(lengths), draftless
    return drafted, np.bincount([*lengths, *[0] * draftless], minlength=depth + 1).astype(float)


def plan_depth(words):
    return int(words.rsplit(":", 1)[1])
