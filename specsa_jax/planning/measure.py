"""What ``specsa profile`` measures, in the order of what a planner needs most, until a budget is spent."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jaxlib

import specsa_jax
from pallas_kernels import UnsupportedError
from specsa_jax.cache import CapacityError
from specsa_jax.calibration import Calibration, CalibrationError
from specsa_jax.drafting import parse_tree
from specsa_jax.engine import Engine
from specsa_jax.planning.bench import TEXTS, Bench, Task
from specsa_jax.planning.costs import interpolation_error, measure_bandwidth
from specsa_jax.planning.profile import Profile
from specsa_jax.planning.space import DRAFTERS

BATCHES = (1, 8)
WIDTHS = (1, 5, 9, 17, 3, 33, 2, 6)  # most wanted first
CORNERS = (1, 5, 17)  # those at every batch and context
LONG = (33, 64)  # more of them with the kernels, by which a step of many tokens costs little more than one of few
GROUPS = (1, 2, 4, 8)
SCHEDULES = ("every:2", "every:3")  # beside those of the records
REACH = 16  # tokens of the chains that acceptance is measured on, at most
TOGETHER = 4  # programs that are compiled at a time, at most: what one compiles waits for the GPU that others tune on

# progress(number of tasks done, of all tasks, name of the next one)
Progress = Callable[[int, int, str], None]


def default_contexts(max_length: int) -> tuple[int, ...]:
    """512, 2048, … fourfold each, up to ``max_length``, which is the last."""
    powers = [512 * 4**i for i in range(12) if 512 * 4**i < max_length]
    return (*powers, max_length)


def new_profile(engine: Engine, contexts: Sequence[int]) -> Profile:
    """Of the engine's model on the present device, with nothing but its rates measured."""
    bandwidth, flops, overhead = measure_bandwidth(engine.dtype)
    return Profile(
        fingerprint=engine.fingerprint, device=jax.devices()[0].device_kind, versions=versions(),
        dtype=str(engine.dtype), implementation=engine.implementation, max_context=max(contexts),
        bandwidth=bandwidth, flops=flops, overhead=overhead, measurements=engine.records.measurements,
    )  # fmt: skip


