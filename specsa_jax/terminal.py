"""What the commands share: how they end when something is wrong, and what they look at before they begin."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@contextlib.contextmanager
def clear_errors(notes: Console, interrupted: str = "interrupted") -> Iterator[None]:
    """Bad input ends with one line on ``notes`` and exit code 2, Ctrl-C with ``interrupted`` and 130."""
    from pallas_kernels import UnsupportedError
    from specsa_jax.cache import CapacityError
    from specsa_jax.checkpoints import CheckpointError

    try:
        yield
    except BrokenPipeError:  # the reader of standard output has gone: no fault of the input's
        raise
    except (CapacityError, CheckpointError, UnsupportedError, ValueError, OSError) as error:
        notes.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        notes.print(interrupted)
        raise typer.Exit(130) from error


def hear_interrupts() -> None:
    """Lets Ctrl-C wait while callbacks of the garbage collector run, of which JAX has one: Python prints what is raised
    in them, and goes on."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
        while frame is not None and frame.f_code not in callbacks:
            frame = frame.f_back
        if frame is None:
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    for number in (signal.SIGINT, signal.SIGALRM):
        signal.signal(number, interrupt)


def named_options(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Those options that the command line names."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def check_writable(name: str, path: Path, parents: bool = False) -> None:
    """Raises ValueError that names the argument where ``path`` cannot become a file: before work that would be lost.

    ``parents``: directories above it that are missing will be made.
    """
    folder = path.absolute().parent
    while parents and not folder.exists():
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{name}: got {str(path)!r}, expected the path of a file in a directory that can be written "
                         "to")  # fmt: skip


def show_table(console: Console, table: Table) -> None:
    """Prints a table with all of its figures: where there are fewer columns, its lines are longer than those."""
    wide = console.measure(table, options=console.options.update(width=10_000)).maximum
    narrow, console.width = console.width, max(console.width, wide)
    console.print(table)
    console.width = narrow
