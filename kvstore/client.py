"""The HTTP client: a server, seen as a `Backend`. Needs no torch; tensors are the business of `kvstore.prefix`."""

import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import groupby
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
from aiohttp import hdrs

from kvstore.backend import Ack, Copy, Held, Match, Miss, Outcome, Reason, Stored
from kvstore.errors import (
    AuthError,
    BackendError,
    BackendFullError,
    BackendUnavailableError,
    ConfigError,
    FrameError,
    FrameVersionError,
    KVStoreError,
    RequestError,
)
from kvstore.frame import Frame
from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey, chunk_key
from kvstore.wire import (
    BATCH_TYPE,
    DIGESTS_TYPE,
    READ_BYTES,
    BodyReader,
    ViewsPayload,
    batch_views,
    read_batch,
)

GET_KEYS_MAX = 256
MATCH_KEYS_MAX = 1 << 16
PUT_BYTES = 64 << 20
PUT_FRAMES = 1024
_ANSWER_BYTES_MAX = 16 << 20
_WAIT_MS_MAX = 3600 * 1000

Answer = Mapping[str, Any]
T = TypeVar("T")


class Client:
    """Talks to one server over a pool of connections that stay open.

    Use it as an asynchronous context manager, or call `aclose`. A call that finds no server, or none that answers in
    time, raises `BackendUnavailableError`.

    Args:
        url: Such as `http://127.0.0.1:8420`.
        token: Bearer token, where the server asks for one.
        timeout_s: Time that one request may take, beside what it is asked to wait.
        connections: Most connections that are open at one time.
        batch_bytes_max: Largest batch that is accepted from the server; caps what its lengths can allocate.

    Raises:
        ConfigError: The URL is not an HTTP one.
    """

    name = "remote"

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        connections: int = 16,
        batch_bytes_max: int = 2 << 30,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is not a server's URL: it must start with http:// or https://")
        self.url = url.rstrip("/")
        self._headers = {hdrs.AUTHORIZATION: f"Bearer {token}"} if token else {}
        self._timeout_s = timeout_s
        self._connections = connections
        self._batch_bytes_max = batch_bytes_max
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def match(self, keys: Sequence[ChunkKey]) -> Match:
        return await self.wait(keys, 0)

    async def wait(self, keys: Sequence[ChunkKey], wait_s: float) -> Match:
        """As `match`, but the server waits up to `wait_s` seconds (its own limit at most) until all are there.

        Raises:
            BackendError: The server cannot be asked, or as many as may do so wait there already.
        """
        held: list[Held] = []
        ends_s = time.monotonic() + wait_s
        for namespace, digests in _by_namespace(keys, MATCH_KEYS_MAX):
            parse = partial(_parse_match, len(digests) // DIGEST_BYTES)
            left_s = max(0.0, ends_s - time.monotonic()) if wait_s else 0.0
            query = {"namespace": namespace} | _wait_query(left_s)
            part = await self._post("/v1/match", query, _body(digests), parse, more_s=left_s)
            held += part.held
            if part.miss is not None:
                return Match(held, part.miss)
        return Match(held, None)

    async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
        found: list[Frame | Miss] = []
        while len(found) < len(keys):
            rest = keys[len(found) :]
            namespace, digests = next(_by_namespace(rest, GET_KEYS_MAX))
            asked = rest[: len(digests) // DIGEST_BYTES]
            query = {"namespace": namespace} | ({} if level is None else {"level": str(level)})
            found += await self._get_some(query, digests, asked)
        return found

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.MEMORY) -> list[Stored]:
        stored: list[Stored] = []
        for frames in _bodies(items):
            payload = ViewsPayload(list(batch_views(frames)), BATCH_TYPE)
            stored += await self._post(
                "/v1/put", {"ack": ack.name.lower()}, payload, partial(self._parse_puts, len(frames))
            )
        return stored

    async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
        for namespace, digests in _by_namespace(keys, MATCH_KEYS_MAX):
            await self._post("/v1/trim", {"namespace": namespace, "level": str(level)}, _body(digests), _parse_nothing)

    async def delete(self, keys: Sequence[ChunkKey]) -> None:
        for namespace, digests in _by_namespace(keys, MATCH_KEYS_MAX):
            await self._post("/v1/delete", {"namespace": namespace}, _body(digests), _parse_nothing)

    async def scan(self, namespace: bytes | None = None) -> AsyncIterator[tuple[ChunkKey, Held]]:
        if namespace is None:
            raise BackendError(self.name, "a server lists one namespace at a time: name it")
        query = {"namespace": namespace.hex()}
        while page := await self._ask("GET", "/v1/scan", query, None, partial(_parse_page, namespace)):
            for found in page:
                yield found
            query["after"] = page[-1][0][NAMESPACE_BYTES:].hex()

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _post(
        self,
        path: str,
        query: Mapping[str, str],
        body: aiohttp.Payload,
        parse: Callable[[Answer], T],
        *,
        more_s: float = 0.0,
    ) -> T:
        return await self._ask("POST", path, query, body, parse, more_s=more_s)

    async def _ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: aiohttp.Payload | None,
        parse: Callable[[Answer], T],
        *,
        more_s: float = 0.0,
    ) -> T:
        """A JSON answer, parsed."""
        async with self._request(method, path, query, body, self._timeout_s + more_s) as response:
            try:
                return parse({} if response.status == 204 else await _read_json(response))
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as exc:
                raise BackendError(self.name, f"{self.url}{path} gave an answer that is none: {exc!r}") from exc

    async def _get_some(self, query: Mapping[str, str], digests: bytes, keys: Sequence[ChunkKey]) -> list[Frame | Miss]:
        """Verified answers for the first of `keys`, at least one."""
        found: list[Frame | Miss] = []
        async with self._request("POST", "/v1/get", query, _body(digests)) as response:
            try:
                body = BodyReader(response.content, self._batch_bytes_max, response.content_length)
                async for record in read_batch(body):
                    found.append(_verified(keys[len(found)], record))
            except (FrameError, RequestError, IndexError) as exc:
                # Where one record ends and the next begins is not known any more, so the rest is lost with it.
                response.close()
                version = isinstance(exc, FrameVersionError)
                return found + [Miss(Reason.IDENTITY if version else Reason.CORRUPT)] * (len(keys) - len(found))
        if not found:
            raise BackendError(self.name, "the server answered a batch without records")
        return found

    def _parse_puts(self, frames: int, answer: Answer) -> list[Stored]:
        if len(answer["stored"]) != frames:
            raise ValueError(f"{len(answer['stored'])} answers to {frames} frames")
        return [_parse_stored(self.name, result) for result in answer["stored"]]

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: aiohttp.Payload | None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A successful response; everything else is one of our errors."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._open_session().request(
                method, self.url + path, params=query, data=body, allow_redirects=False, timeout=timeout
            ) as response:
                if response.status >= 300:
                    raise await _error_of(self.name, response)
                yield response
        except TimeoutError as exc:
            raise BackendUnavailableError(self.name, f"{self.url} did not answer in {timeout_s} s") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise BackendUnavailableError(self.name, f"{self.url}: {exc}") from exc

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections),
                headers=self._headers,
                read_bufsize=READ_BYTES,
                auto_decompress=False,
                trust_env=False,
            )
        return self._session


