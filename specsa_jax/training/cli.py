"""``specsa train``."""

from __future__ import annotations

import dataclasses
import json
import signal
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from specsa_jax.checkpoints import CheckpointError
from specsa_jax.config import ConfigError
from specsa_jax.training import report, trainer
from specsa_jax.training.config import DivergedError, Stage, TrainConfig, TrainingError, parse_stages

_D: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def train(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Directories and files; 'stdlib': this Python's standard library; "
            "'site-packages/NAME': an installed package."
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The run's directory.")],
    stages: Annotated[str, typer.Option(help="context:batch:steps[,…], in place of the three options below.")] = "",
    context: Annotated[int | None, typer.Option(help="Tokens a sequence; 4096 if not given.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences an optimiser step; 16 if not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; 3000 if not given.")] = None,
    model: Annotated[str, typer.Option(help="A preset, or the path of a ModelConfig JSON file.")] = _D["model"],
    init: Annotated[str, typer.Option(help="Start from this checkpoint, with its config and tokenizer.")] = "",
    vocab_size: Annotated[int, typer.Option(help="BPE vocabulary; 0: the model's.")] = 0,
    glob: Annotated[str, typer.Option(help="Which files of a directory.")] = _D["glob"],
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out relative paths that match, such as 'test/*'; repeatable.")
    ] = None,
    skip_undecodable: Annotated[
        bool, typer.Option("--skip-undecodable", help="Leave out files that are not UTF-8, where they are an error.")
    ] = False,
    holdout: Annotated[float, typer.Option(help="Fraction of files held out, by their paths.")] = _D["holdout"],
    grad_accum: Annotated[int, typer.Option(help="Slices of a batch, one after the other.")] = _D["grad_accum"],
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = _D["learning_rate"],
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = _D["warmup"],
    schedule: Annotated[
        str, typer.Option(help="cosine (to 10 %) or wsd (constant, then a linear fall over the last fifth).")
    ] = _D["schedule"],
    weight_decay: Annotated[float, typer.Option(help="On projections and the embedding.")] = _D["weight_decay"],
    clip: Annotated[float, typer.Option(help="Global norm of gradients.")] = _D["clip"],
    beta1: Annotated[float, typer.Option(help="Adam's first decay.")] = _D["beta1"],
    beta2: Annotated[float, typer.Option(help="Adam's second decay.")] = _D["beta2"],
    dtype: Annotated[str, typer.Option(help="bf16 or f32, of the computation.")] = _D["dtype"],
    export_dtype: Annotated[str, typer.Option(help="bf16 or f32, of the final checkpoint.")] = _D["export_dtype"],
    remat: Annotated[bool, typer.Option(help="Recompute layers in the backward pass: less memory.")] = _D["remat"],
    query_chunk: Annotated[int, typer.Option(help="Queries attended at a time.")] = _D["query_chunk"],
    eval_every: Annotated[int, typer.Option(help="Steps between held-out losses; 0: at the end.")] = _D["eval_every"],
    eval_batches: Annotated[int, typer.Option(help="Batches for one of them.")] = _D["eval_batches"],
    save_every: Annotated[int, typer.Option(help="Steps between saved states; 0: at the end.")] = _D["save_every"],
    keep: Annotated[int, typer.Option(help="Saved states to keep.")] = _D["keep"],
    time_limit: Annotated[float, typer.Option(help="Seconds after which to save, export and stop; 0: none.")] = 0.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state in the output.")] = False,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order of the data.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object, last.")] = False,
) -> None:
    """Train a model on text files: tokenizer, training, held-out loss, checkpoint.

    Example:  specsa train stdlib -o run --model embedded --stages 4096:16:3000,8192:8:400 --skip-undecodable

    Ctrl-C finishes the step, saves, and exits with 130; the same command with --resume goes on.
    Exit codes: 0 done (or time limit), 1 training failed, 2 bad input, 130 interrupted, 143 terminated.
    """
    console = Console(stderr=True)
    shape = {"context": context, "batch": batch, "steps": steps}
    try:
        given = {name: value for name, value in shape.items() if value is not None}
        if stages and given:
            raise ConfigError("stages: cannot be given with --context, --batch or --steps")
        shapes = parse_stages(stages) if stages else (dataclasses.replace(Stage(4096, 16, 3000), **given),)
        config = TrainConfig(
            data=tuple(data), output=output, stages=shapes, model=model, init=init, vocab_size=vocab_size, glob=glob,
            exclude=tuple(exclude or ()), skip_undecodable=skip_undecodable, holdout=holdout, grad_accum=grad_accum,
            learning_rate=learning_rate, warmup=warmup, schedule=schedule,  # type: ignore[arg-type]
            weight_decay=weight_decay, clip=clip, beta1=beta1, beta2=beta2, dtype=dtype,  # type: ignore[arg-type]
            export_dtype=export_dtype, remat=remat, query_chunk=query_chunk,  # type: ignore[arg-type]
            eval_every=eval_every, eval_batches=eval_batches, save_every=save_every, keep=keep, time_limit=time_limit,
            resume=resume, seed=seed,
        )  # fmt: skip
        with report.Display(console, config.steps) as display:
            summary = trainer.train(config, display)
    except (ConfigError, TrainingError, CheckpointError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, DivergedError) else 2) from error
    except KeyboardInterrupt as error:  # during set-up, or a second Ctrl-C
        console.print("interrupted; what was saved before is whole")
        raise typer.Exit(130) from error
    table = Table(title=f"training: {summary.stopped}", show_header=False)
    for name, value in dataclasses.asdict(summary).items():
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name.replace("_", " "), shown)
    console.print(table)
    if summary.steps < config.steps:
        console.print(f"to go on: {config.command()} --resume", markup=False, soft_wrap=True)
    if json_output:
        print(json.dumps(dataclasses.asdict(summary)))
    if summary.stopped.startswith("SIG"):
        raise typer.Exit(128 + getattr(signal, summary.stopped))
