"""``specsa convert`` and ``specsa inspect``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specsa_jax.terminal import clear_errors

if TYPE_CHECKING:
    from rich.console import Console


# As in formats.FORMATS, which would take seconds to import for a help text.
_FORMATS = "specsa, llama-nsa, nsa-byte, fla, toy-nsa-llama, flash-sparse-attention, minicpm4, llama, qwen3"


def convert(
    source: Annotated[
        str, typer.Argument(help="Directory or file of safetensors, .bin, .pt (weights only), or our own.")
    ],
    target: Annotated[Path, typer.Argument(help="The directory to create.")],
    from_format: Annotated[
        str, typer.Option("--from", help=f"The source's format; recognised if not given. One of {_FORMATS}.")
    ] = "",
    to_format: Annotated[
        str,
        typer.Option("--to", help="The target's format. Default: 'specsa', or where a source of ours came from."),
    ] = "",
    adapt: Annotated[str, typer.Option(help="'nsa': make an NSA model of a dense Llama or Qwen3.")] = "",
    adapt_option: Annotated[
        list[str] | None, typer.Option(help="A size of the adapted layers, such as num_selected=32; repeatable.")
    ] = None,
    divergence_tokens: Annotated[
        int | None,
        typer.Option(
            help="Compare an adapted model with the dense one on this many tokens; 0: do not. "
            "None: twice what its selected blocks hold.",
            min=0,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="The source's config where no config.json lies beside it.")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="A tokenizer.json, 'bytes' or 'ids', where none lies beside the weights.")
    ] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object, last.")] = False,
) -> None:
    """Convert a public checkpoint to one of ours, or back; tensor by tensor, every bit kept.

    Example:  specsa convert ~/models/NSA-1B nsa-1b
    Example:  specsa convert ~/models/Qwen3-0.6B start --adapt nsa --adapt-option num_selected=32

    The target appears when it is whole. Exit codes: 0 done, 2 bad input, 130 interrupted.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    notes = Console(stderr=True, highlight=False)
    with clear_errors(notes, "interrupted; nothing was written"):
        from specsa_jax.checkpoints import conversion

        options = _sizes(adapt_option or [])
        columns = (TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
            task = bar.add_task("", total=None)
            report = conversion.convert(
                source, target, from_format=from_format or None, to_format=to_format or None, adapt=adapt or None,
                adapt_options=options, divergence_tokens=divergence_tokens, config=config,
                tokenizer=tokenizer or None, overwrite=overwrite,
                progress=lambda done, total, name: bar.update(task, completed=done, total=total, description=name),
            )  # fmt: skip
        _report(dataclasses.asdict(report), notes)
    if json_output:
        print(json.dumps(dataclasses.asdict(report)))


def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint of any known format: a directory, a file, or 'embedded'.")],
    from_format: Annotated[
        str, typer.Option("--from", help=f"Its format; recognised if not given. One of {_FORMATS}.")
    ] = "",
    config: Annotated[Path | None, typer.Option(help="Its config where no config.json lies beside it.")] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Context lengths to plan for; repeatable. None: up to max_length.", min=1)
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes to plan for; repeatable.", min=1)] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its checksum.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Say what a checkpoint holds: format, config, switches, parameters, what is wrong, memory needed.

    Example:  specsa inspect ~/models/NSA-1B --context 65536 --batch 8

    Exit codes: 0 whole, 1 tensors are missing, unexpected or mis-shaped, 2 bad input or damaged, 130 interrupted.
    """
    from rich.console import Console

    notes = Console(stderr=True, highlight=False)
    with clear_errors(notes):
        from specsa_jax.checkpoints import inspection

        with notes.status("comparing checksums" if verify else "reading"):
            report = inspection.inspect(
                path, from_format=from_format or None, config=config, contexts=context,
                batches=batch or inspection.BATCHES, verify=verify,
            )  # fmt: skip
        if json_output:
            print(json.dumps(report))
        else:
            _inspected(report, Console(highlight=False))
    if report["problems"]:
        raise typer.Exit(1)


def _sizes(texts: list[str]) -> dict[str, int]:
    from specsa_jax.config import ConfigError

    sizes = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not value.isdecimal():
            raise ConfigError(f"adapt_option: got {text!r}, expected NAME=NUMBER, such as num_selected=32")
        sizes[name] = int(value)
    return sizes


def _report(report: dict[str, Any], notes: Console) -> None:
    from rich.table import Table

    table = Table(title=f"{report['from_format']} → {report['to_format']}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_row("target", report["target"])
    table.add_row("parameters", f"{report['parameters']:,} in {report['tensors']:,} tensors")
    table.add_row("weights", f"{report['bytes'] / 2**20:,.1f} MiB of {', '.join(report['dtypes'])}")
    table.add_row("seconds", f"{report['seconds']:.1f}")
    if (far := report["divergence"]) is not None:
        table.add_row("divergence from dense", f"KL {far['kl_mean']:.4f} nats a token (at most {far['kl_max']:.3f}), "
                      f"same first choice {far['top1_agreement']:.1%}")  # fmt: skip
        if far["kl_beyond"] is not None:
            table.add_row("  where blocks are chosen", f"KL {far['kl_beyond']:.4f} nats a token")
        table.add_row("loss dense, adapted", f"{far['loss_dense']:.4f}, {far['loss_adapted']:.4f} nats a token")
        table.add_row("  measured on", f"{far['tokens']:,} tokens of {far['text']}")
    for note in report["notes"]:
        table.add_row("note", note)
    notes.print(table)
    if report["divergence"] is not None:
        notes.print(f"a starting point, not yet an NSA model: specsa train … --init {report['target']}", markup=False)


def _inspected(report: dict[str, Any], out: Console) -> None:
    from rich.table import Table

    table = Table(title=f"{report['path']}: {report['title']}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    model = report["model"]
    nsa, rope = model.pop("nsa"), model.pop("rope")
    for name, values in (("model", model), ("attention", nsa), ("RoPE", rope), ("switches", report["switches"])):
        table.add_row(name, ", ".join(f"{key} {value}" for key, value in values.items())[:1200])
    table.add_row("GPU kernels", report["kernels"] or "take every layer")
    parts = {part: count for part, count in report["parts"].items() if count}
    table.add_row("parameters", f"{report['parameters']:,}: " + ", ".join(f"{p} {n:,}" for p, n in parts.items()))
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in report["dtypes"].items())
    table.add_row("weights", f"{report['weight_bytes'] / 2**20:,.1f} MiB ({dtypes})")
    if source := report["source"]:
        table.add_row("converted from", f"{source.get('format')}, fingerprint {str(source.get('fingerprint'))[:16]}")
    for note in report["notes"]:
        table.add_row("note", note)
    if report["verified"] is not None:
        table.add_row("checksums", f"{report['verified']} files are whole")
    out.print(table)
    batches = sorted({row["batch"] for row in report["memory"]})
    memory = Table("context", *(f"batch {batch}" for batch in batches), title="weights + bfloat16 cache, GiB")
    for context in sorted({row["context"] for row in report["memory"]}):
        totals = {row["batch"]: row["total"] for row in report["memory"] if row["context"] == context}
        memory.add_row(f"{context:,}", *(f"{totals[batch] / 2**30:,.2f}" for batch in batches))
    out.print(memory)
    if report["problems"]:
        out.print("does not fit:", style="red")
        for problem in report["problems"]:
            out.print("  " + problem, markup=False, soft_wrap=True)
