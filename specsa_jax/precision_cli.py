"""``specsa schedule`` and ``specsa precision``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specsa_jax.terminal import clear_errors, show_table

if TYPE_CHECKING:
    from rich.console import Console

    from specsa_jax.checkpoints.records import Measurement
    from specsa_jax.engine import Engine

_Checkpoint = Annotated[str, typer.Argument(help="'embedded', or a checkpoint directory.")]
_Data = Annotated[
    list[str] | None,
    typer.Option("--data", help="Calibration text, files or directories; repeatable. None: the files held out of the "
                 "checkpoint's training."),
]  # fmt: skip
_Glob = Annotated[str, typer.Option(help="Which files of a directory.")]
_Windows = Annotated[int, typer.Option(help="Places in the text, behind each context length.")]
_Tokens = Annotated[int, typer.Option(help="Tokens scored at each place.")]
_Batch = Annotated[int, typer.Option(help="Places at a time.")]
_Implementation = Annotated[str, typer.Option(help="Attention by 'pallas' or 'xla'; 'auto': pallas where it runs.")]
_Drop = Annotated[bool, typer.Option("--drop-compressed", help="Reuse layers drop their compressed branch's output.")]
_Store = Annotated[bool, typer.Option("--store/--no-store", help="Keep the result with the checkpoint.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, last.")]


def schedule(
    checkpoint: _Checkpoint,
    refresh: Annotated[int, typer.Option(help="Refresh layers; schedules with more are found on the way.")],
    drop_compressed: _Drop = False,
    context: Annotated[list[int] | None, typer.Option(help="Context length, tokens; repeatable. None: 2048.")] = None,
    data: _Data = None,
    glob: _Glob = "**/*.py",
    windows: _Windows = 24,
    tokens: _Tokens = 64,
    batch: _Batch = 4,
    implementation: _Implementation = "auto",
    store: _Store = True,
    json_output: _Json = False,
) -> None:
    """Search the refresh/reuse schedule of least divergence, and keep it with the checkpoint.

    From all layers refreshing, the layer whose reuse costs the least mean KL to all-refresh reuses next, and so on.

    Example:  specsa schedule embedded --refresh 2

    Then: Strategy(schedule="searched:2", precision="approx"), after specsa precision has measured it on other text.
    Exit codes: 0 done, 2 bad input, 130 interrupted.
    """
    with _session(checkpoint, implementation) as (console, engine):
        from specsa_jax import precision
        from specsa_jax.calibration import read_calibration

        text = read_calibration(checkpoint, engine.tokenizer, data or (), glob)
        if store:
            _can_keep(engine)
        with _progress(console, "searching") as progress:
            found = precision.search(
                engine, text, refresh, keep_compressed=not drop_compressed, contexts=context or (2048,),
                windows=windows, tokens=tokens, batch=batch, progress=progress,
            )  # fmt: skip
        if store:
            _keep(engine, console, searched=tuple(best for best, _ in found))
        rows = [
            (str(best.refresh), best.schedule, f"{best.mean_kl:.3g} ± {best.mean_kl_error:.1g}", uniform.schedule,
             f"{uniform.mean_kl:.3g} ± {uniform.mean_kl_error:.1g}")
            for best, uniform in found
        ]  # fmt: skip
        names = ("refresh layers", "schedule", "mean KL, nats", "uniform", "mean KL, nats")
        show_table(console, _table(f"on {text.source}", names, rows))
    if json_output:
        import dataclasses

        pairs = [{"searched": dataclasses.asdict(a), "uniform": dataclasses.asdict(b)} for a, b in found]
        print(json.dumps({"model": engine.fingerprint, "schedules": pairs}))


def precision(
    checkpoint: _Checkpoint,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            help="A letter a layer, F (refresh) or S (reuse), or every:K, searched:K, all; repeatable. None: "
            "show what is stored."
        ),
    ] = None,
    drop_compressed: _Drop = False,
    shared: Annotated[int, typer.Option(help="So many adjacent queries share the index of one; 0: none do.")] = 0,
    width: Annotated[int, typer.Option(help="With --shared: tokens that a step verifies, drafts and one.")] = 6,
    context: Annotated[
        list[int] | None, typer.Option(help="Context length, tokens; repeatable. None: 512, 2048, 4096.")
    ] = None,
    data: _Data = None,
    glob: _Glob = "**/*.py",
    windows: _Windows = 24,
    tokens: _Tokens = 64,
    batch: _Batch = 4,
    confidence: Annotated[float, typer.Option(help="Of the one-sided bounds.")] = 0.95,
    implementation: _Implementation = "auto",
    store: _Store = True,
    json_output: _Json = False,
) -> None:
    """Measure how far approximate strategies diverge from exact decoding, and keep it with the checkpoint.

    Example:  specsa precision embedded --schedule every:2 --schedule every:3

    Only strategies measured here are admitted by a bound (generate --precision approx --max-kl 0.01), and by engines
    of the dtype that they were measured in: that of this device's engines.
    Exit codes: 0 done, 2 bad input, 130 interrupted.
    """
    with _session(checkpoint, implementation) as (console, engine):
        from specsa_jax import precision as measuring
        from specsa_jax.calibration import read_calibration
        from specsa_jax.strategy import Strategy

        if schedule or shared:
            kinds: dict[str, Any] = {"precision": "approx", "keep_compressed": not drop_compressed}
            if shared:
                if width < 2:
                    raise ValueError(f"width: got {width}, expected at least 2, a draft and the token before it")
                kinds |= {"group": shared, "group_mode": "shared", "tree": f"chain:{width - 1}"}
            strategies = [Strategy(schedule=one, **kinds) for one in schedule or ["all"]]
            text = read_calibration(checkpoint, engine.tokenizer, data or (), glob)
            if store:
                _can_keep(engine)
            with _progress(console, "measuring") as progress:
                found = measuring.measure(
                    engine, strategies, text, contexts=context or measuring.CONTEXTS, windows=windows, tokens=tokens,
                    batch=batch, confidence=confidence, progress=progress,
                )  # fmt: skip
            if store:
                _keep(engine, console, measurements=tuple(found))
        else:
            found = list(engine.records.measurements)
        _show(console, found)
    if json_output:
        print(json.dumps({"model": engine.fingerprint, "measurements": [measuring.describe(m) for m in found]}))


@contextlib.contextmanager
def _session(checkpoint: str, implementation: str) -> Iterator[tuple[Console, Engine]]:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with clear_errors(console):
        from specsa_jax.engine import Engine

        chosen: Any = None if implementation == "auto" else implementation
        with console.status("loading the model"):
            engine = Engine.from_pretrained(checkpoint, implementation=chosen)
        yield console, engine


@contextlib.contextmanager
def _progress(console: Console, word: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(word, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _can_keep(engine: Engine) -> None:
    """Raises CheckpointError, before any work, where the result could not be stored."""
    from specsa_jax.checkpoints import CheckpointError

    assert engine.checkpoint is not None
    _ = engine.records
    if not os.access(engine.checkpoint, os.W_OK):
        raise CheckpointError(f"{engine.checkpoint}: is not writable; use --no-store, or a copy of the checkpoint")


def _keep(engine: Engine, console: Console, **new: Any) -> None:
    from specsa_jax.checkpoints import records

    assert engine.checkpoint is not None
    where = records.save(engine.checkpoint, engine.records.with_(**new))
    console.print(f"stored in {where}", soft_wrap=True)


def _show(console: Console, measurements: list[Measurement]) -> None:
    names = ("strategy", "context", "tokens", "mean KL, nats", "at most", "99 %", "top-1", "at least", "loss")
    rows, mixed = [], len({m.dtype for m in measurements}) > 1
    for m in sorted(measurements, key=lambda m: m.mean_kl):
        strategy = m.describe() + (f", {m.dtype}" if mixed else "")
        for at in m.contexts:
            rows.append((
                strategy, f"{at.context:,}", f"{at.tokens:,}", f"{at.mean_kl:.3g} ± {at.mean_kl_error:.1g}",
                f"{at.mean_kl_bound:.3g}", f"{at.p99_kl:.3g}", f"{at.top1:.4f} ± {at.top1_error:.4f}",
                f"{at.top1_bound:.4f}", f"{at.loss_change:+.4f} ± {at.loss_change_error:.4f}",
            ))  # fmt: skip
            strategy = ""
    levels = " and ".join(sorted({f"{m.confidence:.0%}" for m in measurements})) or "no"
    show_table(console, _table(f"against class exact; bounds at {levels} confidence", names, rows))
    if not rows:
        console.print("nothing is measured; give a --schedule, such as every:2")


def _table(title: str, names: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table
