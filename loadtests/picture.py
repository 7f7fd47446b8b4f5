"""TTFT against arrival rate with the SLO, attainment and λ*: one PNG."""

import io
from typing import TYPE_CHECKING

from loadtests.result import Result, Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"p50": "#7fb3d5", "p95": "#1f618d", "p99": "#8e44ad"}
# Colour and marker of a step, by its verdict.
MARKS = {
    "pass": ("#1e8449", "o"),
    "fail": ("#c0392b", "X"),
    "inconclusive": ("#b9770e", "D"),
    "invalid": ("#7f8c8d", "s"),
}
LIMIT = "#c0392b"
# Beyond this multiple of the SLO the exact TTFT no longer matters, but the knee must be visible.
TOP_OF_SLO = 4.0


def ttft_against_rate(result: Result) -> bytes:
    """The picture of a result as PNG. Quantiles that failed requests made infinite are drawn as
    arrows at the upper edge."""
    # Here and not above: matplotlib takes a second to import, and the Job never draws.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.8), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    _ttft(upper, result)
    _attainment(lower, result)
    for axes in (upper, lower):
        _capacity(axes, result, label=axes is upper)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    rates = [step.rate_asked for step in result.steps]
    lower.set_xlim(0, max(rates, default=1.0) * 1.06)
    lower.set_xlabel("arrival rate, requests/s for one replica")
    # Above the axes, as all words: within them they would lie on lines.
    for axes in (upper, lower):
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8, frameon=False,
            borderaxespad=0.2,
        )  # fmt: skip
    figure.suptitle(title(result), fontsize=11, x=0.01, ha="left")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def title(result: Result) -> str:
    """Model, commit and verdict; says if something is simulated."""
    metadata = result.profile.metadata
    commit = str(metadata.get("commit") or "")[:12]
    name = str(metadata.get("model") or result.profile.model)
    parts = [name + (f" @ {commit}" if commit else ""), result.verdict.upper()]
    if result.profile.simulated:
        parts.append(f"simulated: {', '.join(result.profile.simulated)}")
    return "   ·   ".join(parts)


def _ttft(axes: "Axes", result: Result) -> None:
    limit = result.profile.slo.ttft_p95_ms
    values = [v for step in result.steps for v in _quantiles(step).values() if v is not None]
    top = min(max([*values, limit]) * 1.15, TOP_OF_SLO * limit)
    rates = [step.rate_asked for step in result.steps]
    for name, colour in COLOURS.items():
        heights = [_quantiles(step)[name] for step in result.steps]
        drawn = [top * 1.5 if height is None else height for height in heights]
        axes.plot(rates, drawn, color=colour, marker="o", markersize=4, label=f"TTFT {name}")
    for step in result.steps:
        low, high = step.ttft_p95_low_ms, step.ttft_p95_high_ms
        if low is not None:
            ends = [low, top * 1.5 if high is None else high]
            axes.plot([step.rate_asked] * 2, ends, color=COLOURS["p95"], alpha=0.4, linewidth=4)
        beyond = [v for v in _quantiles(step).values() if v is None or v > top]
        if beyond:
            axes.annotate(
                "↑",
                (step.rate_asked, top),
                ha="center",
                va="top",
                color=COLOURS["p95"],
                fontsize=14,
                annotation_clip=False,
            )
    axes.axhline(limit, color=LIMIT, linestyle="--", linewidth=1.2, label=f"SLO: p95 {limit:g} ms")
    required = result.profile.slo.required_rate
    axes.axvline(
        required,
        color="#34495e",
        linestyle=":",
        linewidth=1.2,
        label=f"required: {required:g} req/s",
    )
    axes.set_ylim(0, top)
    axes.set_ylabel("time to first token, ms")


def _attainment(axes: "Axes", result: Result) -> None:
    told: set[str] = set()
    for step in sorted(result.steps, key=lambda step: list(MARKS).index(step.verdict)):
        below = step.attainment - step.attainment_low
        above = step.attainment_high - step.attainment
        colour, marker = MARKS[step.verdict]
        axes.errorbar(
            step.rate_asked,
            step.attainment,
            yerr=[[max(0.0, below)], [max(0.0, above)]],
            color=colour,
            marker=marker,
            markersize=6,
            capsize=3,
            linestyle="none",
            label=None if step.verdict in told else step.verdict,
        )
        told.add(step.verdict)
    share = result.profile.slo.attainment
    axes.axhline(
        share, color=LIMIT, linestyle="--", linewidth=1.2, label=f"SLO: {share:.0%} of requests"
    )
    axes.set_ylim(-0.05, 1.08)
    axes.set_yticks([0, 0.5, 1], minor=False)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("requests within SLO")


def _capacity(axes: "Axes", result: Result, label: bool) -> None:
    """λ* with its interval as a band; the knee lies within."""
    rates = result.capacity
    if rates.estimate <= 0:
        return
    text = f"λ* {rates.bounds(result.profile.mode)[0]}"
    if result.in_flight_at_capacity is not None:
        text += f", L* {result.in_flight_at_capacity:.1f} in flight"
    named = text if label else None
    if rates.upper is not None:
        # Of a ladder only the band is known, and no line is drawn in it.
        band = named if result.profile.mode != "search" else None
        axes.axvspan(rates.lower, rates.upper, color="#f4d03f", alpha=0.22, linewidth=0, label=band)
    if rates.upper is None or result.profile.mode == "search":
        axes.axvline(rates.estimate, color="#b7950b", linewidth=1.6, label=named)


def _quantiles(step: Step) -> dict[str, float | None]:
    return {"p50": step.ttft_ms.p50, "p95": step.ttft_ms.p95, "p99": step.ttft_ms.p99}
