"""Counters and times of the server in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_HELP = {
    "lorikit_requests_total": "Requests that ended, by model and HTTP status; 499 hung up.",
    "lorikit_prompt_tokens_total": "Tokens of prompts.",
    "lorikit_generated_tokens_total": "Tokens that were generated.",
    "lorikit_first_token_seconds": "Time from a request to its first token.",
    "lorikit_request_seconds": "Time from a request to its end.",
}


class Metrics:
    """Used on the event loop alone. Labels hold names of served models only, so that there are few."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[tuple[tuple[str, str], ...], int]] = defaultdict(lambda: defaultdict(int))
        self._times: dict[str, tuple[list[int], list[float]]] = {}

    def count(self, name: str, amount: int = 1, **labels: str) -> None:
        """Add to a counter."""
        self._counts[name][tuple(sorted(labels.items()))] += amount

    def time(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        buckets, total = self._times.setdefault(name, ([0] * (len(SECONDS) + 1), [0.0]))
        buckets[bisect_left(SECONDS, seconds)] += 1
        total[0] += seconds

    def text(self, gauges: Mapping[str, float]) -> str:
        """Everything, and these values of the moment."""
        lines: list[str] = []
        for name, values in self._counts.items():
            lines += [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} counter"]
            for labels, value in values.items():
                shown = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
                lines.append(f"{name}{{{shown}}} {value}")
        for name, (buckets, total) in self._times.items():
            lines += [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} histogram"]
            seen = 0
            for edge, number in zip([*map(str, SECONDS), "+Inf"], buckets, strict=True):
                seen += number
                lines.append(f'{name}_bucket{{le="{edge}"}} {seen}')
            lines += [f"{name}_sum {total[0]:.6f}", f"{name}_count {seen}"]
        for name, now in gauges.items():
            lines += [f"# TYPE {name} gauge", f"{name} {now:g}"]
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
