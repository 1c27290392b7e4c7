"""Settings: where they come from, in which order, and which are refused."""

from pathlib import Path
from typing import Any

import pytest

from kvstore.config import ServerConfig, load_config, parse_size
from kvstore.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), (4096, 4096), ("20GiB", 20 << 30), ("1.5 kb", 1500), ("2 TiB", 2 << 40), ("7B", 7)],
)
def test_sizes_have_units(text: object, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e3", "5 parsecs", "1,5GiB", None, True, -3, 1.5])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)


def test_flags_beat_the_environment_and_that_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "kvstore.yaml"
    file.write_text("port: 1\nmemory: 1GiB\ndisk: 3GiB\nbody_timeout_s: 5\n")
    environ = {"KVSTORE_MEMORY": "2GiB", "KVSTORE_PORT": "2", "PATH": "/bin"}
    config = load_config({"port": 3, "host": None}, environ, file)
    assert (config.port, config.memory_bytes, config.disk_bytes, config.body_timeout_s) == (3, 2 << 30, 3 << 30, 5)
    assert config.host == ServerConfig().host


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown setting 'prot'.*port"),
        ("memory_bytes: 1GiB", "unknown setting 'memory_bytes'"),
        ("- 1", "mapping"),
        ("a: [", "cannot read"),
        ("port: many", "port: 'many' is not a number"),
        ("memory: much", "memory: .*not a size"),
        ("insecure: perhaps", "neither true nor false"),
        ("body_timeout_s: 0", "positive"),
        ("tenants: 3", "tenants: this must map"),
        ("tenants: {a: 3}", "tenants: this must map"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "kvstore.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config({}, {}, file)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "kvstore.yaml"
    file.write_text("")
    assert load_config({}, {}, file) == ServerConfig()
    with pytest.raises(ConfigError, match="cannot read"):
        load_config({}, {}, tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port"),
        ({"memory_bytes": 10}, "memory"),
        ({"disk_bytes": 10}, "disk"),
        ({"host": "0.0.0.0"}, "token"),
        ({"host": "example.org"}, "token"),
        ({"tenants": {"a": "x"}}, "tenant_secret"),
        ({"tenants": {"a": "x", "b": "x"}, "tenant_secret": "s"}, "token of its own"),
        ({"tenants": {"a": ""}, "tenant_secret": "s"}, "token of its own"),
        ({"tenants": {"a": "x"}, "token": "x", "tenant_secret": "s"}, "token of its own"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**settings)


@pytest.mark.parametrize(
    "settings", [{"token": "t"}, {"insecure": True}, {"tenants": {"a": "t"}, "tenant_secret": "s"}]
)
def test_another_address_is_fine_with_a_token_or_when_said_to_be_insecure(settings: dict[str, Any]) -> None:
    assert ServerConfig(host="0.0.0.0", **settings).host == "0.0.0.0"