def error_classes() -> dict[str, type[KVStoreError]]:
    """Every error class by its stable code."""
    found: dict[str, type[KVStoreError]] = {}
    pending: list[type[KVStoreError]] = [KVStoreError]
    while pending:
        error_class = pending.pop()
        # A subclass that only its own module knows shares the code of its base.
        found.setdefault(error_class.code, error_class)
        pending += error_class.__subclasses__()
    return found


def error_from(backend: str, code: str, detail: str, retry_after_s: float = 1.0) -> KVStoreError:
    """The error that a problem's code stands for; an unknown code is a `BackendError`."""
    error_class = error_classes().get(code, BackendError)
    if issubclass(error_class, BackendUnavailableError):
        return error_class(backend, detail, retry_after_s)
    if issubclass(error_class, BackendFullError):
        return BackendFullError(backend, detail)
    if issubclass(error_class, BackendError) or error_class is KVStoreError:
        return BackendError(backend, detail)
    return error_class(detail)


def _verified(key: ChunkKey, record: Frame | Miss) -> Frame | Miss:
    if isinstance(record, Frame):
        try:
            record.verify(key)
        except FrameError:
            return Miss(Reason.CORRUPT)
    return record


def _by_namespace(keys: Sequence[ChunkKey], keys_max: int) -> Iterator[tuple[str, bytes]]:
    """Runs of keys of one namespace, in order: the namespace in hexadecimal, and the digests joined."""
    for namespace, run in groupby(keys, key=lambda key: key[:NAMESPACE_BYTES]):
        digests = b"".join([key[NAMESPACE_BYTES:] for key in run])
        for start in range(0, len(digests), keys_max * DIGEST_BYTES):
            yield namespace.hex(), digests[start : start + keys_max * DIGEST_BYTES]


