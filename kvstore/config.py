"""Settings of a server: flags over `KVSTORE_*` environment over a YAML file over defaults.

docs/configuration.md documents every field of `ServerConfig`; a test holds the two together.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import yaml

from kvstore.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of `kvstore serve`.

    Args:
        host: Address to listen on. Any but a loopback address needs a token or `insecure`.
        port: TCP port; 0 takes a free one.
        data_dir: Directory of the disk tier.
        memory_bytes: Budget of the host memory tier.
        disk_bytes: Budget of the disk tier; 0 runs without one.
        token: Bearer token of the default tenant.
        tenants: Bearer token of every further tenant, by tenant name.
        tenant_secret: Key of the hash that keeps tenants apart; needed where `tenants` is set.
        insecure: Listen on any address without a token.
        body_bytes_max: Largest body of one request.
        inflight_bytes_max: Bytes of bodies that may be in receipt at one time.
        write_behind_bytes: Bytes that may wait for the disk tier before puts are refused with 503.
        body_timeout_s: A body must arrive at 1 MB/s after this many seconds.
        shutdown_timeout_s: Time that running requests get on shutdown.
    """

    host: str = "127.0.0.1"
    port: int = 8420
    data_dir: Path = Path("kvstore-data")
    memory_bytes: int = 2 * 2**30
    disk_bytes: int = 20 * 2**30
    token: str | None = field(default=None, repr=False)
    tenants: Mapping[str, str] = field(default_factory=dict, repr=False)
    tenant_secret: str | None = field(default=None, repr=False)
    insecure: bool = False
    body_bytes_max: int = 256 * 2**20
    inflight_bytes_max: int = 2**30
    write_behind_bytes: int = 512 * 2**20
    body_timeout_s: float = 30.0
    shutdown_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be 0 to 65535, not {self.port}")
        if self.memory_bytes < 2**20:
            raise ConfigError(f"memory must be at least 1MiB, not {self.memory_bytes} bytes")
        if 0 < self.disk_bytes < 2**20 or self.disk_bytes > 2**48:
            raise ConfigError(f"disk must be 0 (no disk tier) or 1MiB to 256TiB, not {self.disk_bytes} bytes")
        if self.body_bytes_max < 2**10:
            raise ConfigError(f"body_bytes_max must be at least 1KiB, not {self.body_bytes_max} bytes")
        if "" in self.tenants:
            raise ConfigError("tenants: a tenant needs a name")
        if self.tenants and not self.tenant_secret:
            raise ConfigError("tenants need a tenant_secret: any long random text, the same on every server")
        tokens = [*self.tenants.values(), *([self.token] if self.token else [])]
        if len(set(tokens)) != len(tokens) or not all(tokens):
            raise ConfigError("every tenant needs a token of its own")
        if not self.is_loopback and not tokens and not self.insecure:
            raise ConfigError(
                f"listening on {self.host} without a token would give everybody on the network your data: "
                "set --token (or KVSTORE_TOKEN), or say --insecure"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def load_config(flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None = None) -> ServerConfig:
    """Settings from all sources, the strongest first: flags, environment, YAML file, defaults.

    Args:
        flags: Settings by field name; None stands for a flag that was not given.
        environ: Environment; `KVSTORE_PORT` sets `port`, and so on.
        file: YAML file with settings by name.

    Raises:
        ConfigError: A setting is unknown or its value cannot be understood.
    """
    known = {setting.name for setting in fields(ServerConfig)}
    settings: dict[str, object] = {} if file is None else _read_file(file, known)
    for name in known - {"tenants"}:
        if (text := environ.get(f"KVSTORE_{_public_name(name).upper()}")) is not None:
            settings[name] = text
    settings |= {name: value for name, value in flags.items() if value is not None}
    return ServerConfig(**{name: _convert(name, value) for name, value in settings.items()})


def parse_size(value: object) -> int:
    """Bytes from an integer or a text such as `20GiB`, `500 MB` or `4096`.

    Raises:
        ConfigError: The text is not a size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{value!r} is not a size: write bytes or a number with KiB, MiB, GiB or TiB")
    size_bytes = float(match[1]) * _UNITS[match[2].upper()]
    if size_bytes >= 2**63:
        raise ConfigError(f"{value!r} is not a size that any machine has")
    return int(size_bytes)


def _public_name(field_name: str) -> str:
    """`memory` for `memory_bytes`: the two tier budgets drop their unit, as sizes carry one."""
    return {"memory_bytes": "memory", "disk_bytes": "disk"}.get(field_name, field_name)


def _read_file(file: Path, known: set[str]) -> dict[str, object]:
    try:
        loaded = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigError(f"cannot read the configuration {file}: {exc}") from exc
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} must be a YAML mapping of settings")
    by_public_name = {_public_name(name): name for name in known}
    unknown = [str(name) for name in loaded if name not in by_public_name]
    if unknown:
        raise ConfigError(f"{file}: unknown setting {unknown[0]!r}; known: {', '.join(sorted(by_public_name))}")
    empty = [name for name, value in loaded.items() if value is None]
    if empty:
        raise ConfigError(f"{file}: the setting {empty[0]!r} has no value; leave it out for its default")
    return {by_public_name[name]: value for name, value in loaded.items()}


def _convert(name: str, value: object) -> Any:
    """Value of a field from what a source gave.

    Raises:
        ConfigError: It cannot be understood; the message names the setting.
    """
    if name.endswith(("_bytes", "_bytes_max")):
        convert: Callable[[object], object] = parse_size
    elif name.endswith("_s"):
        convert = _positive
    else:
        convert = {"port": _integer, "data_dir": _path, "insecure": _boolean, "tenants": _tenants}.get(name, str)
    try:
        return convert(value)
    except ConfigError as exc:
        raise ConfigError(f"{_public_name(name)}: {exc}") from exc


def _integer(value: object) -> int:
    try:
        return int(str(value))
    except ValueError as exc:
        raise ConfigError(f"{value!r} is not a number") from exc


def _path(value: object) -> Path:
    return Path(str(value))


def _positive(value: object) -> float:
    try:
        number = float(str(value))
    except ValueError as exc:
        raise ConfigError(f"{value!r} is not a number") from exc
    if not 0 < number < 1e9:
        raise ConfigError(f"{value!r} must be a positive number of seconds")
    return number


def _boolean(value: object) -> bool:
    text = str(value).lower()
    if text not in {"true", "false", "1", "0", "yes", "no"}:
        raise ConfigError(f"{value!r} is neither true nor false")
    return text in {"true", "1", "yes"}


def _tenants(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(token, str) for token in value.values()):
        raise ConfigError("this must map tenant names to tokens")
    return {str(name): token for name, token in value.items()}
