"""What the commands share: how they end when something is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console


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