def versions() -> dict[str, str]:
    """What a measurement depends on beside the device; a CPU, too, whose kind says little, unlike a GPU's."""
    found = {
        "specsa-jax": specsa_jax.__version__, "jax": jax.__version__, "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    if jax.default_backend() == "cpu":
        found |= {"processor": platform.processor() or platform.machine(), "cores": str(_cores())}
    return found


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(
    engine: Engine,
    calibration: Calibration,
    profile: Profile | None = None,
    *,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int],
    drafters: Sequence[tuple[str, Sequence[str]]] = DRAFTERS,
    budget: float = float("inf"),
    again: bool = False,
    keep: Callable[[Profile], object] = lambda profile: None,
    progress: Progress = lambda done, total, name: None,
) -> tuple[Profile, list[str]]:
    """Adds to ``profile`` what it lacks, most important first.

    Args:
      engine: of the model.
      calibration: text of priors, overlaps and divergence.
      profile: what is known; None: nothing, so that it begins with :func:`new_profile`.
      batches, contexts: the axes; drafters: by name, each with its trees.
      budget: seconds; compilation counts. Nothing is begun behind it, nor what would end behind it if it took as long
        as the longest of its kind so far.
      again: measure what is known, too; what is measured takes the place of what was there, entry by entry.
      keep: called with the profile after each thing measured.
      progress: called before each.

    Returns the profile, and what is missing: names, with the reason where it cannot be measured.

    Raises ValueError for an axis that is none, CalibrationError for text too small to state anything; before any work.
    """
    bench = Bench(engine, calibration, tuple(sorted(set(batches))), tuple(sorted(set(contexts))), drafters)
    ordered, begun = tasks(bench), time.perf_counter()
    stored = engine.records.measurements  # by specsa precision: taken as they are
    if profile is None or (again and budget > 0):
        progress(0, len(ordered), "bandwidth")
        fresh = new_profile(engine, contexts)
        rates = {name: getattr(fresh, name) for name in ("bandwidth", "flops", "overhead")}
        profile = fresh if profile is None else dataclasses.replace(
            profile, **rates, measurements=_with("measurements", profile.measurements, stored)
        )  # fmt: skip
    entries = [("measurements", m) for m in stored] if again else [
        (name, entry) for name in _KEYS for entry in getattr(profile, name)
    ]  # fmt: skip
    known = {_KEYS[name](entry) for name, entry in entries}
    wanted, missing = [task for task in ordered if task.key not in known], bench.missing
    text = calibration.text
    longest: dict[str, float] = {}  # seconds by kind of task, without what was compiled ahead
    together, most, compiled = min(_cores(), TOGETHER), 0.0, 0  # compiled at a time; seconds at most; tasks so far
    share, skipped = 0.0, 0  # of a task in its group's compilation; tasks that the budget leaves out
    for done, task in enumerate(wanted):
        kind = task.key[0]
        group = [one for one in wanted[done : done + together] if one.compile] if done >= compiled else []
        if time.perf_counter() - begun + (most if group else 0.0) + longest.get(kind, 0.0) >= budget:
            missing.append(task.name)
            skipped += 1
            continue
        if done >= compiled:
            compiled, share = done + together, 0.0
            if group:
                progress(done, len(wanted), f"compiling {len(group)} programs")
                took = _compile(group)
                most, share = max(most, took), took / len(group)
                if time.perf_counter() - begun + longest.get(kind, 0.0) >= budget:
                    missing.append(task.name)
                    skipped += 1
                    continue
        progress(done, len(wanted), task.name)
        started = time.perf_counter()
        if kind not in ("step", "draft"):
            bench.held = None  # its memory is for others
        try:
            found = task.run()
        except (CapacityError, CalibrationError, UnsupportedError, jax.errors.JaxRuntimeError) as error:
            missing.append(f"{task.name}: {str(error).splitlines()[0]}")  # of the last, which may be out of memory, too
            bench.held = None
            continue
        changed = {name: _with(name, getattr(profile, name), new) for name, new in found.items()}
        profile = dataclasses.replace(profile, **changed, text=text,
                                      max_context=max(profile.max_context, *contexts))  # fmt: skip
        if "steps" in found:
            profile = dataclasses.replace(profile, interpolation=interpolation_error(profile, engine.config))
        took = time.perf_counter() - started
        longest[kind] = max(longest.get(kind, 0.0), took)
        profile = dataclasses.replace(profile, seconds=profile.seconds + took + (share if task.compile else 0.0))
        keep(profile)
    progress(len(wanted) - skipped, len(wanted), "")
    return profile, missing


