"""What links and engines are like now, learned from transfers and steps as they happen.

Rates drift and single observations lie: a transfer may have waited for something that has nothing to do with its link.
So each quantity is the logarithm of a rate that wanders (a local level model); an observation far from what is expected
moves it only so far, and leaves such doubt that the next one decides.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Any

_WANDER = 0.03
"""Variance that a logarithm gains before each observation: 17 % either way."""
_NOISE = 0.015
"""Variance of one good observation: 12 % either way."""
_BOUND = 2.5
"""Standard deviations within which observations are expected."""
_LEAP_MAX = math.log(4)
"""One unexpected observation moves a logarithm no farther."""
_UNKNOWN = 4.0
"""Variance of what nobody has seen yet: a factor of seven either way."""
_SAME = 0.25
"""Variance of what is expected to be as it was measured elsewhere: a factor of 1.6 either way."""
_DECODE_NOISE = 0.1
"""Variance of what one arm's decoding says of all arms': each has something of its own."""
_OWN_WEIGHT, _OWN_REST, _FADING = 0.2, 0.5, 0.995
"""Of an arm's own share of how slow decoding is: weight of an observation, its bound, and what others' leave of it."""
_DOUBT = 0.06
"""Variance beyond which a quantity counts as little known: some transfers were missed, or one was a surprise."""
_LOG_MAX = 300.0
"""Logarithms go no farther, so that absurd reports stay numbers."""
_PAST = 24
"""Requests over a link that are remembered one by one."""
_PROBE_BYTES = 1 << 16
"""Transfers of fewer bytes tell of the round trip; larger ones tell of the rate."""


@dataclass
class Level:
    """A positive quantity that wanders, as its logarithm with a variance.

    Args:
        value: Its prior median.
        variance: Of the logarithm.
    """

    value: float
    variance: float = _UNKNOWN
    seen: int = 0

    def observe(self, found: float, noise: float = _NOISE) -> None:
        """Learn from an observation.

        Args:
            found: What was seen; above zero and finite, else it tells nothing.
            noise: Variance of its logarithm.
        """
        if not 0 < found < math.inf:
            return
        self.variance = min(self.variance + _WANDER, _UNKNOWN)
        surprise = math.log(found) - math.log(self.value)
        self.seen += 1
        if abs(surprise) > _BOUND * math.sqrt(self.variance + noise):
            # A lie, or a change? It counts half, and what is known counts for little until the next one says which.
            moved = math.copysign(min(abs(surprise) / 2, _LEAP_MAX), surprise)
            self.variance = max(self.variance, min(surprise**2 / 4, _UNKNOWN))
        else:
            gain = self.variance / (self.variance + noise)
            moved = gain * surprise
            self.variance *= 1 - gain
        self.value = math.exp(min(max(math.log(self.value) + moved, -_LOG_MAX), _LOG_MAX))

    def age(self) -> None:
        """Time has passed without an observation: it may have become anything nearby."""
        self.variance = min(self.variance + _WANDER, _UNKNOWN)

    def drawn(self, random: Random) -> float:
        """A value drawn from what is known."""
        return self.quantile(random.gauss(0.0, 1.0))

    @property
    def hoped(self) -> float:
        """What it may be where little is known of it, else its median.

        What is not used tells nothing of itself: one that is taken for small by mistake would never be found out.
        """
        return self.quantile(1.0) if self.variance > _DOUBT else self.value

    def quantile(self, deviations: float) -> float:
        """The quantity so many standard deviations above its median."""
        return self.value * math.exp(deviations * math.sqrt(self.variance))


@dataclass
class LinkState:
    """A way between a client and a tier of the server, learned from transfers over it.

    Args:
        rate: Bytes a second.
        rtt: Seconds from a request to the first byte of its answer.
        past: The rates that the last requests met; what is kept for long meets them again.
    """

    rate: Level = field(default_factory=lambda: Level(125e6))
    rtt: Level = field(default_factory=lambda: Level(0.002))
    past: deque[float] = field(default_factory=lambda: deque(maxlen=_PAST))

    def observe(
        self, size_bytes: float, took_s: float, *, first_byte_s: float | None = None, held_up: bool = False
    ) -> None:
        """Learn from a transfer.

        Args:
            size_bytes: Bytes that came.
            took_s: From the request to the last byte.
            first_byte_s: From the request to the first one, where that is known.
            held_up: Whether the client was busy with something else meanwhile: the link may be faster than that.
        """
        if not (0 < took_s < math.inf) or size_bytes < 0:
            return
        if first_byte_s is not None and not 0 < first_byte_s <= took_s:
            first_byte_s = None
        if first_byte_s is not None:
            self.rtt.observe(first_byte_s)
        elif size_bytes < _PROBE_BYTES:
            self.rtt.observe(max(took_s - size_bytes / self.rate.value, took_s / 4))
        if size_bytes >= _PROBE_BYTES:
            waited_s = min(self.rtt.value, took_s) if first_byte_s is None else first_byte_s
            # A round trip that is not well known must not eat the whole transfer.
            busy_s = max(took_s - waited_s, took_s / 4)
            found = size_bytes / busy_s
            if held_up and found < self.rate.value:
                self.pass_by()
                return
            self.past.append(found)
            # What is left of the round trip's error weighs less, the longer the transfer is.
            self.rate.observe(found, _NOISE + self.rtt.variance * (waited_s / busy_s) ** 2)

    def pass_by(self) -> None:
        """A request that tells nothing new of the link met it as it is."""
        self.past.append(self.rate.value)
        self.rate.age()

    def report(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "bytes_per_s": self.rate.value,
            "bytes_per_s_deviation": math.sqrt(self.rate.variance),
            "rtt_s": self.rtt.value,
            "transfers": self.rate.seen,
        }


@dataclass
class DecodeSpeed:
    """How much slower than its profile says a client decodes: what all arms have in common, and what each has alone.

    Profiles are measured on some machine; a client may have another one, or a busy one.
    """

    common: Level = field(default_factory=lambda: Level(1.0, _SAME))
    own: dict[str, float] = field(default_factory=dict)
    """Logarithms, which fade while other arms are used: nobody finds out that an unused arm is better than thought."""

    def observe(self, arm: str, expected_s: float, took_s: float) -> None:
        """Learn from a decoding that was expected to take `expected_s`."""
        if not (0 < took_s < math.inf and 0 < expected_s < math.inf):
            return
        alone = self.own.get(arm, 0.0)
        # First what says something of every arm, then what is left for this one.
        self.common.observe(took_s / expected_s * math.exp(-alone), _DECODE_NOISE)
        rest = math.log(took_s) - math.log(expected_s) - math.log(self.common.value) - alone
        for other in self.own:
            self.own[other] *= _FADING
        self.own[arm] = alone + _OWN_WEIGHT * min(max(rest, -_OWN_REST), _OWN_REST)

    def fade(self) -> None:
        """A request without decoding: nobody finds out that a decoder is faster than thought while none is used."""
        self.common.value **= _FADING
        self.common.age()

    def factor(self, arm: str) -> float:
        """What an expected time is to be multiplied by."""
        return self.common.value * math.exp(self.own.get(arm, 0.0))


@dataclass
class PrefillSpeed:
    """Seconds that an engine takes to compute a prompt, by its length.

    Steps are sorted into classes of length, an octave each: attention makes long prompts slower by the token than
    short ones. Between classes that were seen, and beyond them, seconds a token are carried over.
    """

    by_length: dict[int, Level] = field(default_factory=dict)

    def observe(self, tokens: int, took_s: float) -> None:
        """Learn from a prefill."""
        if tokens < 1 or not 0 < took_s < math.inf:
            return
        level = self.by_length.setdefault(octave(tokens), Level(took_s / tokens))
        level.observe(took_s / tokens)

    def seconds(self, tokens: int) -> float | None:
        """Expected seconds of a prefill; None while nothing was seen."""
        if tokens < 1:
            return 0.0
        if not self.by_length:
            return None
        wanted = math.log2(tokens)
        below = max((octave for octave in self.by_length if octave + 0.5 <= wanted), default=None)
        above = min((octave for octave in self.by_length if octave + 0.5 > wanted), default=None)
        if below is None or above is None:
            known = below if above is None else above
            assert known is not None
            return tokens * self.by_length[known].value
        share = (wanted - below - 0.5) / (above - below)
        return float(tokens * self.by_length[below].value ** (1 - share) * self.by_length[above].value ** share)


@dataclass
class Load:
    """How busy a server is: requests under way, smoothed over time.

    Args:
        half_life_s: Age at which what was seen counts half.
    """

    half_life_s: float = 2.0
    value: float = 0.0
    _seen_s: float | None = None

    def observe(self, requests: float, now_s: float) -> None:
        """Requests under way at a time."""
        if self._seen_s is None:
            self.value = requests
        else:
            kept = 0.5 ** (max(0.0, now_s - self._seen_s) / self.half_life_s)
            self.value = kept * self.value + (1 - kept) * requests
        self._seen_s = now_s


def octave(value: float) -> int:
    """The bucket of a size or a load: its logarithm to base 2, rounded down; 0 for what is less than one."""
    return max(0, int(math.log2(value))) if value >= 1 else 0
