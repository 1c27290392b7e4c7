"""The HTTP client: a server, seen as a `Backend`. Needs no torch; tensors are the business of `kvstore.prefix`."""

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import TypeVar

import aiohttp
from aiohttp import hdrs

from kvstore.answers import (
    MALFORMED,
    parse_match,
    parse_missing,
    parse_nothing,
    parse_page,
    parse_puts,
    problem_of,
    unpack_match,
    unpack_puts,
)
from kvstore.backend import Ack, Held, Match, Miss, Reason, Stored
from kvstore.config import parse_url
from kvstore.errors import (
    BackendError,
    BackendUnavailableError,
    FrameError,
    FrameVersionError,
    KVStoreError,
    NoProfilesError,
    RequestError,
)
from kvstore.frame import Frame
from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, ChunkKey
from kvstore.link_body import LinkBody
from kvstore.links import LinkRefusedError, Links
from kvstore.profile import ProfileSet, load_profiles, profiles_json
from kvstore.questions import Views, bodies, body_of, by_namespace, json_of, target_of, wait_query
from kvstore.stream import KEYS_MAX, Fetch
from kvstore.wire import (
    BATCH_TYPE,
    READ_BYTES,
    Body,
    BodyReader,
    ViewsPayload,
    batch_views,
    read_batch,
    total_bytes,
)

GET_KEYS_MAX = 256
MATCH_KEYS_MAX = 1 << 16
_ANSWER_BYTES_MAX = 16 << 20

T = TypeVar("T")