def _bodies(items: Iterable[tuple[ChunkKey, Frame]]) -> Iterator[list[Frame]]:
    """Frames of a put, cut into request bodies."""
    frames: list[Frame] = []
    for key, frame in items:
        assert key == frame.key, "a client puts a frame under the key that its header names"
        full = sum(other.size_bytes for other in frames) + frame.size_bytes > PUT_BYTES or len(frames) == PUT_FRAMES
        if frames and full:
            yield frames
            frames = []
        frames.append(frame)
    if frames:
        yield frames


async def _read_json(response: aiohttp.ClientResponse) -> dict[str, Any]:
    body = BodyReader(response.content, _ANSWER_BYTES_MAX, response.content_length)
    answer = json.loads(b"".join([bytes(part) async for part in body.parts()]))
    if not isinstance(answer, dict):
        raise TypeError("the server's answer is not a JSON object")
    return answer


async def _error_of(backend: str, response: aiohttp.ClientResponse) -> KVStoreError:
    try:
        answer = await _read_json(response)
        code, detail = str(answer["code"]), str(answer["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return BackendError(backend, f"{response.url} answered {response.status} {response.reason}")
    if response.status == 401:
        return AuthError(detail)
    retry_after = response.headers.get(hdrs.RETRY_AFTER, "")
    return error_from(backend, code, detail, float(retry_after) if retry_after.isdigit() else 1.0)


def _wait_query(wait_s: float) -> dict[str, str]:
    return {"wait_ms": str(min(round(wait_s * 1000), _WAIT_MS_MAX))} if wait_s else {}


def _body(digests: bytes) -> aiohttp.Payload:
    return aiohttp.BytesPayload(digests, content_type=DIGESTS_TYPE)


def _parse_nothing(_: Answer) -> None:
    return None


def _parse_match(keys: int, answer: Answer) -> Match:
    held: list[Held] = []
    for run in answer["runs"]:
        count = int(run["count"])
        if not 0 < count <= keys - len(held):
            raise ValueError(f"a run of {count} chunks is more than was asked for")
        held += [Held(None, _parse_copy(run))] * count
    if (answer["miss"] is None) != (len(held) == keys):
        raise ValueError(f"{len(held)} of {keys} chunks are said to be held, and miss is {answer['miss']!r}")
    return Match(held, None if answer["miss"] is None else Miss(_reason(answer["miss"])))


def _parse_page(namespace: bytes, answer: Answer) -> list[tuple[ChunkKey, Held]]:
    return [
        (chunk_key(namespace, bytes.fromhex(chunk["digest"])), Held(_frame_id(chunk), _parse_copy(chunk)))
        for chunk in answer["chunks"]
    ]


def _frame_id(chunk: Answer) -> bytes | None:
    return None if chunk["frame_id"] is None else bytes.fromhex(chunk["frame_id"])


def _parse_copy(fields: Answer) -> Copy:
    copy = Copy(
        str(fields["tier"]),
        int(fields["head_bytes"]),
        tuple(int(size) for size in fields["level_bytes"]),
        int(fields["levels"]),
        bool(fields["inexact"]),
    )
    if not 0 < len(copy.level_bytes) <= copy.levels or min(copy.head_bytes, *copy.level_bytes) < 0:
        raise ValueError(f"there is no such copy: {copy}")
    return copy


def _reason(text: str) -> Reason:
    try:
        return Reason(text)
    except ValueError:
        # A newer server may know reasons that this client does not.
        return Reason.ABSENT


def _parse_stored(backend: str, fields: Answer) -> Stored:
    ack = None if fields["ack"] is None else Ack[str(fields["ack"]).upper()]
    error = None
    if fields["code"] is not None:
        found = error_from(backend, str(fields["code"]), str(fields["detail"]))
        error = found if isinstance(found, BackendError) else BackendError(backend, str(found))
    outcome = Outcome(fields["outcome"])
    if (outcome is Outcome.FAILED) != (ack is None) or (ack is None and error is None):
        raise ValueError(f"a put cannot end so: {fields}")
    return Stored(outcome, ack, error)
