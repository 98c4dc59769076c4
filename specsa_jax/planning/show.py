"""A profile in pictures: PNG files, and one HTML page that holds them and needs nothing else."""

from __future__ import annotations

import base64
import heapq
import html
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specsa_jax.checkpoints.store import write_text
from specsa_jax.config import ModelConfig
from specsa_jax.drafting import parse_tree
from specsa_jax.planning.costs import Costs
from specsa_jax.planning.predict import Acceptance, logit
from specsa_jax.planning.profile import Point, Profile, StepTime
from specsa_jax.planning.space import profiled
from specsa_jax.schedule import Sharing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of what the children drafted before it leave, a sibling catches this much of what the first one would.
SIBLING = 0.5
ACCEPTANCES = tuple(np.linspace(0.0, 0.975, 40).tolist())
CHAINS = ("chain:1", "chain:2", "chain:4", "chain:8", "chain:16", "chain:32", "chain:63")


def exact_chains(profile: Profile) -> dict[Point, StepTime]:
    """The steps of class exact, ungrouped, on chains."""
    return {s.point: s for s in profile.steps
            if s.point.chain and s.point.precision == "exact" and s.point.sharing == Sharing()}  # fmt: skip


def describe_error(profile: Profile) -> str:
    """The error of interpolated step times, in words."""
    error = profile.interpolation
    if error is None:
        return "fewer than 3 step times: nothing to say of the error between them"
    return (f"step times between the measured: relative error {error.median:.1%} median, {error.p90:.1%} at 90 %, "
            f"{error.worst:.1%} at worst (each of {error.points} from all the others)")  # fmt: skip


def expected_tokens(tree: str, acceptance: float) -> float:
    """Tokens that a step gives, the target's own included, if a first child stands with probability ``acceptance``
    wherever its parent does, and a sibling, where those before it do not, with SIBLING times that of the one before.

    A chain of K gives (1 − a^(K+1)) / (1 − a). Best-first trees hold the likeliest nodes.
    """
    template = parse_tree(tree)
    if template.is_static:
        level, total = 1.0, 1.0
        for children in template.branching:
            level *= sum(_siblings(acceptance, children))
            total += level
        return total
    ranks = _siblings(acceptance, template.children)
    total, waiting = 1.0, [(-chance, 1) for chance in ranks]
    heapq.heapify(waiting)
    for _ in range(template.nodes):
        if not waiting:
            break
        chance, depth = heapq.heappop(waiting)
        total -= chance
        if depth < template.depth:
            for rank in ranks:
                heapq.heappush(waiting, (chance * rank, depth + 1))
    return total


def _siblings(acceptance: float, count: int) -> list[float]:
    """Probability that it is child i that stands, of ``count`` children."""
    left, found = 1.0, []
    for index in range(count):
        found.append(left * acceptance * SIBLING**index)
        left -= found[-1]
    return found


def best_trees(
    costs: Costs, drafter: str, trees: Sequence[str], batch: int, contexts: Sequence[int], acceptances: Sequence[float]
) -> np.ndarray:
    """What gives most tokens a second, int [acceptances, contexts]: a place in ``trees``, or their number for one token
    at a time."""
    best = np.empty((len(acceptances), len(contexts)), int)
    for column, context in enumerate(contexts):
        seconds = []
        for tree in trees:
            template = parse_tree(tree)
            width = template.nodes + 1
            step = costs.step(Point(batch, context, width, template.is_chain))
            seconds.append(step + costs.draft(drafter, tree, width, batch, context))
        seconds.append(costs.step(Point(batch, context, 1)))
        for row, acceptance in enumerate(acceptances):
            tokens = [*(expected_tokens(tree, acceptance) for tree in trees), 1.0]
            best[row, column] = int(np.argmax(np.array(tokens) / seconds))
    return best


def best_drafts(
    costs: Costs, acceptance: Acceptance, drafts: Sequence[tuple[str, str]], batch: int, contexts: Sequence[int],
    chances: Sequence[float],
) -> np.ndarray:  # fmt: skip
    """What gives a batch most tokens a second, int [chances, contexts]: a place in ``drafts`` (drafter, tree), or their
    number for one token at a time.

    Args:
      acceptance: of priors. A drafter has a draft as often as these say, and its tokens' log-odds to stand differ from
        other drafters' and positions' as these say.
      chances: that a chain's first token stands: the mean of the drafters, in log-odds.
    """
    templates = [parse_tree(tree) for _, tree in drafts]
    firsts = [logit(acceptance.chances(drafter, "chain:1", 1)) for drafter in dict(drafts)]
    moved = logit(np.asarray(chances)) - np.mean(firsts)
    outlooks = np.array([
        [acceptance.outlook(*draft, t.depth, shift=shift) for draft, t in zip(drafts, templates, strict=True)]
        for shift in moved.tolist()
    ])  # fmt: skip
    lengths, shares = outlooks[..., 0], outlooks[..., 1]
    some = 1.0 - (1.0 - shares) ** batch  # where nobody in the batch has a draft, a step decodes one token
    best = np.empty((len(chances), len(contexts)), int)
    for column, context in enumerate(contexts):
        one = costs.step(Point(batch, context, 1))
        whole, draft = np.array([
            (costs.step(Point(batch, context, t.nodes + 1, t.is_chain)),
             costs.draft(*names, t.nodes + 1, batch, context))
            for names, t in zip(drafts, templates, strict=True)
        ]).T  # fmt: skip
        speeds = lengths / (some * whole + (1.0 - some) * one + draft)
        best[:, column] = np.pad(speeds, ((0, 0), (0, 1)), constant_values=1.0 / one).argmax(axis=1)
    return best


