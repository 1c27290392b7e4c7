"""Sets of profiles: `/v1/profiles/{namespace}`, with the calibration artefacts that they need.

They are files in the data directory, one folder for a namespace: few, small beside what is cached, and not evicted.
"""

import asyncio
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web

from kvstore.backends.policies import Placement
from kvstore.controller.losses import Losses
from kvstore.controller.placement import LearnedPlacement
from kvstore.controller.tables import renewed
from kvstore.errors import BackendFullError, KVStoreError, NoProfilesError, ProfileError
from kvstore.files import write_whole
from kvstore.inspection import artefact_report
from kvstore.keys import DIGEST_BYTES, NAMESPACE_BYTES, parse_hex
from kvstore.profile import SET_BYTES_MAX, SET_FILE, ProfileSet, load_profiles, profiles_json
from kvstore.server.auth import Tenants
from kvstore.server.query import url_namespace
from kvstore.server.receive import Receiver

PATH = "/v1/profiles/{namespace}"
ARTEFACT_PATH = PATH + "/artefacts/{digest}"
_JSON = "application/json"
_BYTES = "application/octet-stream"
_LOSSES_MAX = 1024

log = logging.getLogger(__name__)


class ProfileStore:
    """Sets and artefacts by namespace. Methods block; callers use threads, one at a time for a namespace.

    Args:
        folder: Where they are kept; made when the first one comes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._losses: dict[bytes, Losses | None] = {}

    def losses(self, namespace: bytes) -> Losses | None:
        """The set of a namespace, to look up what its levels lose; kept in memory, as every plan asks for it."""
        if namespace not in self._losses:
            try:
                found = self.get(namespace)
            except (OSError, ProfileError) as exc:
                log.warning("the profiles of %s cannot be read: %s", namespace.hex(), exc)
                found = None
            renewed(self._losses, namespace, _LOSSES_MAX, lambda: None if found is None else Losses(found))
        return self._losses[namespace]

    def put(self, namespace: bytes, found: ProfileSet) -> list[str]:
        """Keep a set in place of the one before; artefacts that no profile needs any more are deleted.

        Returns:
            Digests of the artefacts that are still to be put.

        Raises:
            BackendFullError: It cannot be written.
        """
        folder = self._folder / namespace.hex()
        self._write(folder / SET_FILE, json.dumps(profiles_json(found)).encode())
        self._losses.pop(namespace, None)
        for file in folder.iterdir():
            if file.name not in (SET_FILE, *found.artefacts):
                file.unlink(missing_ok=True)
        return self.missing(namespace, found)

    def get(self, namespace: bytes) -> ProfileSet | None:
        """The set of a namespace."""
        try:
            data = (self._folder / namespace.hex() / SET_FILE).read_bytes()
        except FileNotFoundError:
            return None
        return load_profiles(data)

    def all(self) -> Iterator[tuple[bytes, ProfileSet]]:
        """The sets of all namespaces that can be read."""
        for file in sorted(self._folder.glob(f"*/{SET_FILE}")):
            try:
                namespace = parse_hex(file.parent.name, NAMESPACE_BYTES, "namespace")
                if (found := self.get(namespace)) is not None:
                    yield namespace, found
            except (KVStoreError, OSError) as exc:
                log.warning("the profiles in %s cannot be used: %s", file.parent, exc)

    def delete(self, namespace: bytes) -> None:
        """Forget the set of a namespace and its artefacts."""
        shutil.rmtree(self._folder / namespace.hex(), ignore_errors=True)
        self._losses.pop(namespace, None)

    def missing(self, namespace: bytes, found: ProfileSet) -> list[str]:
        """Digests of artefacts that a set needs and that are not here."""
        folder = self._folder / namespace.hex()
        return [digest for digest in found.artefacts if not (folder / digest).is_file()]

    def put_artefact(self, namespace: bytes, digest: str, data: bytes) -> None:
        """Keep an artefact of the namespace's set.

        Raises:
            ProfileError: No profile of the set needs it, or the bytes are none with this digest.
            BackendFullError: It cannot be written.
        """
        held = self.get(namespace)
        if held is None or digest not in held.artefacts:
            raise ProfileError("no profile of this namespace needs the artefact: put the set of profiles first")
        if hashlib.sha256(data).hexdigest() != digest:
            raise ProfileError("the bytes of the artefact have another digest")
        try:
            artefact_report(memoryview(data))
        except KVStoreError as exc:
            raise ProfileError(str(exc)) from exc
        self._write(self._folder / namespace.hex() / digest, data)

    def artefact(self, namespace: bytes, digest: str) -> Path | None:
        """File of an artefact."""
        file = self._folder / namespace.hex() / digest
        return file if file.is_file() else None

    def _write(self, file: Path, data: bytes) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, data)
        except OSError as exc:
            raise BackendFullError("profiles", f"cannot write {file.name}: {exc.strerror or exc}") from exc


class ProfileRoutes:
    """Handlers for sets of profiles."""

    def __init__(self, tenants: Tenants, receiver: Receiver, store: ProfileStore) -> None:
        self._tenants = tenants
        self._receiver = receiver
        self._store = store
        self._writing = asyncio.Lock()
        self._placement: LearnedPlacement | None = None

    async def place(self, placement: Placement) -> None:
        """Tell a placement that learns of every set, now and whenever one is put or deleted."""
        if isinstance(placement, LearnedPlacement):
            self._placement = placement
            for namespace, found in await asyncio.to_thread(lambda: list(self._store.all())):
                placement.know(namespace, found)

    def routes(self) -> list[web.RouteDef]:
        """The routes of this group."""
        return [
            web.put(PATH, self.put),
            web.get(PATH, self.get),
            web.delete(PATH, self.delete),
            web.put(ARTEFACT_PATH, self.put_artefact),
            web.get(ARTEFACT_PATH, self.get_artefact),
        ]

    async def put(self, request: web.Request) -> web.Response:
        """Keep the set of a namespace; the answer names the artefacts that are still to be put."""
        namespace = self._namespace(request)
        found = load_profiles(await self._receiver.body(request, _JSON, SET_BYTES_MAX))
        async with self._writing:
            missing = await asyncio.to_thread(self._store.put, namespace, found)
            self._know(namespace, found)
        return web.json_response({"profiles": len(found.profiles), "missing": missing})

    async def get(self, request: web.Request) -> web.Response:
        """The set of a namespace."""
        namespace = self._namespace(request)
        found = await asyncio.to_thread(self._store.get, namespace)
        if found is None:
            raise NoProfilesError("no profiles were pushed for this namespace")
        return web.json_response(profiles_json(found))

    async def delete(self, request: web.Request) -> web.Response:
        """Forget the set of a namespace."""
        namespace = self._namespace(request)
        async with self._writing:
            await asyncio.to_thread(self._store.delete, namespace)
            self._know(namespace, None)
        return web.Response(status=204)

    async def put_artefact(self, request: web.Request) -> web.Response:
        """Keep an artefact that the set of the namespace needs."""
        namespace, digest = self._namespace(request), _digest(request)
        data = await self._receiver.body(request, _BYTES, self._receiver.limit_bytes)
        async with self._writing:
            await asyncio.to_thread(self._store.put_artefact, namespace, digest, data)
        return web.Response(status=204)

    async def get_artefact(self, request: web.Request) -> web.StreamResponse:
        """The bytes of an artefact."""
        file = self._store.artefact(self._namespace(request), _digest(request))
        if file is None:
            raise NoProfilesError("there is no such artefact for this namespace")
        return web.FileResponse(file, headers={"Content-Type": _BYTES})

    def _know(self, namespace: bytes, found: ProfileSet | None) -> None:
        if self._placement is not None:
            self._placement.know(namespace, found)

    def _namespace(self, request: web.Request) -> bytes:
        tenant = self._tenants.authenticate(request)
        return self._tenants.scope(tenant, url_namespace(request))


def _digest(request: web.Request) -> str:
    return parse_hex(request.match_info["digest"], DIGEST_BYTES, "artefact digest").hex()
