"""Every error kvstore raises, as one tree; a miss is never an error.

Each class has a `code` that is stable: it is the `code` of the problem+json body by which the HTTP API reports the
error, and the client turns it back into the same class.
"""

from typing import ClassVar


class KVStoreError(Exception):
    """Base of all errors that callers of kvstore can act on."""

    code: ClassVar[str] = "internal"


class ConfigError(KVStoreError):
    """A setting is missing, unknown or out of range."""

    code = "config"


class RequestError(KVStoreError):
    """A request cannot be understood or is not allowed."""

    code = "bad-request"


class KeyFormatError(RequestError):
    """A namespace or digest is not lower-case hexadecimal of the fixed length, or a key not 48 bytes."""

    code = "bad-key"


class RangeError(RequestError):
    """A byte range of something that has `full_bytes` cannot be satisfied."""

    code = "bad-range"

    def __init__(self, detail: str, full_bytes: int = 0) -> None:
        super().__init__(detail)
        self.full_bytes = full_bytes


class BodySizeError(RequestError):
    """A body is larger than this server or client accepts."""

    code = "body-too-large"


class BodyLengthError(RequestError):
    """A body is shorter or longer than was announced."""

    code = "body-length"


class MediaTypeError(RequestError):
    """A body has a content type that the route does not take."""

    code = "bad-media-type"


class AuthError(RequestError):
    """A token is missing or wrong."""

    code = "unauthorized"


class PipelineError(KVStoreError):
    """Stages do not fit each other, the layout or the values they are given."""

    code = "pipeline"


class ProfileError(KVStoreError):
    """A set of profiles is not what this build knows, or a profile lacks what it needs."""

    code = "profile"


class NoProfilesError(ProfileError):
    """No set of profiles was pushed for the namespace, or the set has no such artefact."""

    code = "no-profiles"


class FrameError(KVStoreError):
    """Bytes are not a frame that this build may decode."""

    code = "frame"


class FrameVersionError(FrameError):
    """The frame has a format version that this build does not know."""

    code = "frame-version"


class FrameCorruptError(FrameError):
    """The frame is damaged: a length, checksum or field is not what it must be."""

    code = "frame-corrupt"


class LayoutMismatchError(FrameError):
    """The frame belongs to another key or layout than the caller's."""

    code = "frame-mismatch"


class BackendError(KVStoreError):
    """Storage failed; callers may treat it as a miss.

    Args:
        backend: Name of the backend that failed.
        detail: What happened and what can be done about it.
    """

    code = "backend"

    def __init__(self, backend: str, detail: str) -> None:
        super().__init__(f"{backend}: {detail}")
        self.backend = backend
        self.detail = detail


class BackendUnavailableError(BackendError):
    """The backend cannot answer now; try again after `retry_after_s`."""

    code = "unavailable"

    def __init__(self, backend: str, detail: str, retry_after_s: float = 1.0) -> None:
        super().__init__(backend, detail)
        self.retry_after_s = retry_after_s


class BackendBusyError(BackendUnavailableError):
    """The backend works, but more waits for it than it takes on; try again after `retry_after_s`."""

    code = "busy"


class BackendFullError(BackendError):
    """There is no room and nothing may be evicted for it."""

    code = "storage-full"