# --- pictures ---------------------------------------------------------------------------------------------------------


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_steps(profile: Profile, costs: Costs) -> Figure:
    """Step time against T: measured, with its range, and the cost model between; a panel for each batch."""
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator

    batches = sorted({s.point.batch for s in profile.steps})
    contexts = sorted({s.point.context for s in profile.steps})
    figure, axes = _figure(1, len(batches), 5.2, 4.0)
    for axis, batch in zip(axes[0], batches, strict=True):
        widths = [s.point.width for s in profile.steps if s.point.batch == batch]
        line = np.unique(np.geomspace(1, max(widths), 40).round().astype(int))
        for index, context in enumerate(contexts):
            color = colormaps["viridis"](0.85 * index / max(1, len(contexts) - 1))
            mine = [s for p, s in exact_chains(profile).items() if (p.batch, p.context) == (batch, context)]
            trees = [s for s in profile.steps if (s.point.batch, s.point.context) == (batch, context)
                     and not s.point.chain and s.point.sharing == Sharing()]  # fmt: skip
            if not mine and not trees:
                continue
            axis.plot(line, [1e3 * costs.step(Point(batch, context, int(t))) for t in line], color=color, lw=1.2,
                      label=f"{context:,} tokens")  # fmt: skip
            for steps, marker in ((mine, "o"), (trees, "^")):
                middle = 1e3 * np.array([s.seconds for s in steps])
                spread = 1e3 * np.array([[s.seconds - s.low, s.high - s.seconds] for s in steps]).reshape(-1, 2).T
                axis.errorbar([s.point.width for s in steps], middle, spread, fmt=marker, color=color, ms=4, lw=0.8)
        axis.set(title=f"batch {batch}", xlabel="T, tokens verified a step", xscale="log", yscale="log")
        axis.set_xticks(shown := [t for t in (1, 2, 3, 5, 9, 17, 33, 65, 128) if t <= max(widths)], map(str, shown))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("milliseconds a step")
    figure.suptitle("dots: chains, triangles: trees, bars: least and most; lines: interpolated", fontsize=8)
    return figure


def draw_overlap(profile: Profile) -> Figure:
    """Shared selected blocks per layer, by the distance of the two queries; a row for each context."""
    from matplotlib import colormaps

    contexts = sorted({o.context for o in profile.overlaps})
    figure, axes = _figure(len(contexts), 2, 5.2, 3.2)
    names = ("shared", "free")
    titles = ("all selected blocks", "without the forced ones")
    for row, context in zip(axes, contexts, strict=True):
        here = [o for o in profile.overlaps if o.context == context]
        distances = sorted({o.distance for o in here})
        for axis, name, title in zip(row, names, titles, strict=True):
            for index, distance in enumerate(distances):
                mine = sorted((o.layer, getattr(o, name)) for o in here if o.distance == distance)
                axis.plot(*zip(*mine, strict=True), "o-", ms=3.5, lw=1.2, label=f"{distance} apart",
                          color=colormaps["viridis"](0.85 * index / max(1, len(distances) - 1)))  # fmt: skip
            axis.set(title=f"behind {context:,} tokens, {title}", xlabel="layer", ylim=(0, 1.03))
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("fraction shared")
        row[0].legend(fontsize=8)
    return figure


