"""A benchmark against the accepted one before it: only like with like. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loadtests.result import Result

# Of a profile's metadata, what may explain a difference.
CAUSES = ("image_digest", "gpus", "driver", "args", "node", "commit", "shared_gpus")


@dataclass(frozen=True)
class Comparison:
    """`differs`: fields of the load profile that are not the same, so that nothing is compared.
    `regressions`: what is worse beyond both intervals. `changed`: what else is not as it was."""

    differs: tuple[str, ...]
    regressions: tuple[str, ...]
    changed: tuple[str, ...]

    def sentence(self) -> str:
        """In one line."""
        changed = f"; changed since: {'; '.join(self.changed)}" if self.changed else ""
        if self.differs:
            return f"not compared, another load profile: {'; '.join(self.differs)}{changed}"
        worse = "; ".join(self.regressions) or "no regression beyond both intervals"
        return f"{worse}{changed}"


def kept(result: Result) -> dict[str, Any]:
    """What a later benchmark is compared with."""
    step = result.step_at_required_rate()
    return {
        "ttft_p95_ms": step and step.ttft_ms.p95,
        "ttft_p95_low_ms": step and step.ttft_p95_low_ms,
        "ttft_p95_high_ms": step and step.ttft_p95_high_ms,
        "capacity": result.capacity.model_dump(mode="json"),
        # Without None: an optional field that is new later must not make this another profile.
        "profile": result.profile.model_dump(
            mode="json", exclude={"metadata", "base_url"}, exclude_none=True
        ),
        "depends": {
            **{name: result.profile.metadata.get(name) for name in CAUSES},
            "vllm": result.server.get("version"),
        },
    }


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> Comparison:
    """Two of kept(), the accepted one first. Fields that the older one lacks are passed over."""
    differs = tuple(_differences(before.get("profile") or {}, after["profile"]))
    was, is_ = before.get("depends") or {}, after["depends"]
    changed = tuple(
        f"{name} {was[name]!r} → {value!r}"
        for name, value in is_.items()
        if name in was and was[name] != value
    )
    return Comparison(differs, () if differs else tuple(_regressions(before, after)), changed)


def _regressions(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    found = []
    least, most = before["capacity"]["lower"], after["capacity"]["upper"]
    if most is not None and most <= least:
        found.append(f"carries less: λ* is at most {most:g} req/s, and was at least {least:g}")
    slowest, quickest = before.get("ttft_p95_high_ms"), after["ttft_p95_low_ms"]
    if slowest is not None and quickest is not None and quickest > slowest:
        found.append(f"slower: TTFT p95 is at least {quickest:.0f} ms, was at most {slowest:.0f}")
    return found


def _differences(before: Any, after: Any, place: str = "") -> list[str]:
    """Fields that both have with other values, or only one has, by dotted name."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return [
            line
            for name in sorted({*before, *after})
            for line in _differences(
                before.get(name), after.get(name), f"{place}.{name}".strip(".")
            )
        ]
    return [] if before == after else [f"{place} {before!r} → {after!r}"]
