"""The guard: whether a fetch is expected to be faster than computing the tokens again.

It is pure: times and sizes come in as arguments. What a controller decides later passes through the same two methods,
`worth` and the observations.
"""

from dataclasses import dataclass

_WEIGHT = 0.25
"""Weight of a new observation in the running means."""


@dataclass
class Guard:
    """Static estimate of a fetch against a recompute, from running means of what was observed.

    Until there is an observation the priors stand. A fetch is tried again after `explore` refusals in a row, so that a
    link that has become faster is found out.

    Args:
        bytes_per_s: Rate at which a fetch was found to arrive and be decoded.
        latency_s: Time of a fetch beside that.
        prefill_tokens_per_s: Tokens that the engine prefills; 0 while unknown, and then every fetch is worth it.
        floor_s: Fetches that are expected to cost at most this are always worth it.
        explore: Refusals after which one fetch is let through.
    """

    bytes_per_s: float = 125e6
    latency_s: float = 0.002
    prefill_tokens_per_s: float = 0.0
    floor_s: float = 0.005
    explore: int = 64
    refused: int = 0

    def fetch_s(self, size_bytes: int) -> float:
        """Expected seconds of a fetch."""
        return self.latency_s + size_bytes / self.bytes_per_s

    def recompute_s(self, tokens: int) -> float:
        """Expected seconds of computing tokens; infinite while no prefill was seen."""
        return tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else float("inf")

    def worth(self, tokens: int, size_bytes: int) -> bool:
        """Whether to fetch these tokens."""
        fetch_s = self.fetch_s(size_bytes)
        if fetch_s <= max(self.floor_s, self.recompute_s(tokens)) or self.refused >= self.explore:
            self.refused = 0
            return True
        self.refused += 1
        return False

    def observe_fetch(self, size_bytes: int, took_s: float) -> None:
        """Learn from a fetch that is over, whether it succeeded or not."""
        busy_s = max(took_s - self.latency_s, 1e-6)
        if size_bytes:
            # Means of time per byte, not of bytes per time: one stalled fetch must weigh as much as it cost.
            self.bytes_per_s = 1 / _mean(1 / self.bytes_per_s, busy_s / size_bytes)

    def observe_prefill(self, tokens: int, took_s: float) -> None:
        """Learn from a step that prefilled."""
        if tokens > 0 and took_s > 0:
            speed = tokens / took_s
            known = self.prefill_tokens_per_s
            self.prefill_tokens_per_s = _mean(known, speed) if known else speed


def _mean(known: float, found: float) -> float:
    return (1 - _WEIGHT) * known + _WEIGHT * found
