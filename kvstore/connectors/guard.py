"""The guard: whether a fetch is expected to be faster than computing the tokens again.

It is pure: times and sizes come in as arguments. What a controller decides later passes through the same methods,
`worth`, `hopeless` and the observations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log2, sqrt

_WEIGHT = 0.25
"""Weight of a new observation in the running means."""

_SLOWER_WEIGHT = 0.1
"""Weight of a step that took longer than steps of its size do: it may have waited for something else."""

_SLOWER_LINK_WEIGHT = 0.5
"""Weight of a fetch that was slower than expected: requests wait for a slow link, and none for finding a fast one."""

_STALLED_BYTES = 1 << 16
"""What a fetch that brought less counts as, so that its time is not lost."""

_SPARED_MIN, _SPARED_MAX = 4, 64
"""After how many fetches in place of a step one is computed to see: at first, and where that tells nothing new."""

_WEIGHT_AFRESH = 0.75
"""Weight of such a step where it was faster: what it replaces is old."""

_SURPRISE = 1.3
"""How many times faster it must be for looking often again."""


@dataclass
class StepTimes:
    """Seconds of an engine's steps by the tokens that they compute, learned from steps.

    Attention makes a token of a long prompt dearer than one of a short prompt, and every step has a fixed cost. So
    there is a running mean for sizes that are alike, and straight lines between them.
    """

    known: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Mean tokens and seconds, by the number of the size class; three classes an octave."""

    _spared: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of each class: steps that fetching has saved since the last one was seen, and after how many one is wanted."""

    def observe(self, tokens: int, took_s: float) -> None:
        """Learn from a step."""
        number = _size_class(tokens)
        spared, patience = self._spared.pop(number, (0, _SPARED_MIN))
        if number not in self.known:
            self.known[number] = float(tokens), took_s
            return
        mean_tokens, mean_s = self.known[number]
        faster = took_s < mean_s * tokens / mean_tokens
        weight = _WEIGHT if faster else _SLOWER_WEIGHT
        if spared >= patience:
            # What was known is old, and was the reason to fetch all that time.
            surprising = took_s * _SURPRISE < mean_s * tokens / mean_tokens
            weight = _WEIGHT_AFRESH if faster else _WEIGHT
            self._spared[number] = (0, _SPARED_MIN if surprising else min(2 * patience, _SPARED_MAX))
        self.known[number] = _mean(mean_tokens, tokens, weight), _mean(mean_s, took_s, weight)

    def spare(self, tokens: int) -> bool:
        """A step is about to be saved by fetching; whether it should be computed instead, to see what it takes now.

        An engine that fetches never sees that computing has become faster, say because the machine was busy when it
        was last seen. Computing is never slower than an engine without a cache, so looking costs little: it is wanted
        after 4 fetches, then after 8, 16, 32, and then one in 64.
        """
        number = _size_class(tokens)
        if number not in self.known:
            return False
        spared, patience = self._spared.get(number, (0, _SPARED_MIN))
        self._spared[number] = (spared + 1, patience)
        return spared >= patience

    def seconds(self, tokens: int) -> float:
        """Expected seconds of a step.

        Where it is not known it is rather too short: then the engine computes once and knows, while one that fetches
        for a wrong reason never finds out. So a step takes no longer than larger ones did, nor by more than the square
        of the tokens longer than smaller ones did (a first step may have compiled something), and beyond the largest
        one that was seen it grows as the known ones do.
        """
        points = sorted(self.known.values())
        if not points:
            return 0.0
        below = [(0.0, 0.0), *(point for point in points if point[0] <= tokens)]
        above = [point for point in points if point[0] > tokens]
        if not above:
            expected = _beyond(points, tokens)
        else:
            (low, low_s), (high, high_s) = below[-1], above[0]
            expected = low_s + (tokens - low) / (high - low) * (high_s - low_s)
        bounds = [seconds for _, seconds in above]
        bounds += [seconds * (tokens / size) ** 2 for size, seconds in below[1:]]
        return min(expected, *bounds)


def _size_class(tokens: int) -> int:
    return round(3 * log2(tokens))


def _beyond(points: Sequence[tuple[float, float]], tokens: int) -> float:
    """Seconds of a step larger than all that were seen, at most in proportion to the largest."""
    (first, first_s), (last, last_s) = points[0], points[-1]
    if len(points) == 1:
        # Part of it is a fixed cost; which part one step cannot tell.
        return last_s * sqrt(tokens / last)
    line = last_s + (tokens - last) * max(0.0, last_s - first_s) / (last - first)
    return min(line, last_s * tokens / last)


@dataclass
class Guard:
    """Static estimate of a fetch against a recompute, from running means of what was observed.

    Until there is an observation the priors stand. A fetch is tried again after `explore` refusals in a row, so that a
    link that has become faster is found out; `observe_probe` tells of it without a request that waits.

    Args:
        bytes_per_s: Rate at which a fetch was found to arrive (and, where nothing else is told, to be decoded).
        latency_s: Time of a fetch beside that.
        place_s_per_token: Time of decoding and writing a token behind the arrival.
        prefill_tokens_per_s: Tokens that the engine prefills; 0 while unknown, and then every fetch is worth it.
        margin: Share of the time to compute that a fetch must be expected to save.
        floor_s: Fetches that are expected to cost at most this are always worth it.
        explore: Refusals after which one fetch is let through; 0 for never.
    """

    bytes_per_s: float = 125e6
    latency_s: float = 0.002
    place_s_per_token: float = 0.0
    prefill_tokens_per_s: float = 0.0
    margin: float = 0.0
    floor_s: float = 0.005
    explore: int = 64
    refused: int = 0
    steps: StepTimes = field(default_factory=StepTimes)

    def fetch_s(self, size_bytes: int, tokens: int = 0) -> float:
        """Expected seconds of a fetch."""
        return self.latency_s + size_bytes / self.bytes_per_s + tokens * self.place_s_per_token

    def recompute_s(self, tokens: int, rest_tokens: int = 0) -> float:
        """Expected seconds that computing tokens adds to computing those behind them; infinite while nothing was seen.

        Args:
            tokens: Tokens that could be fetched.
            rest_tokens: Tokens of the same prompt that are computed in any case.
        """
        if self.steps.known:
            return self.steps.seconds(tokens + rest_tokens) - self.steps.seconds(rest_tokens)
        return tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else float("inf")

    def hopeless(self, tokens: int, size_bytes: int, rest_tokens: int = 0, *, ask_s: float = 0.0) -> bool:
        """Whether a fetch would be refused; nothing is counted.

        Args:
            tokens: Tokens that could be fetched.
            size_bytes: Bytes that they take.
            rest_tokens: Tokens of the same prompt that are computed in any case.
            ask_s: Time that it takes to find out what is held, where that is not known.
        """
        gain_s = (1 - self.margin) * self.recompute_s(tokens, rest_tokens)
        return ask_s + self.fetch_s(size_bytes, tokens) > max(self.floor_s, gain_s)

    def worth(self, tokens: int, size_bytes: int, rest_tokens: int = 0) -> bool:
        """Whether to fetch these tokens."""
        tries = bool(self.explore) and self.refused >= self.explore
        if tries or not self.hopeless(tokens, size_bytes, rest_tokens):
            self.refused = 0
            cheap = self.fetch_s(size_bytes, tokens) <= self.floor_s
            return cheap or not self.steps.spare(tokens + rest_tokens)
        self.refused += 1
        return False

    def observe_fetch(
        self, size_bytes: int, took_s: float, *, tokens: int = 0, arrived_s: float | None = None, whole: bool = True
    ) -> None:
        """Learn from a fetch that is over, whether it succeeded or not.

        Args:
            size_bytes: Bytes that came.
            took_s: From its start to its end.
            tokens: Tokens that it brought.
            arrived_s: From its start to its last byte; the rest of the time was decoding.
            whole: Whether all came that was asked for.
        """
        wire_s = took_s if arrived_s is None else arrived_s
        if not whole:
            size_bytes = max(size_bytes, _STALLED_BYTES)
        if size_bytes:
            # Means of time per byte, not of bytes per time: one stalled fetch must weigh as much as it cost.
            found = self._busy_s(wire_s) / size_bytes
            known = 1 / self.bytes_per_s
            self.bytes_per_s = 1 / _mean(known, found, _SLOWER_LINK_WEIGHT if found > known else _WEIGHT)
        if tokens and arrived_s is not None:
            self.place_s_per_token = _mean(self.place_s_per_token, (took_s - wire_s) / tokens)

    def observe_probe(self, size_bytes: int, took_s: float) -> None:
        """Learn from a fetch that nobody waited for, which says what the link is like now."""
        self.bytes_per_s = size_bytes / self._busy_s(took_s)
        # It does not say what decoding takes, which may have been found at a bad moment: try it again some time.
        self.place_s_per_token /= 2

    def observe_step(self, tokens: int, took_s: float) -> None:
        """Learn from a step that computed tokens, whatever they were."""
        if tokens > 0 and took_s > 0:
            self.steps.observe(tokens, took_s)

    def _busy_s(self, took_s: float) -> float:
        return max(took_s - self.latency_s, took_s / 10, 1e-6)


def _mean(known: float, found: float, weight: float = _WEIGHT) -> float:
    return (1 - weight) * known + weight * found
