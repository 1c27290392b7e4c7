"""`kvstore serve` as people start it: flags, environment, YAML file, and what it says when they do not fit."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import aiohttp
import pytest

import kvstore
from kvstore.cli import main
from kvstore.config import ServerConfig
from kvstore.server import running_server
from kvstore.testing import make_frame
from tests.conftest import Serve, Server, path_of
from tests.frames import random_keys

KEY = random_keys(1)[0]
Refusal = Callable[..., str]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings from outside, and a working directory of its own."""
    for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """What the command says of flags with which it ends with exit status 2; a server that does start, stops at once."""

    async def start_and_stop(config: ServerConfig, announce: Callable[[str], None]) -> None:
        async with running_server(config) as url:
            announce(url)

    def refuse(*flags: str) -> str:
        monkeypatch.setattr("kvstore.server.serve", start_and_stop)
        try:
            status = main(["serve", *flags])
        except SystemExit as exc:
            status = int(exc.code or 0)
        printed = capsys.readouterr()
        assert (status, printed.out) == (2, ""), printed
        return printed.err

    return refuse


# What it announces


async def test_it_announces_where_it_listens(serve: Serve, session: aiohttp.ClientSession) -> None:
    process = serve()
    assert process.announced.startswith("listening on http://127.0.0.1:")
    server = Server(process.url, session)
    assert server.port not in (0, 8420)
    assert (await server.ask("GET", "/readyz")).json["ready"]
    assert process.terminate() == 0


async def test_it_announces_as_json(serve: Serve, session: aiohttp.ClientSession) -> None:
    url = json.loads(serve("--json").announced)["listening"]
    assert (await Server(url, session).ask("GET", "/readyz")).status == 200


async def test_it_takes_the_port_it_is_given(serve: Serve, session: aiohttp.ClientSession, free_port: int) -> None:
    assert serve("--port", str(free_port)).url == f"http://127.0.0.1:{free_port}"


async def test_it_announces_an_address_where_it_is_called_by_name(serve: Serve, session: aiohttp.ClientSession) -> None:
    async with session.get(f"{serve('--host', 'localhost').url}/readyz") as response:
        assert response.status == 200


async def test_it_announces_an_address_of_version_6_as_a_url(serve: Serve, session: aiohttp.ClientSession) -> None:
    if not _has_version_6():
        pytest.skip("this machine has no IPv6 loopback address")
    process = serve("--host", "::1")
    assert process.announced.startswith("listening on http://[::1]:")
    async with session.get(f"{process.url}/readyz") as response:
        assert response.status == 200


def _has_version_6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


def test_a_port_that_is_taken_is_refused(serve: Serve) -> None:
    port = serve().url.rsplit(":", 1)[1]
    status, stderr = serve("--port", port, "--disk", "0").end()
    assert status == 2
    assert f"127.0.0.1:{port}" in stderr
    assert "Traceback" not in stderr


async def test_it_keeps_its_data_where_it_is_told(serve: Serve, session: aiohttp.ClientSession, tmp_path: Path) -> None:
    server = Server(serve("--data-dir", "elsewhere/deep").url, session)
    assert (await server.put(make_frame(KEY), "disk")).headers["Kvstore-Ack"] == "disk"
    assert (tmp_path / "elsewhere" / "deep" / "lmdb" / "data.mdb").exists()


async def test_it_runs_without_a_disk(serve: Serve, session: aiohttp.ClientSession, tmp_path: Path) -> None:
    server = Server(serve("--disk", "0").url, session)
    assert (await server.put(make_frame(KEY), "disk")).headers["Kvstore-Ack"] == "memory"
    assert not (tmp_path / "data").exists()


def test_the_command_and_the_module_are_the_same() -> None:
    command = Path(sys.executable).parent / "kvstore"
    for program in ([str(command)], [sys.executable, "-m", "kvstore"]):
        done = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"kvstore {kvstore.__version__}\n"


def test_help_names_every_flag_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for word in ("--host", "127.0.0.1", "--port", "8420", "--data-dir", "--memory", "2GiB", "--disk", "20GiB"):
        assert word in text


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


# What it refuses


