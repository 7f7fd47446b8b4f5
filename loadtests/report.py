"""A benchmark, and the record of its promotion, as one HTML file that needs nothing else."""

import base64
import html as html_module
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loadtests.chart import charts
from loadtests.picture import title, ttft_against_rate
from loadtests.result import Result

TEMPLATE = Path(__file__).with_name("report.html.j2")


def html(result: Result, record: Mapping[str, Any], rows: Iterable[Mapping[str, Any]] = ()) -> str:
    """The page: verdict, pictures, steps, what it all depends on, and `record` (nested fields of
    the promotion, may be empty). `rows`: the raw ones, for what happened over time."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["ms"] = _ms
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title(result),
        result=result,
        picture=base64.b64encode(ttft_against_rate(result)).decode(),
        charts=charts(result, rows),
        record=_flat(record),
        depends=_flat(
            {
                **result.profile.metadata,
                "server": result.server,
                "network": result.network,
                "versions": result.versions,
                "profile": result.profile.model_dump(mode="json", exclude={"metadata", "slo"}),
            }
        ),
        raw=html_module.escape(result.model_dump_json(indent=1)),
    )


def _ms(value: float | None) -> str:
    return "∞" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _flat(fields: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested fields as rows: (dotted name, text)."""
    rows: list[tuple[str, str]] = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{above}{name}.")
        elif isinstance(value, list | tuple):
            text = ", ".join(v if isinstance(v, str) else json.dumps(v) for v in value)
            rows.append((f"{above}{name}", text))
        elif value is not None:
            rows.append((f"{above}{name}", str(value)))
    return rows