def draw_regions(profile: Profile, costs: Costs) -> Figure:
    """Which tree gives most tokens a second, by context and acceptance; a row a batch, a column a drafter."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    batches = sorted({s.point.batch for s in profile.steps})
    drafters = list(dict.fromkeys(d.drafter for d in profile.drafts)) or ["lookup"]
    measured = {d.tree for d in profile.drafts if not parse_tree(d.tree).is_chain}
    trees = [*CHAINS, *sorted(measured)]
    known, contexts = _contexts(profile)
    colors = ["#e8e8e8", "#fde725", "#a0da39", "#4ac16d", "#1fa187", "#277f8e", "#365c8d", "#c04d7b", "#e58042",
              "#7d4ea1", "#a52c2c", "#5a5a5a"]  # fmt: skip
    order = [len(trees), *range(len(trees))]
    palette = {kind: colors[place % len(colors)] for place, kind in enumerate(order)}
    cmap = ListedColormap([palette[kind] for kind in range(len(trees) + 1)])
    norm = BoundaryNorm(np.arange(len(trees) + 2) - 0.5, len(trees) + 1)
    figure, axes = _figure(len(batches), len(drafters), 3.4, 3.0)
    seen: set[int] = set()
    for row, batch in zip(axes, batches, strict=True):
        for axis, drafter in zip(row, drafters, strict=True):
            best = best_trees(costs, drafter, trees, batch, contexts, ACCEPTANCES)
            seen |= set(np.unique(best).tolist())
            axis.pcolormesh(contexts, ACCEPTANCES, best, cmap=cmap, norm=norm, shading="nearest")
            axis.set(title=f"{drafter}, batch {batch}", xscale="log", xlabel="context, tokens")
            axis.set_xticks(known, [f"{c:,}" for c in known], fontsize=8)
            axis.minorticks_off()
        row[0].set_ylabel("acceptance of a drafted token")
    names = {index: trees[index] if index < len(trees) else "one token at a time" for index in order}
    patches = [Patch(facecolor=palette[kind], label=names[kind], edgecolor="#888") for kind in order if kind in seen]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=min(2 * len(drafters), len(patches)),
        fontsize=8,
        frameon=False,
    )
    return figure


def draw_winners(profile: Profile, costs: Costs, config: ModelConfig) -> Figure:
    """Which drafter and tree give most tokens a second, by context and acceptance; a row a batch, a column a kind of
    text."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    drafts = [(drafter, tree) for drafter, trees in profiled(profile, config) for tree in trees]
    # A hue a drafter, darker for larger drafts.
    hues = dict(zip(dict(drafts), itertools.cycle(("Blues", "Oranges", "Greens", "Purples", "Reds")), strict=False))
    colors = []
    for drafter, tree in drafts:
        sizes = sorted((parse_tree(other).nodes, other) for name, other in drafts if name == drafter)
        place = sizes.index((parse_tree(tree).nodes, tree))
        colors.append(colormaps[hues[drafter]](0.35 + 0.6 * place / max(1, len(sizes) - 1)))
    colors.append((1.0, 1.0, 1.0, 1.0))
    names = [*map(" ".join, drafts), "one token at a time"]
    batches = sorted({s.point.batch for s in profile.steps})
    texts = list(dict.fromkeys(prior.text for prior in profile.priors))
    known, contexts = _contexts(profile)
    figure, axes = _figure(len(batches), len(texts), 5.2, 3.4)
    seen: set[int] = set()
    for row, batch in zip(axes, batches, strict=True):
        for axis, text in zip(row, texts, strict=True):
            acceptance = Acceptance(prior for prior in profile.priors if prior.text == text)
            best = best_drafts(costs, acceptance, drafts, batch, contexts, ACCEPTANCES)
            seen |= set(np.unique(best).tolist())
            axis.pcolormesh(contexts, ACCEPTANCES, np.array(colors)[best], shading="nearest")
            axis.set(title=f"{text}, batch {batch}", xscale="log", xlabel="context, tokens")
            axis.set_xticks(known, [f"{c:,}" for c in known], fontsize=8)
            axis.minorticks_off()
        row[0].set_ylabel("chance of a first token")
    patches = [Patch(facecolor=colors[kind], label=names[kind], edgecolor="#888") for kind in sorted(seen)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _contexts(profile: Profile) -> tuple[list[int], list[int]]:
    """The measured contexts, and 25 from the shortest to the longest."""
    known = sorted({s.point.context for s in profile.steps})
    return known, [int(c) for c in np.geomspace(known[0], max(known[-1], known[0] + 1), 25)]


# --- files ------------------------------------------------------------------------------------------------------------


def write(profile: Profile, config: ModelConfig, page: Path) -> list[Path]:
    """``page`` (HTML, with the pictures inside) and PNG files beside it. Returns their paths.

    Raises ProfileError for a profile without step times, CheckpointError where nothing can be written.
    """
    costs = Costs.from_profile(profile, config)
    figures = {"steps": draw_steps(profile, costs), "regions": draw_regions(profile, costs)}
    if profile.priors:
        figures["winners"] = draw_winners(profile, costs, config)
    if profile.overlaps:
        figures["overlap"] = draw_overlap(profile)
    written, pictures = [], {}
    for name, figure in figures.items():
        path = page.with_name(f"{page.stem}-{name}.png")
        figure.savefig(path, dpi=120)
        pictures[name] = base64.b64encode(path.read_bytes()).decode()
        written.append(path)
    return [write_text(page, _page(profile, pictures)), *written]


def _page(profile: Profile, pictures: dict[str, str]) -> str:
    def picture(name: str, alt: str) -> str:
        if name not in pictures:
            return "<p>Not measured.</p>"
        return f'<img src="data:image/png;base64,{pictures[name]}" alt="{html.escape(alt)}">'

    steps = [(str(s.point.batch), f"{s.point.context:,}", str(s.point.width), "chain" if s.point.chain else "tree",
              _kind(s.point), *(f"{1e3 * value:.3f}" for value in (s.seconds, s.low, s.high)))
             for s in sorted(profile.steps, key=lambda s: (s.point.batch, s.point.context, s.point.width))]  # fmt: skip
    drafts = [(d.drafter, d.tree, str(d.batch), f"{d.context:,}", f"{1e3 * d.seconds:.3f}") for d in profile.drafts]
    prefills = [(str(p.batch), f"{p.tokens:,}", f"{p.seconds:.3f}") for p in profile.prefills]
    priors = [
        (p.drafter, p.tree, p.text, f"{p.context:,}", str(p.steps), f"{p.nodes / p.steps:.2f}",
         f"{1 + sum(n * count for n, count in enumerate(p.accepted)) / p.steps:.2f}", " ".join(map(str, p.accepted)))
        for p in profile.priors
    ]  # fmt: skip
    divergence = [(m.describe(), m.dtype, f"{m.mean_kl:.3g}", f"{m.top1:.4f}", f"{m.reach:,}")
                  for m in sorted(profile.measurements, key=lambda m: m.mean_kl)]  # fmt: skip
    facts = [
        ("device", profile.device), ("model", profile.fingerprint[:16]), ("dtype", profile.dtype),
        ("attention", profile.implementation), ("bandwidth", f"{profile.bandwidth / 1e9:,.1f} GB/s, copying"),
        ("matmul", f"{profile.flops / 1e12:,.2f} Tflop/s"), ("measuring took", f"{profile.seconds:,.0f} s"),
        ("versions", ", ".join(f"{name} {value}" for name, value in profile.versions.items())),
        ("calibration text", f"{text.source}, {text.tokens:,} tokens" if (text := profile.text) else "none"),
    ]  # fmt: skip
    sections = [
        ("", _rows((), facts)),
        ("Step time", picture("steps", "step time against T") + f"<p>{html.escape(describe_error(profile))}.</p>"),
        ("Which draft wins",
         picture("winners", "regions in which each drafter and tree wins") +
         "<p>Of all that the planner considers, most tokens a second in class exact. Drafters have a draft as often as "
         "on the calibration text, and differ from each other, tree by tree and position by position, as they did "
         "there; on a text on which all fare better or worse, all chances are moved alike in log-odds. The axis has "
         "the chance that a chain's first token stands, the mean of the drafters.</p>"),
        ("Which tree wins, of each drafter",
         picture("regions", "regions in which each tree wins") +
         "<p>Most tokens a second in class exact, if a drafted token is accepted with the given probability wherever "
         f"its parent is; in trees a sibling catches {SIBLING:g} times what the one before it would, of what is left. "
         "Acceptance differs between drafters: see below how they fared.</p>"),
        ("Overlap of selected blocks", picture("overlap", "shared blocks per layer")),
        ("How drafts fared on the calibration text",
         _rows(("drafter", "tree", "text", "context", "steps", "drafted a step", "tokens a step",
                "steps by tokens accepted, from 0"), priors)),
        ("Divergence of approximate strategies",
         _rows(("strategy", "dtype", "mean KL at most, nats", "top-1 at least", "up to context"), divergence)),
        ("Step times", _rows(("batch", "context", "T", "shape", "kind", "ms", "fastest", "slowest"), steps)),
        ("Drafting", _rows(("drafter", "tree", "batch", "context", "ms a step"), drafts)),
        ("Reading prompts", _rows(("batch", "tokens", "seconds"), prefills)),
    ]  # fmt: skip
    body = "\n".join((f"<h2>{html.escape(name)}</h2>" if name else "") + content for name, content in sections)
    title = f"Profile of {profile.device}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .15rem .8rem .15rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }}
</style></head><body><h1>{html.escape(title)}</h1>
{body}
</body></html>
"""


def _kind(point: Point) -> str:
    words = [point.sharing.describe()] if point.sharing.approximates else []
    words += [f"groups of {point.sharing.group}"] if point.sharing.group and not point.sharing.approximates else []
    return ", ".join([*words, *(["strict"] if point.precision == "strict" else [])]) or "exact"


def _rows(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return "<p>Not measured.</p>"
    head = "<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in names) + "</tr>" if names else ""
    cells = ("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{head}{''.join(cells)}</table>"
