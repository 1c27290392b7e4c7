"""How long transfers take, from what is known of their parts: the model that the bandit corrects.

A fetch passes its chunks through stages that work at the same time: while one chunk is decoded the next one is on the
wire. So stages do not add up; the slowest one sets the pace, and the others cost only what the first chunk takes to
pass through them. Everything here is a pure function of numbers in seconds and bytes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

GB = 1e9


class Volume(NamedTuple):
    """What is transferred.

    Args:
        raw_bytes: Bytes of the exact cache.
        coded_bytes: Bytes that are sent.
        chunks: Into how many equal parts both are cut, at least one.
    """

    raw_bytes: float
    coded_bytes: float
    chunks: int


class Link(NamedTuple):
    """A way between a client and the server.

    Args:
        bytes_per_s: Rate of what is under way.
        rtt_s: From a request to the first byte of an answer that is there already.
        queue_s: Time that requests wait before anything is done for them.
    """

    bytes_per_s: float
    rtt_s: float = 0.0
    queue_s: float = 0.0


class Rates(NamedTuple):
    """How fast the ends of a transfer are.

    Args:
        read_bytes_per_s: The tier that a fetch reads, of coded bytes.
        read_rtt_s: Its time to the first byte.
        device_bytes_per_s: From host memory to the device, of coded bytes; infinite where nothing is copied.
        decode_s_per_gb: Seconds to decode a GB of exact cache.
        encode_s_per_gb: Seconds to encode it.
        ack_s: From the last byte of a put to its acknowledgement, at the durability that is asked for.
    """

    read_bytes_per_s: float = float("inf")
    read_rtt_s: float = 0.0
    device_bytes_per_s: float = float("inf")
    decode_s_per_gb: float = 0.0
    encode_s_per_gb: float = 0.0
    ack_s: float = 0.0


class Names(NamedTuple):
    """What the numbers of `Terms` are."""

    fixed: tuple[str, ...]
    stages: tuple[str, ...]


FETCH = Names(("queue", "rtt", "tier"), ("read", "wire", "copy", "decode"))
PUT = Names(("queue", "rtt", "ack"), ("encode", "wire"))
COMPUTE = Names(("prefill",), ())


class Terms(NamedTuple):
    """An expected time and what it is made of. One is made for every arm of every decision, so it is a bare tuple.

    Args:
        names: What the numbers are.
        fixed: Seconds that pass once.
        stages: Seconds that each stage works in all, in the order in which chunks pass them.
        chunks: How many chunks pass them.
    """

    names: Names
    fixed: tuple[float, ...]
    stages: tuple[float, ...]
    chunks: int

    @property
    def first_chunk_s(self) -> float:
        """Time that the first chunk takes to pass all stages."""
        return sum(self.stages) / self.chunks

    @property
    def bottleneck(self) -> str | None:
        """The slowest stage."""
        return self.names.stages[self.stages.index(max(self.stages))] if self.stages else None

    @property
    def pipeline_s(self) -> float:
        """Time from the first chunk's beginning to the last one's end."""
        return overlapped_s(self.stages, self.chunks) if self.stages else 0.0

    @property
    def total_s(self) -> float:
        """All of it."""
        return sum(self.fixed) + self.pipeline_s

    def slower(self, stage: str, factor: float) -> "Terms":
        """The same with one stage so many times slower; unchanged where there is no such stage."""
        if factor == 1.0 or stage not in self.names.stages:
            return self
        at = self.names.stages.index(stage)
        stages = (*self.stages[:at], factor * self.stages[at], *self.stages[at + 1 :])
        return Terms(self.names, self.fixed, stages, self.chunks)

    def stage_s(self, stage: str) -> float:
        """Seconds that a stage works; 0 where there is no such one."""
        return self.stages[self.names.stages.index(stage)] if stage in self.names.stages else 0.0

    def report(self) -> dict[str, Any]:
        """As JSON, for people who ask why; `of_report` undoes it."""
        return {
            "total_s": self.total_s,
            "fixed_s": dict(zip(self.names.fixed, self.fixed, strict=True)),
            "stages_s": dict(zip(self.names.stages, self.stages, strict=True)),
            "chunks": self.chunks,
            "first_chunk_s": self.first_chunk_s,
            "pipeline_s": self.pipeline_s,
            "bottleneck": self.bottleneck,
        }

    @classmethod
    def of_report(cls, report: Any) -> "Terms":
        """From its JSON.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: It is no such JSON.
        """
        fixed, stages = report["fixed_s"], report["stages_s"]
        names = Names(tuple(fixed), tuple(stages))
        once, worked = (tuple(float(one) for one in part.values()) for part in (fixed, stages))
        return cls(names, once, worked, max(1, int(report["chunks"])))


def overlapped_s(stages_s: Sequence[float], chunks: int) -> float:
    """Time from the first chunk's beginning to the last one's end, where stages work at the same time.

    Args:
        stages_s: Seconds that each stage works in all, at least one.
        chunks: How many equal chunks pass them.
    """
    return (sum(stages_s) + (chunks - 1) * max(stages_s)) / chunks


def fetch_terms(volume: Volume, link: Link, rates: Rates) -> Terms:
    """What a fetch takes until its cache is ready: queue, round trip, {tier read, wire, copy, decode} overlapped."""
    coded_bytes = volume.coded_bytes
    stages = (
        coded_bytes / rates.read_bytes_per_s,
        coded_bytes / link.bytes_per_s,
        coded_bytes / rates.device_bytes_per_s,
        volume.raw_bytes / GB * rates.decode_s_per_gb,
    )
    return Terms(FETCH, (link.queue_s, link.rtt_s, rates.read_rtt_s), stages, volume.chunks)


def put_terms(volume: Volume, link: Link, rates: Rates) -> Terms:
    """What a put takes until it is acknowledged: queue, round trip, {encode, wire} overlapped, acknowledgement."""
    stages = (volume.raw_bytes / GB * rates.encode_s_per_gb, volume.coded_bytes / link.bytes_per_s)
    return Terms(PUT, (link.queue_s, link.rtt_s, rates.ack_s), stages, volume.chunks)


def compute_terms(prefill_s: float) -> Terms:
    """What computing takes instead of a fetch."""
    return Terms(COMPUTE, (prefill_s,), (), 1)


def closed_loop_s(clients: int, service_s: float, think_s: float) -> float:
    """Seconds from a request to its answer where some clients share one link and each asks again after a while.

    Exact mean value analysis of one first-come queue (Reiser and Lavenberg, 1980): a client that comes finds what the
    others would have there without it.

    Args:
        clients: How many.
        service_s: Time that the link is busy with one request.
        think_s: Time from an answer to the same client's next request.
    """
    waiting = answer_s = 0.0
    for count in range(1, clients + 1):
        answer_s = service_s * (1 + waiting)
        waiting = count * answer_s / (answer_s + think_s) if answer_s + think_s else 0.0
    return answer_s


def makespan_s(times_s: Sequence[Sequence[float]]) -> float:
    """Time until the last chunk has passed the last stage, where chunks differ: the max-plus recursion.

    Args:
        times_s: For every chunk, in their order, the seconds that each stage takes for it.
    """
    ends: list[float] = []
    for chunk in times_s:
        ends = ends or [0.0] * len(chunk)
        before = 0.0
        for stage, took_s in enumerate(chunk):
            before = ends[stage] = max(ends[stage], before) + took_s
    return ends[-1] if ends else 0.0