def _compile(tasks: Sequence[Task]) -> float:
    """Compiles what tasks will run, on all cores; seconds. What cannot be compiled fails when it is to run."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(len(tasks)) as pool:
        for done in [pool.submit(task.compile) for task in tasks if task.compile is not None]:
            done.exception()
    return time.perf_counter() - begun


# By what the entries of a profile are found: the keys of tasks.
_KEYS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "steps": lambda s: ("step", s.point),
    "drafts": lambda d: ("draft", d.drafter, d.tree, d.batch, d.context),
    "prefills": lambda p: ("prefill", p.batch, p.tokens),
    "priors": lambda p: ("prior", p.drafter, p.tree, p.text, p.context),
    "overlaps": lambda o: ("overlap", o.context),
    "measurements": lambda m: ("divergence", *m.key),
}


def _with(name: str, old: tuple[Any, ...], new: tuple[Any, ...]) -> Any:
    """Entries of the field ``name``, new ones in place of old ones of the same things."""
    key = _KEYS[name]
    replaced = set(map(key, new))
    return (*(entry for entry in old if key(entry) not in replaced), *new)


def tasks(bench: Bench) -> list[Task]:
    """All, most important first. Raises CalibrationError for text too small for any context."""
    found: dict[tuple[Any, ...], Task] = {}
    for task in _ordered(bench):
        found.setdefault(task.key, task)
    return list(found.values())


def _ordered(bench: Bench) -> Iterator[Task]:
    """Coarse to fine, some more than once."""
    few, most, contexts = bench.batches[0], bench.batches[-1], bench.contexts
    middle = contexts[(len(contexts) - 1) // 2]
    places = [(batch, context) for batch in bench.batches for context in contexts]
    behind, pallas = bench.behind_text(), bench.engine.implementation == "pallas"
    deepest = bench.engine.config.nsa.select_block  # a draft is no deeper than a page
    corners = (*CORNERS, *(width for width in LONG if pallas and width <= deepest + 1))
    # One chain speaks for the drafter's others: what those give follows from it (specsa_jax/planning/outlook.py).
    chains: dict[str, str] = {}
    for name, tree in sorted(bench.drafts, key=lambda draft: parse_tree(draft[1]).nodes):
        template = parse_tree(tree)
        if template.is_chain and (template.nodes <= REACH or name not in chains):
            chains[name] = tree
    trees = [(name, tree) for name, tree in bench.drafts if not parse_tree(tree).is_chain]
    told = [*chains.items(), *trees]
    shapes = list(dict.fromkeys(tree for _, tree in trees))

    # What decides between decoding one token at a time and chains of all lengths: the shortest step and the longest,
    # and some between, for one user; and at the far end, where bytes take what launches take here. Between measured
    # steps costs are known within some per cent; beyond the longest they may be off by half.
    ends = list(dict.fromkeys((corners[0], corners[-1], *CORNERS)))
    yield from (bench.step(few, middle, width) for width in ends)
    yield from (bench.step(most, contexts[-1], width) for width in (corners[0], corners[-1], CORNERS[-1]))
    yield from (bench.draft(*draft, few, middle) for draft in chains.items())
    yield from (bench.prior(*draft, TEXTS[0], behind[0]) for draft in chains.items())
    # How it changes along each axis; trees.
    yield from (bench.step(few, context, width) for context in contexts for width in corners)
    yield from (bench.step(batch, middle, width) for batch in bench.batches for width in corners)
    yield from (bench.prefill(few, context) for context in contexts)
    yield from (bench.prior(*draft, TEXTS[1], behind[0]) for draft in chains.items())
    yield from (bench.tree_step(few, middle, tree) for tree in shapes)
    yield from (bench.draft(*draft, few, middle) for draft in bench.drafts)
    yield from (bench.prior(*draft, kind, behind[0]) for draft in trees for kind in TEXTS)
    yield bench.overlap(behind[-1])
    # What layers and queries share.
    yield from (bench.step(few, middle, WIDTHS[1], **options) for options in _approximations(bench))
    if pallas:
        for group in GROUPS:
            yield from (bench.step(batch, middle, width, group=group) for batch in (few, most) for width in (9, 33))
    # The rest, finer.
    yield from (bench.step(batch, middle, width) for batch in (few, most) for width in WIDTHS)
    yield from (bench.step(*place, width) for place in places for width in corners)
    yield from (bench.draft(*draft, *place) for place in places for draft in chains.items())
    yield from (bench.prefill(*place) for place in places)
    yield from (bench.tree_step(most, middle, tree) for tree in shapes)
    yield from (bench.step(batch, middle, width, **options) for batch, width in ((few, 1), (most, CORNERS[-1]))
                for options in _approximations(bench) if options["group_mode"] == "merged")  # fmt: skip
    yield from (bench.step(few, contexts[-1], width, precision="strict") for width in WIDTHS[:2])
    for context in behind:
        yield from (bench.prior(*draft, kind, context) for draft in told for kind in TEXTS)
        yield bench.overlap(context)
    yield from (bench.divergence(one) for one in SCHEDULES if bench.sharing(one).approximates)


def _approximations(bench: Bench) -> list[dict[str, Any]]:
    """Options of strategies: those whose divergence is on record, and the uniform schedules."""
    found = [m.sharing for m in bench.engine.records.measurements] + [bench.sharing(one) for one in SCHEDULES]
    return [
        {"precision": "approx", **dataclasses.asdict(sharing), "schedule": sharing.schedule or "all"}
        for sharing in dict.fromkeys(found) if sharing.approximates
    ]  # fmt: skip
