"""The command ``specsa``. What is heavy beside JAX is imported inside the commands."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jax
import typer
from typer.exceptions import TyperException

from specsa_jax.checkpoints.cli import convert, inspect
from specsa_jax.planning.cli import profile
from specsa_jax.precision_cli import precision as measure_precision
from specsa_jax.precision_cli import schedule as search_schedule
from specsa_jax.terminal import clear_errors, hear_interrupts, named_options, show_table
from specsa_jax.training.cli import train
from specsa_jax.training.draft_cli import train_draft

if TYPE_CHECKING:
    from rich.console import Console

    from specsa_jax.engine import Engine
    from specsa_jax.planning.planner import Decision, Planner
    from specsa_jax.results import Result
    from specsa_jax.strategy import Strategy

# A file of the standard library that the embedded model has not seen (its path is in the held-out split), up to a
# comment in its middle. The text before it is the same in Python 3.11 and 3.12.
DEFAULT_PROMPT = "multiprocessing/connection.py"
DEFAULT_CUT = "# Definitions for connections based on sockets\n#\n"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="SpecSA-JAX: speculative decoding for native sparse attention models.\n\nExample:  specsa generate --compare",
)
app.command()(train)
app.command()(convert)
app.command()(inspect)
app.command()(train_draft)
app.command("schedule")(search_schedule)
app.command("precision")(measure_precision)
app.command()(profile)


@app.callback()
def _app() -> None:
    # Compiled programs outlive the process; a cache that the user has set up stays in charge. JAX, which is imported by
    # now, has read its variables.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(Path(cache) / "specsa-jax" / "xla"))


@app.command()
def generate(
    context: typer.Context,
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="UTF-8 text to continue; '-': standard input. Several make a batch. "
            "Default: a source file of the standard library, cut in the middle."
        ),
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="'embedded', or a checkpoint directory.")] = "embedded",
    max_new_tokens: Annotated[int, typer.Option(help="Token budget of each sequence.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k most probable tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the smallest set of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Sequence i samples with seed + i.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a sequence; repeatable.")] = None,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the most probable one's.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens there already are less likely.")] = 1.0,
    drafter: Annotated[
        str,
        typer.Option(
            help="Who drafts: lookup; head or head:PATH, trained; self, the model with fewer blocks; model:CHECKPOINT; "
            "none; your own as package.module:Name; a+b: a where it has a draft, else b."
        ),
    ] = "lookup",
    tree: Annotated[
        str,
        typer.Option(
            help="Shape of a draft: chain:K, K tokens in a row; 4-2-1, so many children a node, by depth; best:K or "
            "best:K:DEPTH, the K likeliest nodes. At most 127 tokens, a page deep."
        ),
    ] = "chain:5",
    traversal: Annotated[
        str,
        typer.Option(help="Order of a tree's nodes, breadth or depth first; kernels serve adjacent ones together."),
    ] = "breadth",
    acceptance: Annotated[
        str, typer.Option(help="Which drafts stand: coupled, rejection, block, or (lossy) typical.")
    ] = "coupled",
    precision: Annotated[
        str, typer.Option(help="exact; strict: the bits of decoding one at a time, slower; approx: may be lossy.")
    ] = "exact",
    schedule: Annotated[
        str,
        typer.Option(
            help="Which layers select blocks, in class approx: a letter a layer, F (refresh) or S (reuse); every:K; "
            "searched:K, stored by specsa schedule; all."
        ),
    ] = "all",
    drop_compressed: Annotated[
        bool, typer.Option("--drop-compressed", help="Reuse layers drop their compressed branch's output.")
    ] = False,
    shared: Annotated[int, typer.Option(help="In class approx: so many adjacent queries share one's index.")] = 0,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Class approx admits what was measured (specsa precision) at most so far from exact, nats."),
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Or: with the same most probable token after at least this fraction.")
    ] = None,
    implementation: Annotated[
        str, typer.Option(help="Attention by 'pallas' (GPU kernels) or 'xla'; 'auto': pallas where it runs.")
    ] = "auto",
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="A planner chooses drafter, tree, groups and (class approx) schedule, and goes on "
            "choosing; in place of --drafter, --tree, --traversal, --acceptance, --schedule, --drop-compressed, "
            "--shared.",
        ),
    ] = False,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="What the planner goes by: a file of specsa profile. Default: the checkpoint's own for this "
            "kind of device, or else counted bytes."
        ),
    ] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Take a profile of another device, dtype or implementation.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="As --plan; and print what was considered, predicted and observed.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also decode one token at a time, and state what speculation brings.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object, last.")] = False,
) -> None:
    """Continue text speculatively: the continuation as it comes, then a table.

    Example:  specsa generate --prompt-file src/main.py --max-new-tokens 128 --compare
    Example:  specsa generate --prompt-file src/main.py --explain

    Exit codes: 0 done, 2 bad input, 130 interrupted.
    """
    from rich.console import Console

    # Text goes to standard output as it comes; what is about it, to standard error, unless nothing else follows.
    notes = Console(stderr=True, highlight=False)
    with clear_errors(notes):
        texts = _prompts(prompt_file or [])
        plan = plan or explain
        strategy: Strategy | Planner
        if plan:
            strategy = _planner(context, precision)
        elif profile is not None or allow_mismatch:
            raise ValueError("profile, allow_mismatch: got one without a planner, expected --plan or --explain too")
        else:
            strategy = _strategy(context, drafter, tree, traversal, acceptance, precision, checkpoint)
            if drop_compressed and schedule == "all":
                raise ValueError("drop_compressed: given with schedule 'all', which has no reuse layers, expected one "
                                 "that has")  # fmt: skip
            if shared:
                strategy = replace(strategy, group=shared, group_mode="shared")
            strategy = replace(strategy, schedule=schedule, keep_compressed=not drop_compressed)
        from specsa_jax.engine import Engine
        from specsa_jax.sampling import SamplingParams

        first = SamplingParams(temperature, top_k, top_p, seed, min_p, repetition_penalty)
        with notes.status("loading the model"):
            engine = Engine.from_pretrained(
                checkpoint, implementation=None if implementation == "auto" else implementation, profile=profile,
                allow_mismatch=allow_mismatch,
            )  # fmt: skip
        arguments: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "stop": stop or (), "max_kl": max_kl, "min_top1": min_top1,
            "sampling": [replace(first, seed=(first.seed + index) % 2**32) for index in range(len(texts))],
        }  # fmt: skip
        shown = _stream(engine, texts, {**arguments, "strategy": strategy}, notes)
        report = _report(shown, engine)
        if compare:
            report |= _compare(engine, texts, {**arguments, "strategy": strategy}, notes)
        # Why tokens may differ although nothing is wrong.
        reason = ""
        if temperature > 0 and not plan and acceptance != "coupled":
            reason = f"{acceptance} acceptance keeps the law of tokens, not the tokens"
            reason = "typical acceptance is lossy" if acceptance == "typical" else reason
        _table(report, notes, reason)
        if explain:
            _explain(shown.stats.plan, engine, notes)
    if json_output:
        print(json.dumps(report))


@app.command()
def tune(
    names: Annotated[list[str] | None, typer.Argument(help="Parts of names of benchmark specs; none: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="The data file; by default the one that the kernels read.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds after which nothing else is begun.")] = float("inf"),
    again: Annotated[bool, typer.Option("--again", help="Measure anew what the file holds.")] = False,
) -> None:
    """Measure the kernels' configs on this GPU and keep the fastest, in a data file per device; resumable.

    Example:  specsa tune B8-T8-H32x8 --budget 600

    Exit codes: 0 done or budget spent, 2 bad input or no GPU, 130 interrupted.
    """
    from rich.console import Console

    with clear_errors(Console(stderr=True, highlight=False)):
        from pallas_kernels import _dispatch
        from pallas_kernels.tune import run

        if reason := _dispatch.device_limit():
            raise ValueError(reason)
        run(names or (), out, budget, again)


def console() -> None:
    """The console command: :func:`main` in a process of its own."""
    hear_interrupts()
    try:
        main()
    except SystemExit as end:
        if end.code != 130:
            raise
        # XLA may be compiling still: waiting for its threads, or taking them down, is what crashes then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)


def main() -> None:
    """A command. What the command line's parser refuses ends with one line too, and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except TyperException as error:
        if message := error.format_message():  # empty where the help was printed instead
            print(f"error: {message}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, typer.Abort):  # outside of what a command guards
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def _strategy(
    context: typer.Context, drafter: str, tree: str, traversal: Any, acceptance: Any, precision: Any, checkpoint: str
) -> Strategy:
    from specsa_jax.drafting import drafter_from_name
    from specsa_jax.strategy import Strategy

    made = drafter_from_name(drafter, checkpoint)
    if made is None and (named := named_options(context, ("tree", "traversal", "acceptance"))):
        raise ValueError(f"{', '.join(named)}: got a value with drafter 'none', which drafts nothing, expected none")
    return Strategy(made, tree, traversal, acceptance, precision)


def _planner(context: typer.Context, precision: Any) -> Planner:
    """A planner for the class. Raises ValueError where the command line names what it is to choose."""
    from specsa_jax.planning.planner import Planner

    chosen = ("drafter", "tree", "traversal", "acceptance", "schedule", "drop_compressed", "shared")
    if named := named_options(context, chosen):
        raise ValueError(f"{', '.join(named)}: got a value with --plan, which chooses it, expected one or the other")
    return Planner(precision)


def _prompts(files: list[Path]) -> list[tuple[str, str]]:
    """(name, text) of each prompt. Raises ValueError for a file that cannot be read, is not UTF-8, or is empty."""
    if not files:
        head, cut, _ = _read(Path(sysconfig.get_path("stdlib")) / DEFAULT_PROMPT).partition(DEFAULT_CUT)
        return [(f"the beginning of {DEFAULT_PROMPT}", head + cut)]
    if sum(str(file) == "-" for file in files) > 1:
        raise ValueError("prompt_file: got '-' twice, expected standard input at most once")
    return [("standard input" if str(file) == "-" else str(file), _read(file)) for file in files]


def _read(file: Path) -> str:
    """The text of a prompt file. Raises ValueError that names it."""
    try:
        text = (sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt_file: {file}: not UTF-8 at byte {error.start} ({error.reason})") from error
    except OSError as error:
        raise ValueError(f"prompt_file: got {str(file)!r}, expected a readable file: {error.strerror}") from error
    if not text:
        raise ValueError(f"prompt_file: {file}: is empty, expected a prompt")
    return text


def _stream(engine: Engine, prompts: list[tuple[str, str]], arguments: dict[str, Any], notes: Console) -> Result:
    """Generates; one sequence is printed as it comes, those of a batch one after the other."""
    alone = len(prompts) == 1
    stream = engine.stream([text for _, text in prompts], **arguments)
    status = notes.status("compiling, and reading the prompt")
    status.start()
    try:
        for chunk in stream:
            if alone:
                status.stop()
                print(chunk.text, end="", flush=True)
    finally:
        status.stop()
    assert stream.result is not None
    for (name, _), generation in zip(prompts, stream.result, strict=True):
        if not alone:
            print(f"── {name}")  # which tells texts apart wherever they go
            print(generation.text, end="")
        print(flush=True)
    return stream.result


def _report(result: Result, engine: Engine) -> dict[str, Any]:
    import jax

    stats = result.stats
    return {
        **stats.to_dict(),
        "texts": [generation.text for generation in result],
        "finish": [generation.finish for generation in result],
        "batch": len(result),
        "device": jax.devices()[0].device_kind,
        "dtype": str(engine.dtype),
        "implementation": engine.implementation,
    }


def _compare(
    engine: Engine, prompts: list[tuple[str, str]], arguments: dict[str, Any], notes: Console
) -> dict[str, Any]:
    """Both loops, compiled and warm, without streaming: best of three each, in turns."""
    import numpy as np

    from specsa_jax.strategy import Strategy

    texts, strategy = [text for _, text in prompts], arguments["strategy"]
    if not isinstance(strategy, Strategy):  # a planner
        strategy = Strategy(None, precision=strategy.precision)
    plain = {**arguments, "strategy": strategy, "speculate": False}
    with notes.status("comparing with one token at a time"):
        runs = [(engine.generate(texts, **plain), engine.generate(texts, **arguments)) for _ in range(3)]
    baseline = min((run[0].stats for run in runs), key=lambda stats: stats.decode_seconds)
    speculative = min((run[1].stats for run in runs), key=lambda stats: stats.decode_seconds)
    identical = all(
        np.array_equal(a.tokens, b.tokens) for plain, drafted in runs for a, b in zip(plain, drafted, strict=True)
    )
    compiled = sum(stats.compile_seconds for run in runs for stats in (run[0].stats, run[1].stats))
    return {
        "identical": identical,
        "speedup": speculative.tokens_per_second / baseline.tokens_per_second,
        "tokens_per_second": speculative.tokens_per_second,
        "baseline_tokens_per_second": baseline.tokens_per_second,
        "decode_seconds": speculative.decode_seconds,
        "baseline_decode_seconds": baseline.decode_seconds,
        "prefill_seconds": speculative.prefill_seconds,
        "planning_seconds": speculative.planning_seconds,
        "baseline_compile_seconds": compiled,
    }


def _histogram(counts: Sequence[int]) -> str:
    """A line with a bar for each number of accepted tokens."""
    most = max(counts, default=0) or 1
    return "\n".join(f"{n:3} {count:6,} {'█' * round(24 * count / most)}" for n, count in enumerate(counts))


def _table(report: dict[str, Any], notes: Console, reason: str = "") -> None:
    """Prints what there is to know of a run; ``reason``: why its tokens may differ from those of one at a time."""
    from rich.table import Table

    table = Table(title=report["strategy"], show_header=False, title_justify="left")
    table.add_column(style="bold")

    def row(name: str, value: str) -> None:
        table.add_row(name, value)

    row("prompt tokens", f"{report['prompt_tokens']:,} in {report['batch']} sequence(s)")
    row("new tokens", f"{report['new_tokens']:,}, ended by {', '.join(sorted(set(report['finish'])))}")
    row("tokens/s", f"{report['tokens_per_second']:,.1f}")
    if "speedup" in report:
        row("  one at a time", f"{report['baseline_tokens_per_second']:,.1f}")
        row("  speed-up", f"{report['speedup']:.2f}x")
        row("  tokens identical", "yes" if report["identical"] else f"no: {reason}" if reason else "NO")
    row("mean acceptance length", f"{report['mean_acceptance_length']:.2f} tokens a step, the target's own included")
    if report["acceptance_per_position"]:
        row("acceptance per position", "  ".join(f"{rate:.2f}" for rate in report["acceptance_per_position"]))
        row("steps by drafts accepted", _histogram(report["accepted_histogram"]))
    row("drafted, accepted", f"{report['drafted']:,}, {report['accepted']:,} in {report['steps']:,} steps")
    if report["plan"]:
        row("planning", f"{1e3 * report['planning_seconds']:.1f} ms, "
                        f"{report['planning_seconds'] / report['decode_seconds']:.1%} of decoding")  # fmt: skip
    row("seconds", f"prefill {report['prefill_seconds']:.2f}, decode {report['decode_seconds']:.2f}, "
                   f"compile {report['compile_seconds']:.1f}")  # fmt: skip
    row("cache", f"{report['cache_bytes'] / 2**20:.1f} MiB of {report['dtype']} on {report['device']}")
    notes.print(table)


def _explain(plan: Sequence[Decision], engine: Engine, notes: Console) -> None:
    """What a planner considered, predicted and observed: a table of its decisions, each with its best options."""
    from rich.table import Table

    basis = "a profile" if engine.costs.measured else "counted bytes and measured bandwidth"
    table = Table(title=f"the planner's decisions, from {basis}; tokens and ms of a step", title_justify="left")
    for name in ("step", "strategy", "tokens", "ms", "tokens/s", ""):
        table.add_column(name, justify="left" if name in ("strategy", "") else "right", no_wrap=name == "strategy")
    for decision in plan:
        shown = list(decision.options[:4])
        shown += [one for one in decision.options[4:] if one.strategy in (decision.chosen, "autoregressive")]
        for index, one in enumerate(shown):
            taken = one.strategy == decision.chosen
            table.add_row(
                f"{decision.steps}" if not index else "", ("> " if taken else "  ") + one.strategy,
                f"{one.acceptance_length:.2f}", f"{1e3 * one.step_seconds:.2f}", f"{one.tokens_per_second:,.0f}",
                decision.reason if taken else "" if one.compiled else "not compiled",
            )  # fmt: skip
        table.add_row(
            "", f"  observed in {decision.observed_steps} steps", f"{decision.observed_acceptance_length:.2f}", "",
            f"{decision.observed_tokens_per_second:,.0f}", "", end_section=True, style="dim",
        )  # fmt: skip
    show_table(notes, table)


if __name__ == "__main__":
    main()
