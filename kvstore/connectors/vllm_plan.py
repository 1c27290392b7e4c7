"""What the two sides of the vLLM connector tell each other every step; plain values that pickle."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

from kvstore.codecs.ref.predict import HISTORY
from kvstore.connectors.paged import KL_UNKNOWN_NATS
from kvstore.header import Behind
from kvstore.keys import ChunkKey

COUNTERS: Mapping[str, str] = {
    "computed_tokens": "Tokens that the engine ran a forward pass for.",
    "queries": "Requests whose prefix was looked up.",
    "matched_tokens": "Tokens that were found stored beyond the local cache.",
    "refused_tokens": "Tokens that the guard left to the engine because fetching was expected to take longer.",
    "planned_loads": "Loads that the server planned.",
    "planned_tokens": "Tokens that the server planned to be computed although they are stored.",
    "unasked_requests": "Requests that were not looked up because fetching all of them was expected to take longer.",
    "skipped_requests": "Requests whose KV depends on what is not in the key; neither stored nor served.",
    "loads": "Loads that ended.",
    "loaded_tokens": "Tokens loaded into the engine's cache.",
    "loaded_bytes": "Bytes of the frames that were received.",
    "load_microseconds": "Time that loads took.",
    "lossy_tokens": "Tokens loaded that are not bit for bit what the engine would compute.",
    "failed_tokens": "Tokens promised but not loaded; the engine computes them.",
    "failed_absent": "Loads that ended because a chunk was gone.",
    "failed_corrupt": "Loads that ended at a damaged chunk.",
    "failed_identity": "Loads that ended at a chunk of another key, model or kind.",
    "failed_lossy": "Loads that ended at a lossy chunk where exact ones are asked for.",
    "failed_deadline": "Loads that ran out of time.",
    "failed_unavailable": "Loads that found no server.",
    "failed_aborted": "Loads of requests that were aborted.",
    "failed_error": "Loads that ended in an error of another kind; the log has it.",
    "match_failures": "Look-ups that found no server or got no answer in time.",
    "saved_tokens": "Tokens whose chunks were stored.",
    "saved_bytes": "Bytes of the frames that were sent.",
    "save_exists": "Chunks that were there already.",
    "save_failures": "Chunks that the server did not take.",
    "save_dropped": "Chunks not stored because the queue was full.",
    "derived_tokens": "Tokens not stored because they stand on a lossily loaded prefix.",
}
"""Every counter of the connector, by name."""


class Counters:
    """Counts of one process since they were last taken."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: dict[str, int] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Count; unknown names are mistakes."""
        assert name in COUNTERS, name
        if amount:
            with self._lock:
                self._counts[name] = self._counts.get(name, 0) + amount

    def take(self) -> dict[str, int]:
        """What was counted since the last time."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return counts


@dataclass(frozen=True)
class Run:
    """A run of chunks of one request, with the blocks that hold them.

    Args:
        request_id: The engine's id.
        first: Number of the first chunk in its prompt.
        keys: Keys of the chunks, for every worker's shard.
        block_ids: Ids of all blocks of the chunks, in order.
        token_ids: Token ids of the chunks and of the few tokens before them, 32 bits each.
    """

    request_id: str
    first: int
    keys: tuple[tuple[ChunkKey, ...], ...]
    block_ids: tuple[int, ...]
    token_ids: bytes

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return len(self.keys[0])

    def tokens_of(self, number: int, chunk_tokens: int) -> list[int]:
        """Token ids up to the end of a chunk, as far as decoding may look back."""
        ids = array("I", self.token_ids)
        end = len(ids) - (self.chunks - 1 - number) * chunk_tokens
        return list(ids[max(0, end - chunk_tokens - HISTORY) : end])


@dataclass(frozen=True)
class Load(Run):
    """A run to be loaded.

    Args:
        skip: Leading blocks that the engine holds already; they are not written.
        end: Blocks behind this one are not written.
        level: Highest quality level to fetch; None for all that are held.
        planned: Whether the server planned it, so that lossy chunks may be used.
        loss_nats: Bound of the quality loss.
        artefacts: Digests of the calibration artefacts that decoding needs.
    """

    skip: int = 0
    end: int = 0
    level: int | None = None
    planned: bool = False
    loss_nats: float = KL_UNKNOWN_NATS
    artefacts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Save(Run):
    """A run to be stored once the step is done.

    Args:
        behind: What the chunks stand on, where that is not exact.
        final: Whether the prompt's last full chunk is among them.
    """

    behind: Behind | None = None
    final: bool = False


@dataclass(frozen=True)
class Step:
    """What the workers do in one step; `idle` is one that computes nothing."""

    loads: tuple[Load, ...] = ()
    saves: tuple[Save, ...] = ()
    aborted: tuple[str, ...] = ()
    idle: bool = False


IDLE_WAIT_S = 0.001
"""How long an engine that computes nothing waits for what its requests wait for, instead of asking again at once.

It shares an interpreter with whoever fetches and decodes, and keeps them from it while it asks.
"""


@dataclass(frozen=True)
class Loaded:
    """What became of a load, as one worker saw it.

    Args:
        chunks: Leading chunks that were loaded.
        behind: The worst that was loaded; None where all is exact.
        reason: Why it ended early; the counter `failed_<reason>`.
        size_bytes: Bytes received.
        took_s: Seconds from its start to its end.
        arrived_s: Seconds from its start until the last bytes had come.
        decoding_s: Seconds in which anything was decoded and written.
        fetching_s: Seconds in which anything was under way; what is decoded may keep the next one waiting.
    """

    chunks: int
    behind: Behind | None
    reason: str | None
    size_bytes: int
    took_s: float
    arrived_s: float = 0.0
    decoding_s: float = 0.0
    fetching_s: float = 0.0


@dataclass
class Report:
    """What the workers tell the scheduler of one step.

    Args:
        loads: Loads that ended, by request.
        saves: Chunks whose saving ended, and whether the server holds them; empty unless that is announced.
    """

    loads: dict[str, list[Loaded]] = field(default_factory=dict)
    saves: dict[ChunkKey, bool] = field(default_factory=dict)

    def merged(self, other: "Report") -> "Report":
        """Both reports as one."""
        loads = {name: list(found) for name, found in self.loads.items()}
        for name, found in other.loads.items():
            loads.setdefault(name, []).extend(found)
        return Report(loads, self.saves | other.saves)


def worst(found: Iterable[Behind | None]) -> Behind | None:
    """The worst of what chunks stand on."""
    known = [one for one in found if one is not None]
    if not known:
        return None
    return Behind(min(one.level for one in known), max(one.kl_nats for one in known))


def pack_tokens(token_ids: Sequence[int], start: int, end: int) -> bytes:
    """Token ids from a little before `start` to `end`, as `Run` carries them."""
    return array("I", token_ids[max(0, start - HISTORY) : end]).tobytes()
