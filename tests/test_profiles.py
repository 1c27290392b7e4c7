"""Sets of profiles: their file, what is refused, and pushing them to a server."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.cli import main
from kvstore.client import Client
from kvstore.codecs.artefact import save_artefact
from kvstore.errors import NoProfilesError, ProfileError
from kvstore.profile import SET_BYTES_MAX, load_profiles, parse_profiles, profiles_json
from tests.conftest import Server, Start

NAMESPACE = "ab" * 16
DIGEST = hashlib.sha256(b"x").hexdigest()


def quality(**change: Any) -> dict[str, Any]:
    return {
        "kl_nats": 0.01,
        "standard_error": 0.001,
        "perplexity_change": 0.02,
        "agreement": 0.97,
        "prompts": 64,
    } | change


def level(**change: Any) -> dict[str, Any]:
    return {"ratio": 8.5, "decode_s_per_gb": 1.25, "quality": {"text-512": quality()}} | change


def profile(**change: Any) -> dict[str, Any]:
    return {
        "name": "p01",
        "pipeline": [{"stage": "mean"}, {"stage": "raw"}],
        "artefacts": [],
        "encode_s_per_gb": 2.0,
        "levels": [level(), level(ratio=4)],
    } | change


def a_set(**change: Any) -> dict[str, Any]:
    measured = {
        "model": "tiny",
        "revision": "0" * 64,
        "texts": ["a.txt"],
        "device": "cpu",
        "machine": "some processor",
        "date": "2026-11-22T00:00:00+00:00",
        "kvstore": "0.1",
        "seed": 0,
    }
    return {"version": 1, "measured": measured, "profiles": [profile()], "details": {}} | change


def test_a_set_comes_back_from_its_json() -> None:
    found = parse_profiles(a_set())
    assert profiles_json(found) == a_set(profiles=[profile(levels=[level(), level(ratio=4.0)])])
    assert load_profiles(json.dumps(profiles_json(found)).encode()) == found


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (a_set(version=2), "this build knows 1"),
        (a_set(version=True), "version True"),
        (a_set(more=1), "unknown field 'more'"),
        ({"version": 1}, "has no 'measured'"),
        ([], "must be a JSON object"),
        (a_set(profiles=[profile(), profile()]), "two profiles have the same name"),
        (a_set(profiles=[profile(name="P 1")]), "name must match"),
        (a_set(profiles=[profile(levels=[])]), "at least one level"),
        (a_set(profiles=[profile(pipeline=[{"levels": 3}])]), "stage must match"),
        (a_set(profiles=[profile(artefacts=["../../etc/passwd"])]), "an artefact must match"),
        (a_set(profiles=[profile(levels=[level(ratio=0)])]), "ratio must be a number"),
        (a_set(profiles=[profile(levels=[level(ratio="8")])]), "ratio must be a number"),
        (a_set(profiles=[profile(levels=[level(quality={})])]), "1 to 32 buckets"),
        (a_set(profiles=[profile(levels=[level(quality={"text": quality(kl_nats=-1)})])]), "kl_nats must be"),
        (a_set(profiles=[profile(levels=[level(quality={"text": quality(prompts=0)})])]), "prompts must be"),
        (a_set(profiles=[profile(name=f"p{n}") for n in range(65)]), "a list of at most 64"),
    ],
)
def test_a_bad_set_is_refused_by_the_field(bad: Any, says: str) -> None:
    with pytest.raises(ProfileError, match=says):
        parse_profiles(bad)


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\xff", b'{"version": NaN}', b" " * (SET_BYTES_MAX + 1)])
def test_bytes_that_are_no_set_are_refused(data: bytes) -> None:
    with pytest.raises(ProfileError):
        load_profiles(data)


def artefact() -> tuple[str, bytes]:
    data = save_artefact({"k.mean": torch.zeros(1, 1, 4)}, {"model": "tiny"})
    return hashlib.sha256(data).hexdigest(), data


async def test_a_server_keeps_a_set_with_its_artefacts(start: Start, tmp_path: Path) -> None:
    digest, data = artefact()
    found = parse_profiles(a_set(profiles=[profile(artefacts=[digest])]))
    server = await start()
    async with Client(server.url) as client:
        key = bytes.fromhex(NAMESPACE)
        assert await client.profiles(key) is None
        await client.push_profiles(key, found, {digest: data})
        assert await client.profiles(key) == found
        assert await client.profiles(bytes(16)) is None
    answer = await server.ask("GET", f"/v1/profiles/{NAMESPACE}/artefacts/{digest}")
    assert (answer.status, answer.body) == (200, data)
    await server.stop()
    server = await start()
    assert (await server.ask("GET", f"/v1/profiles/{NAMESPACE}")).json == profiles_json(found)
    # Another set takes its place, and what nobody needs any more goes.
    answer = await server.ask("PUT", f"/v1/profiles/{NAMESPACE}", json=a_set())
    assert answer.json == {"profiles": 1, "missing": []}
    await server.refused("GET", f"/v1/profiles/{NAMESPACE}/artefacts/{digest}", 404, "no-profiles")
    assert [file.name for file in (tmp_path / "data" / "profiles" / NAMESPACE).iterdir()] == ["profiles.json"]
    assert (await server.ask("DELETE", f"/v1/profiles/{NAMESPACE}")).status == 204
    await server.refused("GET", f"/v1/profiles/{NAMESPACE}", 404, "no-profiles")


async def test_a_server_refuses_what_is_no_set_and_no_artefact(server: Server) -> None:
    digest, data = artefact()
    path = f"/v1/profiles/{NAMESPACE}"
    raw = {"Content-Type": "application/octet-stream"}
    await server.refused("PUT", "/v1/profiles/xy", 400, "bad-key", json=a_set())
    await server.refused("PUT", path, 400, "profile", json=a_set(version=7))
    await server.refused("PUT", path, 415, "bad-media-type", data=b"{}", headers=raw)
    long = json.dumps(a_set(details={"x": "y" * SET_BYTES_MAX})).encode()
    is_json = {"Content-Type": "application/json"}
    await server.refused("PUT", path, 413, "body-too-large", data=long, headers=is_json)
    await server.refused("PUT", f"{path}/artefacts/{digest}", 400, "profile", data=data, headers=raw)
    await server.ask("PUT", path, json=a_set(profiles=[profile(artefacts=[digest, DIGEST])]))
    await server.refused("PUT", f"{path}/artefacts/{digest}", 400, "profile", data=b"else", headers=raw)
    await server.refused("PUT", f"{path}/artefacts/{DIGEST}", 400, "profile", data=b"x", headers=raw)
    await server.refused("PUT", f"{path}/artefacts/../x", 404)
    assert (await server.ask("PUT", f"{path}/artefacts/{digest}", data=data, headers=raw)).status == 204


async def test_tenants_have_profiles_of_their_own(start: Start) -> None:
    server = await start(tenants={"one": "a" * 32, "two": "b" * 32}, tenant_secret="c" * 32)
    async with Client(server.url, token="a" * 32) as one, Client(server.url, token="b" * 32) as two:
        await one.push_profiles(bytes(16), parse_profiles(a_set()), {})
        assert await one.profiles(bytes(16)) is not None
        assert await two.profiles(bytes(16)) is None
    await server.refused("GET", f"/v1/profiles/{'0' * 32}", 401, "unauthorized")


async def test_a_client_says_what_the_server_said(server: Server) -> None:
    digest, data = artefact()
    found = parse_profiles(a_set(profiles=[profile(artefacts=[digest])]))
    async with Client(server.url) as client:
        with pytest.raises(ProfileError, match="another digest"):
            await client.push_profiles(bytes(16), found, {digest: data + b"x"})
    assert issubclass(NoProfilesError, ProfileError)


def test_the_default_set_ships_and_needs_no_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles", "show", "default", "--json"]) == 0
    found = parse_profiles(json.loads(capsys.readouterr().out))
    assert found.profiles
    assert not found.artefacts
    measured = found.measured
    assert all((measured.model, measured.texts, measured.device, measured.machine, measured.date))


def test_the_commands_list_and_show_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "profiles-tiny"
    folder.mkdir()
    (folder / "profiles.json").write_text(json.dumps(a_set()))
    assert main(["profiles", "list", str(folder), "default", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["profiles"], row["levels"]) for row in rows[:1]] == [("tiny", 1, 2)]
    assert main(["profiles", "list", str(folder)]) == 0
    assert "tiny" in capsys.readouterr().out
    assert main(["profiles", "show", str(folder)]) == 0
    assert "8.50" in capsys.readouterr().out
    (folder / "profiles.json").write_text("{}")
    assert main(["profiles", "show", str(folder)]) == 2
    assert "is no set of profiles: the set has no 'version'" in capsys.readouterr().err
    assert main(["profiles", "show", str(tmp_path / "none")]) == 2
    assert "cannot read" in capsys.readouterr().err
