"""``specsa profile``."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specsa_jax.terminal import check_writable, clear_errors, named_options, show_table

if TYPE_CHECKING:
    from rich.console import Console

    from specsa_jax.engine import Engine
    from specsa_jax.planning.profile import Profile


def profile(
    command: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="'embedded', or a checkpoint directory.")],
    budget: Annotated[float, typer.Option(help="Seconds; what would end later is not begun.")] = float("inf"),
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; repeatable. None: 1, 8.")] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Tokens in the cache; repeatable. None: 512, 2048, … up to the model's max_length."),
    ] = None,
    drafter: Annotated[
        list[str] | None, typer.Option(help="As of generate; repeatable. None: lookup, head, lookup+head, self.")
    ] = None,
    tree: Annotated[
        list[str] | None, typer.Option(help="As of generate, of each drafter; repeatable. None: those it is good at.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Calibration text, files or directories; repeatable. None: the files held out of "
            "the checkpoint's training.",
        ),
    ] = None,
    glob: Annotated[str, typer.Option(help="Which files of a directory.")] = "**/*.py",
    out: Annotated[
        Path | None, typer.Option(help="The file. None: profile-DEVICE.json in the checkpoint's directory.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what the file holds too.")] = False,
    show: Annotated[
        Path | None,
        typer.Option(help="Draw what the file holds as this .html, and .png beside it; measure nothing."),
    ] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="With --show: a profile of another device is taken too.")
    ] = False,
    implementation: Annotated[
        str, typer.Option(help="Attention by 'pallas' or 'xla'; 'auto': pallas where it runs.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of parameters and cache: 'float32' or 'bfloat16'; 'auto': as the device has it.")
    ] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object, last.")] = False,
) -> None:
    """Measure what decoding steps, drafts and prompts take on this device, and how drafts fare; resumable.

    Example:  specsa profile embedded --budget 300

    The most important things come first, and the file is written after each: a short budget, or Ctrl-C, leaves a useful
    one, and the next call adds what is missing. Exit codes: 0 done or budget spent, 2 bad input, 130 interrupted.
    """  # fmt: skip
    from rich.console import Console

    console, begun = Console(stderr=True, highlight=False), time.perf_counter()
    with clear_errors(console, "interrupted; what was measured is kept, and the same command goes on"):
        if not budget >= 0:
            raise ValueError(f"budget: got {budget}, expected seconds, at least 0")
        if allow_mismatch and show is None:
            raise ValueError("allow_mismatch: got it without --show, expected it with: what is measured here does not "
                             "belong into the profile of another device")  # fmt: skip
        if dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype: got {dtype!r}, expected 'auto', 'float32' or 'bfloat16'")
        if show is not None and show.suffix != ".html":
            raise ValueError(f"show: got {str(show)!r}, expected a path that ends in .html")
        measuring = ("budget", "batch", "context", "drafter", "tree", "data", "glob", "again")
        if show is not None and (named := named_options(command, measuring)):
            raise ValueError(f"{', '.join(named)}: got a value with --show, which measures nothing, expected one or "
                             "the other")  # fmt: skip
        if show is not None:
            check_writable("show", show)
        from specsa_jax.engine import Engine

        with console.status("loading the model"):
            chosen: Any = None if implementation == "auto" else implementation
            engine = Engine.from_pretrained(checkpoint, implementation=chosen, dtype=None if dtype == "auto" else dtype)
        path = out or _default(engine)
        if show is None:
            limits = {"batches": batch, "contexts": context, "drafters": _drafts(drafter or (), tree or ())}
            until = begun + budget
            found, missing = _measure(engine, path, console, checkpoint, data or (), glob, until, again, limits)
            report = {**_summary(path, found), "missing": missing}
            _table(console, found, missing)
        else:
            found = _load(engine, path, allow_mismatch)
            report = {**_summary(path, found), "drawn": _draw(engine, found, show, console)}
    if json_output:
        print(json.dumps(report))


def _drafts(drafters: Sequence[str], trees: Sequence[str]) -> list[tuple[str, Sequence[str]]]:
    """Drafters, all with ``trees``; without drafters the usual ones, and without trees those each is good at."""
    from specsa_jax.planning.space import DRAFTERS

    usual = dict(DRAFTERS)
    every = list(dict.fromkeys(tree for some in usual.values() for tree in some))
    return [(name, trees or usual.get(name, every)) for name in drafters or usual]


def _default(engine: Engine) -> Path:
    import jax

    from specsa_jax.planning.profile import default_path

    assert engine.checkpoint is not None
    return default_path(engine.checkpoint, jax.devices()[0].device_kind)


def _load(engine: Engine, path: Path, allow_mismatch: bool = False) -> Profile:
    import jax

    from specsa_jax.planning.profile import load

    return load(
        path, fingerprint=engine.fingerprint, device=jax.devices()[0].device_kind, allow_mismatch=allow_mismatch
    )


def _measure(
    engine: Engine, path: Path, console: Console, checkpoint: str, data: Any, glob: str, until: float, again: bool,
    limits: dict[str, Any],
) -> tuple[Profile, list[str]]:  # fmt: skip
    """What the file holds and what it lacked (``again``: all), which is measured and kept in it, ``until`` that time of
    ``time.perf_counter``.

    The file stays as it is until something was measured, which then replaces its entries; or all of it, from the first
    step time on, where its own would not compare.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from specsa_jax.calibration import read_calibration
    from specsa_jax.planning import measure
    from specsa_jax.planning.profile import ProfileError, is_profile, read, save

    check_writable("out", path)
    given = {name: values for name, values in limits.items() if values}
    given.setdefault("contexts", measure.default_contexts(engine.max_length))
    held, replaced = None, False
    if path.exists():
        try:
            held = _comparable(engine, path)
        except ProfileError:
            if not (again and is_profile(path)):
                raise
            replaced = True
    text = read_calibration(checkpoint, engine.tokenizer, data, glob)
    written = False

    def keep(found: Profile) -> None:
        nonlocal written
        if found.steps or not replaced:
            save(path, found)
            written = True

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)
        found, missing = measure.measure(
            engine, text, held, **given, budget=max(0.0, until - time.perf_counter()), again=again,
            keep=keep,
            progress=lambda done, total, name: bar.update(task, completed=done, total=total, description=name),
        )  # fmt: skip
    if not path.exists():
        keep(found)
    console.print(f"stored in {path}" if written else f"nothing new to store: {path} is as it was", soft_wrap=True)
    return (found if written else read(path)), missing