class Client:
    """Talks to one server over a pool of connections that stay open.

    Frames and keys travel on links (`kvstore.link`) where the server upgrades connections to them, else, and for
    all other requests, over HTTP.

    Use it as an asynchronous context manager, or call `aclose`. A call that finds no server, or none that answers in
    time, raises `BackendUnavailableError`.

    Args:
        url: Such as `http://127.0.0.1:8420`.
        token: Bearer token, where the server asks for one.
        timeout_s: Time that one request may take, beside what it is asked to wait.
        connections: Most links that are open at one time, and most HTTP connections, beside those that wait.
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
        self.url = parse_url(url)
        self._headers: dict[str, str] = {hdrs.AUTHORIZATION: f"Bearer {token}"} if token else {}
        self._timeout_s = timeout_s
        self._connections = connections
        self._batch_bytes_max = batch_bytes_max
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._links: Links | None = None

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
        for namespace, digests in by_namespace(keys, MATCH_KEYS_MAX):
            part = await self._match(namespace, digests, max(0.0, ends_s - time.monotonic()) if wait_s else 0.0)
            held += part.held
            if part.miss is not None:
                return Match(held, part.miss)
        return Match(held, None)

    async def _match(self, namespace: str, digests: bytes, wait_s: float) -> Match:
        count = len(digests) // DIGEST_BYTES
        query = {"namespace": namespace} | wait_query(wait_s)
        parse, unpack = partial(parse_match, count), partial(unpack_match, count)
        return await self._post("/v1/match", query, body_of(digests), parse, unpack, more_s=wait_s)

    async def get(self, keys: Sequence[ChunkKey], *, level: int | None = None) -> list[Frame | Miss]:
        found: list[Frame | Miss] = []
        while len(found) < len(keys):
            rest = keys[len(found) :]
            namespace, digests = next(by_namespace(rest, GET_KEYS_MAX))
            asked = rest[: len(digests) // DIGEST_BYTES]
            query = {"namespace": namespace} | ({} if level is None else {"level": str(level)})
            found += await self._get_some(query, digests, asked)
        return found

    @asynccontextmanager
    async def fetch(
        self, keys: Sequence[ChunkKey], *, level: int | None = None, wait_ms: int = 0, deadline_s: float | None = None
    ) -> AsyncIterator[Fetch]:
        """The leading run of chunks as one stream that brings their coarse levels first.

        Leaving the block before the stream has ended stops it; what is complete by then stays usable.

        Args:
            keys: Those of another namespace than the first, or beyond 1,024, are left for another call.
            level: Quality level to fetch up to, None for all that are held.
            wait_ms: Time that the server waits for chunks that are about to be put.
            deadline_s: When the stream ends, wherever it is.

        Raises:
            BackendError: The server cannot be asked, or has no room for another fetch.
        """
        namespace, digests = next(by_namespace(keys, KEYS_MAX))
        wait_s = wait_ms / 1000 if deadline_s is None else min(wait_ms / 1000, deadline_s)
        query = {"namespace": namespace} | ({} if level is None else {"level": str(level)}) | wait_query(wait_s)
        timeout_s = self._timeout_s + wait_s if deadline_s is None else deadline_s
        request = self._request("POST", "/v1/fetch", query, body_of(digests), timeout_s)
        response = await request.__aenter__()
        try:
            body = BodyReader(response.content, self._batch_bytes_max, response.content_length)
            yield Fetch(body, keys[: len(digests) // DIGEST_BYTES])
        finally:
            # What the caller's block raises is not the request's.
            response.close()
            await request.__aexit__(None, None, None)

    async def put(self, items: Sequence[tuple[ChunkKey, Frame]], *, ack: Ack = Ack.MEMORY) -> list[Stored]:
        stored: list[Stored] = []
        for frames in bodies(items):
            body = Views(list(batch_views(frames)), BATCH_TYPE)
            parse, unpack = partial(parse_puts, self.name, len(frames)), partial(unpack_puts, self.name, len(frames))
            stored += await self._post("/v1/put", {"ack": ack.name.lower()}, body, parse, unpack)
        return stored

    async def trim(self, keys: Sequence[ChunkKey], *, level: int) -> None:
        for namespace, digests in by_namespace(keys, MATCH_KEYS_MAX):
            query = {"namespace": namespace, "level": str(level)}
            await self._post("/v1/trim", query, body_of(digests), parse_nothing, parse_nothing)

    async def delete(self, keys: Sequence[ChunkKey]) -> None:
        for namespace, digests in by_namespace(keys, MATCH_KEYS_MAX):
            query = {"namespace": namespace}
            await self._post("/v1/delete", query, body_of(digests), parse_nothing, parse_nothing)

    async def scan(self, namespace: bytes | None = None) -> AsyncIterator[tuple[ChunkKey, Held]]:
        if namespace is None:
            raise BackendError(self.name, "a server lists one namespace at a time: name it")
        query = {"namespace": namespace.hex()}
        while page := await self.ask("GET", "/v1/scan", query, None, partial(parse_page, namespace)):
            for found in page:
                yield found
            query["after"] = page[-1][0][NAMESPACE_BYTES:].hex()

    async def profiles(self, namespace: bytes) -> ProfileSet | None:
        """The profiles that were pushed for a namespace, None where none were."""
        try:
            return await self.ask("GET", f"/v1/profiles/{namespace.hex()}", {}, None, load_profiles)
        except NoProfilesError:
            return None

    async def push_profiles(self, namespace: bytes, found: ProfileSet, artefacts: Mapping[str, bytes]) -> None:
        """Give the server a namespace's profiles, in place of those before.

        Args:
            namespace: Of the chunks that they are for.
            found: The profiles.
            artefacts: The calibration artefacts that they need, by digest.
        """
        path = f"/v1/profiles/{namespace.hex()}"
        missing = await self.ask("PUT", path, {}, json_of(profiles_json(found)), parse_missing)
        for digest in missing:
            body = Views([memoryview(artefacts[digest])], "application/octet-stream")
            await self.ask("PUT", f"{path}/artefacts/{digest}", {}, body, parse_nothing)

    async def aclose(self) -> None:
        if self._links is not None:
            self._links.close()
            self._links = None
        while self._sessions:
            await self._sessions.popitem()[1].close()

    async def _post(
        self,
        path: str,
        query: Mapping[str, str],
        body: Views,
        parse: Callable[[bytes], T],
        unpack: Callable[[bytes], T],
        *,
        more_s: float = 0.0,
    ) -> T:
        """A small answer: `unpack`ed where a link brings it, else `parse`d from JSON."""
        # A link that waits would not tell the server that the client has gone.
        if not more_s and (links := self._open_links()):
            target, size_bytes = target_of(path, query), total_bytes(body.views)
            asked = links.ask_small(target, body.views, size_bytes, self._timeout_s, _ANSWER_BYTES_MAX)
            try:
                status, answer = await self._on_link(asked)
            except LinkRefusedError:
                pass
            else:
                return self._parse(path, unpack, self._checked(path, status, answer))
        return await self.ask("POST", path, query, body, parse, more_s=more_s)

    async def ask(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Views | None,
        parse: Callable[[bytes], T],
        *,
        more_s: float = 0.0,
        answer_bytes_max: int = _ANSWER_BYTES_MAX,
    ) -> T:
        """An answer over HTTP, parsed."""
        async with self._request(method, path, query, body, self._timeout_s + more_s) as response:
            text = b"" if response.status == 204 else await _read(response, answer_bytes_max)
            return self._parse(path, parse, text)

    def _parse(self, path: str, parse: Callable[[bytes], T], text: bytes) -> T:
        try:
            return parse(text)
        except MALFORMED as exc:
            raise BackendError(self.name, f"{self.url}{path} gave an answer that is none: {exc!r}") from exc

    def _checked(self, path: str, status: int, text: bytes) -> bytes:
        if status >= 300:
            raise problem_of(self.name, f"{self.url}{path}", status, text)
        return text

    async def _on_link(self, asked: Awaitable[T]) -> T:
        """What was asked on a link; its failures as ours.

        Raises:
            LinkRefusedError: Ask over HTTP.
        """
        try:
            return await asked
        except LinkRefusedError:
            raise
        except TimeoutError as exc:
            raise BackendUnavailableError(self.name, f"{self.url} did not answer in {self._timeout_s} s") from exc
        except OSError as exc:
            raise BackendUnavailableError(self.name, f"{self.url}: {exc}") from exc

    async def _get_some(self, query: Mapping[str, str], digests: bytes, keys: Sequence[ChunkKey]) -> list[Frame | Miss]:
        """Verified answers for the first of `keys`, at least one."""
        if links := self._open_links():
            read = partial(self._read_records, keys)
            asked = links.ask(target_of("/v1/get", query), [digests], len(digests), self._timeout_s, read)
            try:
                return await self._on_link(asked)
            except LinkRefusedError:
                pass
        async with self._request("POST", "/v1/get", query, body_of(digests)) as response:

            def open_body() -> Body:
                return BodyReader(response.content, self._batch_bytes_max, response.content_length)

            found, whole = await self._records(keys, open_body)
            if not whole:
                response.close()
        return found

    async def _read_records(self, keys: Sequence[ChunkKey], status: int, body: LinkBody) -> list[Frame | Miss]:
        """The batch that a link brings; what is left of a damaged one goes with the link."""
        if status >= 300:
            self._checked("/v1/get", status, await body.bound(_ANSWER_BYTES_MAX).rest())
        found, _ = await self._records(keys, lambda: body.bound(self._batch_bytes_max))
        return found

    async def _records(
        self, keys: Sequence[ChunkKey], open_body: Callable[[], Body]
    ) -> tuple[list[Frame | Miss], bool]:
        """Verified answers for the first of `keys`, and whether the body was read to its end."""
        found: list[Frame | Miss] = []
        try:
            async for record in read_batch(open_body()):
                key = keys[len(found)]
                if isinstance(record, FrameError) or (isinstance(record, Frame) and record.key != key):
                    record = Miss(Reason.CORRUPT)
                found.append(record)
        except (FrameError, RequestError, IndexError) as exc:
            # Where one record ends and the next begins is not known any more, so the rest is lost with it.
            version = isinstance(exc, FrameVersionError)
            return found + [Miss(Reason.IDENTITY if version else Reason.CORRUPT)] * (len(keys) - len(found)), False
        except (aiohttp.ClientError, OSError) as exc:
            if not found:
                raise
            # What came before the connection broke is whole and verified.
            late = isinstance(exc, TimeoutError)
            return found + [Miss(Reason.DEADLINE if late else Reason.BREAKER)] * (len(keys) - len(found)), False
        if not found:
            raise BackendError(self.name, "the server answered a batch without records")
        return found, True

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Views | None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A successful response; everything else is one of our errors."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        timeout = aiohttp.ClientTimeout(total=timeout_s, ceil_threshold=math.inf)
        data = None if body is None else ViewsPayload(*body)
        try:
            async with self._open_session("wait_ms" in query).request(
                method, self.url + path, params=query, data=data, allow_redirects=False, timeout=timeout
            ) as response:
                if response.status >= 300:
                    raise await _error_of(self.name, response)
                yield response
        except TimeoutError as exc:
            raise BackendUnavailableError(self.name, f"{self.url} did not answer in {timeout_s} s") from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise BackendUnavailableError(self.name, f"{self.url}: {exc}") from exc

    def _open_links(self) -> Links | None:
        """The links, unless the server is known to have none."""
        if self._links is None:
            self._links = Links(self.url, self._headers, self._connections)
        return None if self._links.refused else self._links

    def _open_session(self, waits: bool) -> aiohttp.ClientSession:
        if waits not in self._sessions:
            # Requests that wait for a put must not keep others from their connections; the server bounds them.
            self._sessions[waits] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0 if waits else self._connections),
                headers=self._headers,
                read_bufsize=READ_BYTES,
                auto_decompress=False,
                trust_env=False,
            )
        return self._sessions[waits]


async def _read(response: aiohttp.ClientResponse, bytes_max: int = _ANSWER_BYTES_MAX) -> bytes:
    body = BodyReader(response.content, bytes_max, response.content_length)
    return b"".join([bytes(part) async for part in body.parts()])


async def _error_of(backend: str, response: aiohttp.ClientResponse) -> KVStoreError:
    retry_after = response.headers.get(hdrs.RETRY_AFTER, "")
    retry_after_s = float(retry_after) if retry_after.isdigit() else 1.0
    return problem_of(backend, str(response.url), response.status, await _read(response), retry_after_s)
