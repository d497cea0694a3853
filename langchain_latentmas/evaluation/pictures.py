"""Pictures of evaluations, as PNG or SVG (extra `viz`)."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidRequest, MissingExtra
from .files import check_file
from .worth import CONDITIONS, Audit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .cloud import Cloud
    from .steps import Point

# Okabe and Ito's colours, which the colour-blind tell apart; they differ in lightness too.
BLUE, ORANGE, GREEN, GREY, LIGHT, DARK = "#0072B2", "#E69F00", "#009E73", "#8A8A8A", "#D9D9D9", "#222222"
OF_CONDITION = dict(zip(CONDITIONS, (BLUE, ORANGE, GREY, GREY, LIGHT, GREEN), strict=True))
COLOURS, MARKERS = (BLUE, ORANGE, GREEN, GREY), "os^Dv"
WIDTH, DPI = 8.0, 150  # inches; 1200 pixels, which a README shows at two thirds


def draw_audit(audit: Audit, path: str | Path) -> None:
    """Right answers under each condition with their intervals, a panel for each edge.

    Args:
        audit: The result.
        path: Ends in .png or .svg.

    Raises:
        MissingExtra: If matplotlib is not installed.
        InvalidRequest: If the path ends otherwise.
    """
    names = list(audit.edges[0].outcomes)
    figure = _figure(path, 0.75 + len(audit.edges) * (0.42 * len(names) + 0.75))
    panels = figure.subplots(len(audit.edges), 1, sharex=True, squeeze=False)[:, 0]
    for axes, edge in zip(panels, audit.edges, strict=True):
        outcomes = [edge.outcomes[name] for name in names]
        at = range(len(names))
        axes.barh(at, [o.accuracy for o in outcomes], color=[OF_CONDITION[name] for name in names], height=0.7)
        reach = [[o.accuracy - o.low for o in outcomes], [o.high - o.accuracy for o in outcomes]]
        axes.errorbar([o.accuracy for o in outcomes], at, xerr=reach, fmt="none", ecolor=DARK, capsize=3, lw=1.2)
        for i, outcome in enumerate(outcomes):
            axes.text(outcome.high + 1.5, i, f"{outcome.accuracy:.0f} %", va="center", color=DARK)
        axes.set_yticks(at, names)
        axes.invert_yaxis()
        axes.set_title("\n".join(textwrap.wrap(f"{edge.edge}: {edge.verdict}", 80)), loc="left", fontsize=10)
        _bare(axes, "left", "x")
    panels[-1].set_xlim(0, 109)
    panels[-1].set_xticks(range(0, 101, 20))
    panels[-1].set_xlabel(
        f"right answers, % ({audit.task}, {audit.n} questions; whiskers: {100 * audit.level:.0f} % Wilson interval)"
    )
    _save(figure, path)


def draw_steps(
    curves: Mapping[str, Sequence["Point"]], path: str | Path, *, levels: Mapping[str, float], about: str
) -> None:
    """Right answers against the latent steps of each thinker (LatentMAS, arXiv 2511.20639, figure 8).

    Args:
        curves: By the name of the line, its points in the order of their steps.
        path: Ends in .png or .svg.
        levels: Accuracies in % that do not depend on the steps, by name, such as that of text.
        about: Task, model and number of questions.

    Raises:
        MissingExtra: If matplotlib is not installed.
        InvalidRequest: If the path ends otherwise.
    """
    figure = _figure(path, 4.2)
    axes = figure.subplots()
    for (name, points), colour, marker in zip(curves.items(), (BLUE, ORANGE, GREEN), MARKERS, strict=False):
        steps = [point.steps for point in points]
        axes.fill_between(steps, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15, lw=0)
        axes.plot(
            steps, [p.accuracy for p in points], color=colour, marker=marker, lw=2, label=name, clip_on=False, zorder=3
        )
    for (name, level), colour in zip(levels.items(), (BLUE, ORANGE, GREEN), strict=False):
        axes.axhline(level, color=colour, ls=(0, (4, 3)), lw=1.3, label=name)
    axes.set_ylim(0, 101)
    axes.set_xlim(left=0)
    axes.set_xlabel("latent steps of each thinker")
    axes.set_ylabel("right answers, %")
    axes.set_title(f"{about}; bands: 95 % Wilson interval", loc="left", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    _bare(axes, "both", "y")
    _save(figure, path)


def draw_bars(summary: Mapping[str, Any], path: str | Path) -> None:
    """Output tokens and seconds of text against latent edges, from what `latentmas eval --json` printed.

    Args:
        summary: That document.
        path: Ends in .png or .svg.

    Raises:
        MissingExtra: If matplotlib is not installed.
        InvalidRequest: If the path ends otherwise, or the document is another one, or has no arrangement with both text
            and latent edges.
    """
    numbers = ("accuracy", "output_tokens", "seconds")
    try:
        rows = {(row["arrangement"], row["mode"]): {key: float(row[key]) for key in numbers} for row in summary["rows"]}
        teams = [a for a in dict.fromkeys(a for a, _ in rows) if {(a, "text"), (a, "latent")} <= rows.keys()]
        compared = {team: summary["comparisons"][team] for team in teams}
        ratios = {team: {key: float(compared[team][key] or 0) for key in numbers[1:]} for team in teams}
        n, about = summary["n"], f"{summary['task']}, {summary['n']} questions, {summary['model']['name']} model"
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(
            f"This is not what `latentmas eval --json` prints ({type(error).__name__}: {error})."
        ) from error
    if not teams:
        raise InvalidRequest("There is nothing to compare: no arrangement was run both as text and latent.")
    figure = _figure(path, 3.8)
    panels = figure.subplots(1, 2)
    units = (("output_tokens", "output tokens per question"), ("seconds", f"seconds for {n} questions"))
    for axes, (key, label) in zip(panels, units, strict=True):
        for j, (mode, colour) in enumerate((("text", ORANGE), ("latent", BLUE))):
            values = [rows[team, mode][key] for team in teams]
            at = [i + (j - 0.5) * 0.38 for i in range(len(teams))]
            axes.bar(at, values, 0.36, color=colour, label=mode)
            for i, value in enumerate(values):
                ratio = ratios[teams[i]][key] if mode == "latent" else 0.0  # 0 where the evaluation compares nothing
                shown = f"{value:,.0f}" if value >= 10 else f"{value:,.1f}"
                less = f"\n{ratio:.0f}× less" if ratio >= 10 else f"\n{ratio:.1f}× less" if ratio > 1 else ""
                axes.text(at[i], value, shown + less, ha="center", va="bottom", color=DARK)
        axes.set_xticks(range(len(teams)), [f"{t}\n{_accuracies(rows, t)}" for t in teams])
        axes.set_title(label, loc="left", fontsize=10)
        axes.margins(y=0.24)
        _bare(axes, "bottom", "y")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside upper right", ncols=2)
    figure.suptitle(about, fontsize=10, x=0.01, ha="left")
    _save(figure, path)


def draw_thoughts(cloud: "Cloud", path: str | Path, *, about: str) -> None:
    """Thoughts among token embeddings, in two principal components (LatentMAS, arXiv 2511.20639, figure 5).

    Args:
        cloud: The points.
        path: Ends in .png or .svg.
        about: Task, model and number of questions.

    Raises:
        MissingExtra: If matplotlib is not installed.
        InvalidRequest: If the path ends otherwise.
    """
    figure = _figure(path, 5.2)
    axes = figure.subplots()
    layers = (
        (cloud.vocabulary, LIGHT, ".", 8, 1.0, f"all {len(cloud.vocabulary)} tokens"),
        (cloud.thoughts, BLUE, "o", 9, 0.25, f"{len(cloud.thoughts)} thoughts"),
        (cloud.spoken, ORANGE, "^", 34, 1.0, f"{len(cloud.spoken)} tokens that text agents said"),
    )
    for points, colour, marker, size, alpha, label in layers:
        x, y = points[:, 0], points[:, 1]
        axes.scatter(x, y, s=size, c=colour, marker=marker, alpha=alpha, linewidths=0, label=label, rasterized=True)
    one, two = (100 * share for share in cloud.explained)
    axes.set_xlabel(f"first principal component of the tokens said ({one:.0f} % of their variance)")
    axes.set_ylabel(f"second one ({two:.0f} %)")
    figures = (
        f"coverage {100 * cloud.coverage:.0f} % (noise {100 * cloud.noise_coverage:.0f} %), "
        f"overlap {100 * cloud.overlap:.0f} % (noise {100 * cloud.noise_overlap:.0f} %)"
    )
    axes.set_title(f"{about}\n{figures}", loc="left", fontsize=10)
    legend = figure.legend(frameon=False, loc="outside lower center", ncols=3, columnspacing=1.0, handletextpad=0.1)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    _bare(axes, "both", None)
    _save(figure, path)


def draw_bench(result: Mapping[str, Any], path: str | Path) -> None:
    """A tick's milliseconds against rows, beside floor and plain loop, from what `latentmas bench --json` printed.

    Args:
        result: That document.
        path: Ends in .png or .svg.

    Raises:
        MissingExtra: If matplotlib is not installed.
        InvalidRequest: If the path ends otherwise, or nothing was measured.
    """
    kinds = list(dict.fromkeys(row["what"] for row in result["rows"]))
    if not kinds:
        raise InvalidRequest("There is nothing to draw: no size was measured; take more positions or fewer rows.")
    figure = _figure(path, 4.4)
    lengths = sorted({row["positions"] for row in result["rows"]})
    titles = {"think": "a thought for every row", "speak": "a token for every row"}
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        for i, length in enumerate(lengths):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
            cells = [row for row in result["rows"] if (row["what"], row["positions"]) == (kind, length)]
            at = [row["rows"] for row in cells]
            axes.plot(
                at, [row["ms"] for row in cells], color=colour, marker=marker, ms=4, label=f"{length:,} positions"
            )
            axes.plot(at, [row["full_lm_ms"] for row in cells], color=colour, ls=(0, (4, 3)), lw=1.2)
            axes.plot(at, [row["floor_ms"] for row in cells], color=colour, ls=":", lw=1.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        counts = sorted({row["rows"] for row in result["rows"]})
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("rows")
        axes.set_title(titles[kind], loc="left", fontsize=10)
        _bare(axes, "both", "y")
    first = figure.axes[0]
    first.set_ylabel("ms")
    for label, style in (("tick", "-"), ("plain loop", (0, (4, 3))), ("floor", ":")):
        first.plot([], [], color=DARK, ls=style, label=label)
    figure.legend(*first.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=6)
    machine, model = result["machine"], result["model"]
    where = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    about = f"{model['name']}, {model['dtype']}, {where}, {result['bandwidth_gb_s']:,.0f} GB/s copied"
    figure.suptitle(about, fontsize=10, x=0.01, ha="left")
    _save(figure, path)


def _accuracies(rows: Mapping[tuple[str, str], Mapping[str, Any]], team: str) -> str:
    return "\n".join(f"{mode} {rows[team, mode]['accuracy']:.0f} % right" for mode in ("text", "latent"))


def _figure(path: str | Path, height: float) -> "Figure":
    """An empty figure; refuses what `_save` could not write, before anything is computed for it."""
    if Path(path).suffix not in (".png", ".svg"):
        raise InvalidRequest(f"A picture's name must end in .png or .svg, not as {Path(path).name!r} does.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra.of("viz", "Pictures need matplotlib") from error
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def check_path(path: str | Path) -> None:
    """Refuses, before the work, what no picture can be written to; makes the folders above it.

    Raises:
        MissingExtra: If matplotlib is not installed.
        InvalidRequest: If the path ends neither in .png nor in .svg, or cannot be written.
    """
    _figure(path, 1)
    check_file(path)


def _bare(axes: "Axes", kept: str, grid: Any) -> None:
    for side in ("top", "right", *({"left": ["bottom"], "bottom": ["left"]}.get(kept, []))):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color="#E8E8E8", lw=0.8)


def _save(figure: "Figure", path: str | Path) -> None:
    import matplotlib

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # The same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "latentmas"}):
        figure.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else None, facecolor="white")