def test_the_refusal_of_a_real_process_is_one_line(serve: Serve, tmp_path: Path) -> None:
    status, stderr = serve("--host", "0.0.0.0").end()
    assert status == 2
    assert stderr.startswith("kvstore: listening on 0.0.0.0 without a token")
    assert len(stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org"])
def test_an_open_address_without_a_token_is_refused_with_what_to_do(refusal: Refusal, host: str) -> None:
    message = refusal("--host", host)
    for word in ("--token", "KVSTORE_TOKEN", "--insecure"):
        assert word in message


@pytest.mark.parametrize("flags", [("--token", "secret"), ("--insecure",)])
def test_an_open_address_is_served_with_a_token_or_a_word_for_it(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    served: list[ServerConfig] = []

    async def serve_nobody(config: ServerConfig, announce: Callable[[str], None]) -> None:
        served.append(config)

    monkeypatch.setattr("kvstore.server.serve", serve_nobody)
    assert main(["serve", "--host", "0.0.0.0", *flags]) == 0
    assert (served[0].host, served[0].token, served[0].insecure) == (
        "0.0.0.0",
        "secret" if "secret" in flags else None,
        "--insecure" in flags,
    )


async def test_a_token_given_as_a_flag_is_asked_for(serve: Serve, session: aiohttp.ClientSession) -> None:
    server = Server(serve("--token", "secret", "--disk", "0").url, session)
    assert (await server.ask("GET", path_of(KEY))).status == 401
    assert (await server.ask("GET", path_of(KEY), headers={"Authorization": "Bearer secret"})).status == 404


BAD_SIZES = ["", "-1", "much", "1.5.5GiB", "5 apples", "0x10", "1e9", "nan", "-5GiB", "²", "9" * 400, "9" * 400 + "TiB"]
BAD_SIZES += ["99999999TiB", "1000"]


@pytest.mark.parametrize("size", BAD_SIZES, ids=lambda size: size[:12])
@pytest.mark.parametrize("flag", ["--memory", "--disk"])
def test_a_bad_size_is_refused(refusal: Refusal, flag: str, size: str) -> None:
    assert flag.strip("-") in refusal(f"{flag}={size}", "--port", "0")


@pytest.mark.parametrize("size", BAD_SIZES, ids=lambda size: size[:12])
@pytest.mark.parametrize("name", ["memory", "disk"])
def test_a_bad_size_in_the_environment_is_refused(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, name: str, size: str
) -> None:
    monkeypatch.setenv(f"KVSTORE_{name.upper()}", size)
    assert name in refusal("--port", "0")


@pytest.mark.parametrize("port", ["-1", "65536", "http", "80.5", ""])
def test_a_bad_port_is_refused(refusal: Refusal, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    assert "port" in refusal(f"--port={port}")
    monkeypatch.setenv("KVSTORE_PORT", port)
    assert "port" in refusal()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BODY_TIMEOUT_S", "0"),
        ("BODY_TIMEOUT_S", "-1"),
        ("BODY_TIMEOUT_S", "nan"),
        ("BODY_TIMEOUT_S", "inf"),
        ("BODY_TIMEOUT_S", "soon"),
        ("SHUTDOWN_TIMEOUT_S", "-1"),
        ("INSECURE", "maybe"),
        ("BODY_BYTES_MAX", "0"),
        ("BODY_BYTES_MAX", "-1"),
        ("INFLIGHT_BYTES_MAX", "x"),
        ("WRITE_BEHIND_BYTES", "x"),
    ],
)
def test_another_bad_setting_in_the_environment_is_refused(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"KVSTORE_{name}", value)
    assert name.lower() in refusal("--port", "0")


@pytest.mark.parametrize("host", ["192.0.2.1", "::1%nothing"])
def test_an_address_of_another_machine_is_refused(refusal: Refusal, host: str) -> None:
    assert host in refusal("--host", host, "--port", "0", "--insecure", "--disk", "0")


# Environment and file


async def test_the_environment_sets_what_flags_do_not(
    serve: Serve, session: aiohttp.ClientSession, free_port: int, tmp_path: Path
) -> None:
    environ = {
        "KVSTORE_PORT": str(free_port),
        "KVSTORE_MEMORY": "3MiB",
        "KVSTORE_DISK": "4 MiB",
        "KVSTORE_TOKEN": "secret",
        "KVSTORE_DATA_DIR": str(tmp_path / "ignored"),
        "KVSTORE_BODY_BYTES_MAX": "1KiB",
    }
    process = serve(environ=environ)
    # The fixture gives --port 0 and --data-dir, and flags are stronger.
    assert process.url != f"http://127.0.0.1:{free_port}"
    assert not (tmp_path / "ignored").exists()
    server = Server(process.url, session)
    assert (await server.ask("GET", path_of(KEY))).status == 401
    token = {"Authorization": "Bearer secret"}
    assert (await server.ask("PUT", path_of(KEY), data=b"x" * 1025, headers=token)).status == 413
    assert await server.metric('kvstore_tier_budget_bytes{tier="host"}') == 3 << 20
    assert await server.metric('kvstore_tier_budget_bytes{tier="lmdb"}') == 4 << 20


def test_the_environment_alone_starts_a_server(free_port: int, tmp_path: Path) -> None:
    environ = {"KVSTORE_PORT": str(free_port), "KVSTORE_HOST": "127.0.0.1", "KVSTORE_DATA_DIR": str(tmp_path / "own")}
    process = subprocess.Popen(
        [sys.executable, "-m", "kvstore", "serve"], stdout=subprocess.PIPE, text=True, env=os.environ | environ
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"listening on http://127.0.0.1:{free_port}\n"
        assert (tmp_path / "own" / "lmdb").exists()
    finally:
        process.terminate()
        process.communicate(timeout=20)


async def test_an_empty_token_is_none(serve: Serve, session: aiohttp.ClientSession) -> None:
    server = Server(serve("--disk", "0", environ={"KVSTORE_TOKEN": ""}).url, session)
    assert (await server.ask("GET", path_of(KEY))).status == 404
    status, stderr = serve("--host", "0.0.0.0", "--disk", "0", environ={"KVSTORE_TOKEN": ""}).end()
    assert (status, "without a token" in stderr) == (2, True)


async def test_a_file_sets_what_flags_and_environment_do_not(
    serve: Serve, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    (tmp_path / "kv.yaml").write_text(
        "memory: 2MiB\n"
        "disk: 3145728\n"
        "port: 1\n"
        "body_bytes_max: 1KiB\n"
        "tenants:\n  alice: a token\n  bob: b token\n"
        "tenant_secret: any long random text\n"
    )
    process = serve("--config", "kv.yaml", "--memory", "4MiB", environ={"KVSTORE_BODY_BYTES_MAX": "2KiB"})
    server = Server(process.url, session)
    assert await server.metric('kvstore_tier_budget_bytes{tier="host"}') == 4 << 20
    assert await server.metric('kvstore_tier_budget_bytes{tier="lmdb"}') == 3 << 20
    assert (await server.ask("GET", path_of(KEY))).status == 401
    alice = {"Authorization": "Bearer a token"}
    assert (await server.ask("PUT", path_of(KEY), data=b"x" * 2048, headers=alice)).status == 201
    assert (await server.ask("PUT", path_of(KEY), data=b"x" * 2049, headers=alice)).status == 413
    assert (await server.ask("GET", path_of(KEY), headers={"Authorization": "Bearer b token"})).status == 404


def test_an_unknown_setting_in_a_file_is_refused_with_the_known_ones(refusal: Refusal) -> None:
    Path("kv.yaml").write_text("memmory: 1GiB\n")
    message = refusal("--config", "kv.yaml")
    for word in ("kv.yaml", "memmory", "memory", "disk", "body_timeout_s"):
        assert word in message


@pytest.mark.parametrize(
    "text",
    [
        "- memory\n",
        "memory\n",
        "7\n",
        "memory: [1]\n",
        "memory: {a: 1}\n",
        "memory: -1\n",
        "memory: true\n",
        "memory: 1.5\n",
        "port: yes\n",
        "port: 80.5\n",
        "host: [a]\n",
        "tenants: [alice]\n",
        "tenants: {alice: 1}\n",
        "tenants: {alice: a}\n",
        "tenants:\ntoken: 5\ntenant_secret: [x]\n",
        "insecure: maybe\n",
        "body_timeout_s: .nan\n",
        "memory_bytes: 2MiB\n",
        "1: 2\n",
        "memory: 1GiB\n  disk: 2\n",
        "memory: !!python/object/apply:os.system ['true']\n",
        "a: &a [*a, *a]\n",
        "\0",
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(refusal: Refusal, text: str) -> None:
    Path("kv.yaml").write_text(text)
    assert "Traceback" not in refusal("--config", "kv.yaml")


def test_a_file_that_is_not_text_is_refused(refusal: Refusal) -> None:
    Path("kv.yaml").write_bytes(b"\xff\xfe\0")
    assert "kv.yaml" in refusal("--config", "kv.yaml")


def test_a_file_that_is_not_there_is_refused(refusal: Refusal) -> None:
    assert "kv.yaml" in refusal("--config", "kv.yaml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n"])
async def test_an_empty_file_sets_nothing(
    serve: Serve, session: aiohttp.ClientSession, tmp_path: Path, text: str
) -> None:
    (tmp_path / "kv.yaml").write_text(text)
    assert serve("--config", "kv.yaml", "--disk", "0").url


@pytest.mark.parametrize(
    "name", ["token", "host", "data_dir", "tenant_secret", "memory", "port", "tenants", "insecure"]
)
def test_a_setting_without_a_value_in_a_file_is_refused(refusal: Refusal, name: str) -> None:
    # "token:" would otherwise become the token "None", which anybody can guess.
    Path("kv.yaml").write_text(f"{name}:\n")
    assert name in refusal("--config", "kv.yaml")
