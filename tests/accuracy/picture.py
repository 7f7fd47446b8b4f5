"""The picture of `make accuracy`: each tool's error against the rate."""

import io
import statistics
from collections.abc import Sequence
from typing import Any


def picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: p99 of the errors of TTFT and ITL at the fixed schedule, one point a repeat."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    fixed = [row for row in rows if row["scenario"] == "fixed"]
    for plot, name, title in zip(
        axes, ("ttft_error_ms", "itl_error_ms"), ("TTFT", "ITL"), strict=True
    ):
        for tool in dict.fromkeys(row["tool"] for row in fixed):
            points: dict[float, list[float]] = {}
            for row in fixed:
                if row["tool"] == tool and row[name]["p99"] is not None:
                    points.setdefault(row["rate"], []).append(row[name]["p99"])
            rates = sorted(points)
            (line,) = plot.plot(
                rates, [statistics.median(points[rate]) for rate in rates], label=tool
            )
            for rate in rates:
                plot.plot([rate] * len(points[rate]), points[rate], ".", color=line.get_color())
        plot.axhline(0.5, color="grey", linestyle=":", linewidth=1)
        plot.set(title=f"{title} error, p99", xlabel="requests/s", xscale="log", yscale="log")
    axes[0].set_ylabel("ms (one core; simulated engine)")
    if fixed:
        axes[0].legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()
