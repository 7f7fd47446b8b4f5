"""Charts of the HTML report: inline SVG, a value under the pointer, series that can be hidden, and
no script or host needed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import count

from loadtests.result import Result

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 960, 320, 70, 30, 44, 30
TICKS = 5  # of an axis, or one or two less
COLOURS = ("#7fb3d5", "#1f618d", "#8e44ad", "#b9770e", "#1e8449", "#c0392b")
MOST_POINTS = 1500  # of a series

Points = Sequence[tuple[float, float]]


def charts(result: Result, rows: Iterable[Mapping[str, object]]) -> list[str]:
    """The charts of a result, as HTML: TTFT by rate, and of its raw `rows`, if there are, in-flight
    and waiting over time, and TTFT over the time of the decisive step."""
    steps, slo = result.steps, result.profile.slo
    by_rate = {
        f"TTFT {name}": [
            (step.rate_asked, value)
            for step in steps
            if (value := getattr(step.ttft_ms, name)) is not None
        ]
        for name in ("p50", "p95", "p99")
    }
    number = count()
    rates = result.capacity
    band = None if rates.upper is None or not rates.estimate else (rates.lower, rates.upper)
    made = [
        _chart(
            next(number),
            "TTFT by arrival rate; dashed: SLO, band: λ*",
            ("arrival rate, req/s", "ms"),
            by_rate,
            slo.ttft_p95_ms,
            band,
        )
    ]
    listed = list(rows)
    samples = [(_number(r["time_ns"]), r["values"]) for r in listed if r.get("row") == "server"]
    if samples:
        start = samples[0][0]
        queue: dict[str, list[tuple[float, float]]] = {"running": [], "waiting": []}
        for time_ns, values in samples:
            for name, points in queue.items():
                if isinstance(values, Mapping):
                    value = _number(values.get(f"vllm:num_requests_{name}", 0.0))
                    points.append(((time_ns - start) / 1e9, value))
        made.append(_chart(next(number), "In the engine over time", ("time, s", "requests"), queue))
    failed = [step for step in steps if step.verdict == "fail"]
    shown = result.step_at_required_rate() or next(iter([*failed, *steps]), None)
    if shown is not None:
        ttft = [
            (_number(r["scheduled"]) / 1e9, (min(firsts) - _number(r["scheduled"])) / 1e6)
            for r in listed
            if r.get("rate") == shown.rate_asked and r.get("phase") == "measure" and not r["error"]
            if (
                firsts := [
                    _number(r[name])
                    for name in ("first_content", "first_reasoning")
                    if r.get(name) is not None
                ]
            )
        ]
        if ttft:
            start = min(at for at, _ in ttft)
            points = [(at - start, value) for at, value in sorted(ttft)]
            made.append(
                _chart(
                    next(number),
                    f"TTFT over time at {shown.rate_asked:g} req/s",
                    ("time, s", "ms"),
                    {"TTFT": points},
                    slo.ttft_p95_ms,
                )
            )
    return made


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _chart(
    number: int,
    title: str,
    axes: tuple[str, str],
    series: Mapping[str, Points],
    limit: float | None = None,
    band: tuple[float, float] | None = None,
) -> str:
    """`axes`: their names, each ending with its unit."""
    units = [name.rpartition(", ")[2] for name in axes]
    every = [point for points in series.values() for point in points] or [(0.0, 0.0)]
    right = max(x for x, _ in every) or 1.0
    highest = max([y for _, y in every]) or 1.0
    top = min(highest, 4 * limit) if limit else highest
    top = max(top, limit or 0.0) * 1.08

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            round(LEFT + (WIDTH - LEFT - RIGHT) * x / right, 1),
            round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(y, top) / top, 1),
        )

    parts, boxes, rules = [], [], []
    if band:
        (x0, _), (x1, _) = at(band[0], 0), at(min(band[1], right), 0)
        parts.append(
            f'<rect x="{x0}" y="{TOP}" width="{max(1.0, x1 - x0):.1f}" '
            f'height="{HEIGHT - BOTTOM - TOP}" fill="#f4d03f" opacity=".3">'
            f"<title>λ* {band[0]:.4g} to {band[1]:.4g} {units[0]}</title></rect>"
        )
    for x in _ticks(right):
        parts.append(
            f'<text x="{at(x, 0)[0]}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:,g}</text>'
        )
    for y in _ticks(top):
        py = at(0, y)[1]
        parts.append(f'<text x="{LEFT - 6}" y="{py + 4}" text-anchor="end">{y:,g}</text>')
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py}" y2="{py}" stroke="#e5e8e8"/>'
        )
    if limit:
        y = at(0, limit)[1]
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#c0392b" '
            f'stroke-dasharray="6 4"><title>SLO {limit:g} {units[1]}</title></line>'
        )
    for i, (name, points) in enumerate(series.items()):
        colour, key = COLOURS[i % len(COLOURS)], f"c{number}s{i}"
        points = points[:: -(-len(points) // MOST_POINTS) or 1]
        line = " ".join("{},{}".format(*at(x, y)) for x, y in points)
        dots = "".join(
            '<circle cx="{}" cy="{}" r="3.5" fill="{}">'.format(*at(x, y), colour)
            + f"<title>{escape(name)}: {y:.4g} {units[1]} at {x:.4g} {units[0]}</title></circle>"
            for x, y in points
        )
        drawn = (
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.4"/>{dots}'
        )
        parts.append(f'<g class="{key}">{drawn}</g>')
        boxes.append(
            f'<label style="color:{colour}"><input type="checkbox" id="{key}" checked> '
            f"{escape(name)}</label>"
        )
        rules.append(f"section:has(#{key}:not(:checked)) .{key}{{display:none}}")
    return (
        f"<style>{''.join(rules)}</style><h2>{escape(title)}</h2>{' '.join(boxes)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}'
        f'<text x="{(WIDTH + LEFT - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{axes[0]}'
        f'</text><text x="{LEFT - 6}" y="14" text-anchor="end">{axes[1]}</text></svg>'
    )


def _ticks(end: float) -> list[float]:
    """Round numbers from 0 to `end` at most."""
    rough = end / TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * (1 - 1e-9))
    return [i * step for i in range(math.floor(end / step * (1 + 1e-9)) + 1)]