def _comparable(engine: Engine, path: Path) -> Profile:
    """The profile in the file, if what is measured here compares with it. Raises ProfileError."""
    from specsa_jax.planning.measure import versions
    from specsa_jax.planning.profile import ProfileError

    held = _load(engine, path)
    here = {"dtype": str(engine.dtype), "implementation": engine.implementation, "versions": versions()}
    for name, value in here.items():
        if getattr(held, name) != value:
            raise ProfileError(
                f"profile: {path}: {name}: got {getattr(held, name)}, expected {value}: what is added would not "
                "compare; measure anew with --again, or into another --out"
            )
    return held


def _draw(engine: Engine, profile: Profile, show: Path, console: Console) -> list[str]:
    from specsa_jax.planning.show import write

    with console.status("drawing"):
        written = [str(path) for path in write(profile, engine.config, show)]
    console.print(f"drawn in {', '.join(written)}", soft_wrap=True)
    return written


def _summary(path: Path, profile: Profile) -> dict[str, Any]:
    """What a profile holds, as JSON-ready values."""
    counts = {name: len(getattr(profile, name))
              for name in ("steps", "drafts", "prefills", "priors", "overlaps", "measurements")}  # fmt: skip
    error = profile.interpolation
    return {
        "profile": str(path), "model": profile.fingerprint, "device": profile.device, "dtype": profile.dtype,
        "implementation": profile.implementation, "seconds": profile.seconds, "bandwidth": profile.bandwidth,
        "flops": profile.flops, **counts, "interpolation": None if error is None else dataclasses.asdict(error),
    }  # fmt: skip


def _table(console: Console, profile: Profile, missing: list[str]) -> None:
    """Step times of class exact, a column for each batch and context; then the error between, and what is missing."""
    from rich.table import Table

    from specsa_jax.planning.show import describe_error, exact_chains

    steps = exact_chains(profile)
    places = sorted({(p.batch, p.context) for p in steps})
    table = Table(title=f"milliseconds of a step, {profile.device}, {profile.dtype}, {profile.implementation}",
                  title_justify="left")  # fmt: skip
    table.add_column("T, a chain")
    for batch, context in places:
        table.add_column(f"batch {batch}\n{context:,} tokens", justify="right")
    for width in sorted({p.width for p in steps}):
        times = [next((s.seconds for p, s in steps.items() if (p.batch, p.context, p.width) == (*place, width)), None)
                 for place in places]  # fmt: skip
        table.add_row(str(width), *("" if time is None else f"{1e3 * time:.3g}" for time in times))
    show_table(console, table)
    console.print(describe_error(profile))
    if missing:
        shown = [f"  {name}" for name in missing[:12]]
        more = [f"  and {len(missing) - 12} more"] if len(missing) > 12 else []
        console.print("\n".join([f"not measured ({len(missing)}):", *shown, *more]), soft_wrap=True, markup=False)
