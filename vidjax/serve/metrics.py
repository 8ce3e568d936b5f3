"""Counters of a server in the text format of Prometheus; no name of a person or clip is in them."""

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
CLIPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Counts of values up to each bound, their number and their sum."""

    def __init__(self, bounds: tuple[float, ...]):
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Yields the lines of the format."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.9g}"
        yield f"{name}_count {total}"


class Metrics:
    """What a server has done since it started; only its event loop changes it."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds = Histogram(SECONDS)
        self.batches = Histogram(CLIPS)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Counts a request; `route` is a pattern of the application, such as `/clips/{name}`."""
        self.requests[route, status] += 1
        self.seconds.add(seconds)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """Returns all counters, and `gauges`, name -> what it is and its present value."""
        lines = ["# HELP vidjax_requests_total Requests that got an answer."]
        lines.append("# TYPE vidjax_requests_total counter")
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'vidjax_requests_total{{route="{route}",code="{status}"}} {count}')
        lines.append("# HELP vidjax_request_seconds Seconds until the answer.")
        lines.append("# TYPE vidjax_request_seconds histogram")
        lines.extend(self.seconds.lines("vidjax_request_seconds"))
        lines.append("# HELP vidjax_batch_clips Clips that were scored together.")
        lines.append("# TYPE vidjax_batch_clips histogram")
        lines.extend(self.batches.lines("vidjax_batch_clips"))
        for name, (about, value) in gauges.items():
            lines.append(f"# HELP vidjax_{name} {about}")
            lines.append(f"# TYPE vidjax_{name} gauge")
            lines.append(f"vidjax_{name} {value}")
        return "\n".join(lines) + "\n"
