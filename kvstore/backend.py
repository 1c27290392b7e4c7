"""The one protocol of everything that holds encoded chunks, and the values that it speaks in.

Tiers, the stack of tiers, the wrappers around them and the HTTP client are all a `Backend`. Every method takes a
batch; a batch of one is a list of one. `kvstore.testing.BackendSuite` says what an implementation must do.
"""

from collections.abc import AsyncIterator, Sequence
from enum import IntEnum, StrEnum
from typing import NamedTuple, Protocol

from kvstore.errors import BackendError, LayoutMismatchError
from kvstore.frame import Frame
from kvstore.header import PROFILE_ID_BYTES
from kvstore.keys import ChunkKey, split_key


class Ack(IntEnum):
    """How durable a put is before it is acknowledged."""

    MEMORY = 1
    DISK = 2
    REMOTE = 3


class Reason(StrEnum):
    """Why a chunk is not served."""

    ABSENT = "absent"
    EVICTED = "evicted"
    EXPIRED = "expired"
    IDENTITY = "identity"
    CORRUPT = "corrupt"
    DEADLINE = "deadline"
    BREAKER = "breaker"
    QUOTA = "quota"


class Outcome(StrEnum):
    """What a put did. A tier without room may keep fewer levels than it was given, as its placement says."""

    WRITTEN = "written"
    EXTENDED = "extended"
    """More levels of the same frame came to the copy held."""
    EXISTS = "exists"
    """The same frame was there already, with at least as many levels."""
    OTHER = "other"
    """Another frame is held under this key; nothing was changed."""
    FAILED = "failed"


class Miss(NamedTuple):
    """A chunk that is not served, as a value."""

    reason: Reason


class Copy(NamedTuple):
    """How much of a frame a tier holds.

    Args:
        tier: Name of the backend that holds it.
        head_bytes: Bytes of prefix, header and segment table.
        level_bytes: Payload bytes of every level that is held.
        levels: Number of levels of the whole frame.
        inexact: Whether the frame is marked as computed behind a lossy prefix.
        lossless: Whether all levels together decode to every bit.
        profile: `kvstore.header.profile_id` of what made the frame; zeros where nobody says.
    """

    tier: str
    head_bytes: int
    level_bytes: tuple[int, ...]
    levels: int
    inexact: bool = False
    lossless: bool = False
    profile: bytes = bytes(PROFILE_ID_BYTES)

    @property
    def whole(self) -> bool:
        """Whether every level is held."""
        return len(self.level_bytes) == self.levels


class Held(NamedTuple):
    """A chunk that is held. Chunks of one shape share one `copy`, so that runs of them are cheap to find.

    Args:
        frame_id: Id of the frame; None where the answer came over a wire that does not carry ids.
        copy: Where it is and how much of it.
    """

    frame_id: bytes | None
    copy: Copy


class Match(NamedTuple):
    """The longest leading run of keys that is held, and why it ends (None: every key is held)."""

    held: list[Held]
    miss: Miss | None


class Stored(NamedTuple):
    """What became of one put.

    Args:
        outcome: Whether it was written or there already.
        ack: Durability that the chunk has now; None where it is not held.
        error: Why it failed, or why it is less durable than asked for.
    """

    outcome: Outcome
    ack: Ack | None
    error: BackendError | None = None


class State(NamedTuple):
    """How a backend is.

    Args:
        up: Whether it serves.
        detail: What a person should know; empty where there is nothing to say.
    """

    up: bool
    detail: str = ""


class Backend(Protocol):
    """Holds frames by key. A miss is a value; failures raise `BackendError`.

    A backend that can be out of order while its process lives has an attribute `state` too, see `state_of`. A client
    may also raise what its server found wrong with a request, such as an `AuthError`: those are for a person to mend,
    and a stack treats them like any failure of a tier.
    """

    name: str

    async def match(self, keys: Sequence[ChunkKey]) -> Match:
        """The longest leading run of `keys` that is held, from memory; nothing is promoted or verified."""
        ...

    async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
        """One verified frame or miss for each key, with levels 0 to `level` at most (None: all that are held)."""
        ...

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.MEMORY) -> list[Stored]:
        """Store frames, each visible only when whole; answers when the durability asked for is reached."""
        ...

    async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
        """Drop every level above `level` of the chunks that are held."""
        ...

    async def delete(self, keys: Sequence[ChunkKey]) -> None:
        """Forget chunks; keys that are not held are ignored."""
        ...

    def scan(self, namespace: bytes | None = None) -> AsyncIterator[tuple[ChunkKey, Held]]:
        """Every chunk held (of one namespace), in no particular order."""
        ...

    async def aclose(self) -> None:
        """Make everything accepted as durable as it can be and free resources; safe to call twice."""
        ...


def state_of(backend: Backend) -> State:
    """How a backend is; one that does not say is up."""
    state: State = getattr(backend, "state", State(True))
    return state


def put_outcome(held: Held | None, frame: Frame) -> Outcome:
    """What putting `frame` does to a copy that is held: the rule every backend follows.

    An exact frame replaces an inexact one; otherwise the first id under a key stays.
    """
    if held is None:
        return Outcome.WRITTEN
    if held.frame_id == frame.id:
        return Outcome.EXTENDED if frame.levels > len(held.copy.level_bytes) else Outcome.EXISTS
    if held.copy.inexact and frame.head.header.behind is None:
        return Outcome.WRITTEN
    return Outcome.OTHER


def check_copy(key: ChunkKey, frame: Frame) -> None:
    """Check a frame that a backend holds under `key`, before it is served.

    Only the digests are compared: a server with tenants stores under other namespaces than the headers name.

    Raises:
        FrameError: A checksum is wrong, or the frame belongs under another digest.
    """
    if split_key(frame.key)[1] != split_key(key)[1]:
        raise LayoutMismatchError("the frame held under this key is another chunk's")
    frame.verify()
