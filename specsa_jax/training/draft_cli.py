"""``specsa train-draft``."""

from __future__ import annotations

import dataclasses
import json
import signal
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pallas_kernels import UnsupportedError
from specsa_jax import checkpoints
from specsa_jax.cache import CapacityError
from specsa_jax.checkpoints import CheckpointError, draft_head
from specsa_jax.config import ConfigError
from specsa_jax.training import draft, report
from specsa_jax.training.config import DivergedError, TrainingError
from specsa_jax.training.draft_config import DraftConfig

_D: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(DraftConfig)}


def train_draft(
    target: Annotated[str, typer.Argument(help="'embedded', or a checkpoint directory.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The run's directory.")],
    data: Annotated[
        list[str] | None, typer.Argument(help="Directories and files; none: those that the target was trained on.")
    ] = None,
    glob: Annotated[str, typer.Option(help="Which files of a directory; '': as for the target.")] = _D["glob"],
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out relative paths that match; repeatable. None: as for the target.")
    ] = None,
    skip_undecodable: Annotated[bool, typer.Option("--skip-undecodable", help="Leave out what is not UTF-8.")] = False,
    holdout: Annotated[float, typer.Option(help="Fraction of files held out; 0: as for the target.")] = _D["holdout"],
    context: Annotated[int, typer.Option(help="Tokens a sequence.")] = _D["context"],
    new_tokens: Annotated[int, typer.Option(help="Of these, tokens that the target writes.")] = _D["new_tokens"],
    generated: Annotated[int, typer.Option(help="Sequences that the target continues; 0: none.")] = _D["generated"],
    generation_batch: Annotated[int, typer.Option(help="So many at a time.")] = _D["generation_batch"],
    sampled: Annotated[float, typer.Option(help="The fraction that is sampled, not greedy.")] = _D["sampled"],
    temperature: Annotated[float, typer.Option(help="At which temperature.")] = _D["temperature"],
    mix: Annotated[float, typer.Option(help="The fraction of generated sequences in a batch.")] = _D["mix"],
    batch: Annotated[int, typer.Option(help="Sequences an optimiser step.")] = _D["batch"],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = _D["steps"],
    unroll: Annotated[int, typer.Option(help="Drafts ahead that the head is trained for.")] = _D["unroll"],
    step_decay: Annotated[float, typer.Option(help="Weight of a draft's loss by that before.")] = _D["step_decay"],
    layers: Annotated[int, typer.Option(help="Of the head; 0: one.")] = _D["layers"],
    num_heads: Annotated[int, typer.Option(help="0: as the target.")] = _D["num_heads"],
    num_kv_heads: Annotated[int, typer.Option(help="0: as the target.")] = _D["num_kv_heads"],
    head_dim: Annotated[int, typer.Option(help="0: as the target.")] = _D["head_dim"],
    intermediate: Annotated[int, typer.Option(help="SwiGLU width; 0: as the target.")] = _D["intermediate"],
    window: Annotated[int, typer.Option(help="Tokens that the head sees; 0: 512.")] = _D["window"],
    features: Annotated[
        str, typer.Option(help="The target's layers that the head reads, such as 2,4,6; '': three.")
    ] = "",
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = _D["learning_rate"],
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = _D["warmup"],
    weight_decay: Annotated[float, typer.Option(help="On projections.")] = _D["weight_decay"],
    clip: Annotated[float, typer.Option(help="Global norm of gradients.")] = _D["clip"],
    beta1: Annotated[float, typer.Option(help="Adam's first decay.")] = _D["beta1"],
    beta2: Annotated[float, typer.Option(help="Adam's second decay.")] = _D["beta2"],
    dtype: Annotated[str, typer.Option(help="bf16 or f32, of the computation; auto: bf16 on GPUs.")] = _D["dtype"],
    export_dtype: Annotated[str, typer.Option(help="bf16 or f32, of the head.")] = _D["export_dtype"],
    query_chunk: Annotated[int, typer.Option(help="Queries that the target attends at a time.")] = _D["query_chunk"],
    prefill_chunk: Annotated[int, typer.Option(help="Prompt tokens a pass; 0: the engine's.")] = _D["prefill_chunk"],
    implementation: Annotated[
        str, typer.Option(help="The target's attention while it writes: auto, pallas or xla.")
    ] = _D["implementation"],
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: at the end.")] = _D["eval_every"],
    eval_rows: Annotated[int, typer.Option(help="Held-out sequences for them.")] = _D["eval_rows"],
    chain: Annotated[int, typer.Option(help="Drafts a step in the predicted acceptance length.")] = _D["chain"],
    save_every: Annotated[int, typer.Option(help="Steps between saved states; 0: at the end.")] = _D["save_every"],
    keep: Annotated[int, typer.Option(help="Saved states to keep.")] = _D["keep"],
    time_limit: Annotated[float, typer.Option(help="Seconds after which training has ended; 0: none.")] = 0.0,
    install: Annotated[
        bool, typer.Option("--install", help="Put the head into the target's directory, where the engine looks.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state in the output.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, order and sampling.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object, last.")] = False,
) -> None:
    """Train a draft head for a model, on the model's own continuations of text files.

    Example:  specsa train-draft embedded -o run --steps 2000 --install

    Ctrl-C finishes the step, saves, and exits with 130; the same command with --resume goes on.
    Exit codes: 0 done (or time limit), 1 training failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    console = Console(stderr=True)
    try:
        config = DraftConfig(
            target=target, output=output, data=tuple(data or ()), glob=glob, exclude=tuple(exclude or ()),
            skip_undecodable=skip_undecodable, holdout=holdout, context=context, new_tokens=new_tokens,
            generated=generated, generation_batch=generation_batch, sampled=sampled, temperature=temperature, mix=mix,
            batch=batch, steps=steps, unroll=unroll, step_decay=step_decay, layers=layers, num_heads=num_heads,
            num_kv_heads=num_kv_heads, head_dim=head_dim, intermediate=intermediate, window=window,
            features=_layers(features), learning_rate=learning_rate, warmup=warmup, weight_decay=weight_decay,
            clip=clip, beta1=beta1, beta2=beta2, dtype=dtype, export_dtype=export_dtype,  # type: ignore[arg-type]
            query_chunk=query_chunk, prefill_chunk=prefill_chunk,
            implementation=implementation, eval_every=eval_every, eval_rows=eval_rows,  # type: ignore[arg-type]
            chain=chain, save_every=save_every, keep=keep, time_limit=time_limit, resume=resume, seed=seed,
        )  # fmt: skip
        with report.Display(console, config.steps) as display:
            summary = draft.train_draft(config, display)
        installed = None
        if install and summary.head:
            where = checkpoints.resolve(target) / draft_head.DIRECTORY
            installed = draft_head.save(where, draft_head.load(summary.head), overwrite=True)
    except (ConfigError, TrainingError, CheckpointError, CapacityError, UnsupportedError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, DivergedError) else 2) from error
    except KeyboardInterrupt as error:  # during set-up, or a second Ctrl-C
        console.print("interrupted; what was saved before is whole")
        raise typer.Exit(130) from error
    console.print(_table(summary))
    if installed:
        console.print(f"installed in {installed}", highlight=False, soft_wrap=True)
    if summary.steps < config.steps:
        console.print(f"to go on: {config.command()} --resume", markup=False, soft_wrap=True)
    if json_output:
        print(json.dumps(dataclasses.asdict(summary)))
    if summary.stopped.startswith("SIG"):
        raise typer.Exit(128 + getattr(signal, summary.stopped))


def _layers(text: str) -> tuple[int, ...]:
    """``"2,4,6"`` as numbers. Raises ConfigError."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"features: got {text!r}, expected layers, such as 2,4,6")
    return tuple(map(int, parts))


def _table(summary: draft.DraftSummary) -> Table:
    table = Table(title=f"draft head: {summary.stopped}", show_header=False)
    values = dataclasses.asdict(summary)
    evaluation = values.pop("evaluation")
    for name, value in values.items():
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name.replace("_", " "), shown)
    if evaluation:
        table.add_row("held-out loss", f"{evaluation['loss']:.4f}")
        table.add_row("held-out matches by depth", "  ".join(f"{x:.3f}" for x in evaluation["matches"]))
        table.add_row("held-out overlap by depth", "  ".join(f"{x:.3f}" for x in evaluation["overlap"]))
        length, steps = evaluation["acceptance_length"], evaluation["steps"]
        table.add_row(f"tokens a step, chain:{evaluation['chain']}", f"{length:.3f} (greedy, {steps:,} steps)")
    return table
