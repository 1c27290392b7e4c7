"""Settings of a server: flags over `KVSTORE_*` environment over a YAML file over defaults.

docs/configuration.md documents every field of `ServerConfig`; a test holds the two together.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from kvstore.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
WRITES = ("behind", "through")
PLACEMENTS = ("static", "learned")
ENCRYPTIONS = ("none", "AES256", "aws:kms")
_LEVEL_MAX = 15

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
        gpu_bytes: Budget of the GPU tier; 0 runs without one.
        gpu_device: Device of the GPU tier, as torch names it.
        s3_bucket: Bucket of the S3 tier; none runs without one.
        s3_endpoint: URL of the S3 service; none for Amazon's.
        s3_prefix: What the names of all objects begin with.
        s3_region: Region of the bucket; none leaves it to boto3's own configuration.
        s3_access_key: Key id; none takes what boto3 finds.
        s3_secret_key: The secret that belongs to it.
        s3_path_style: Put the bucket into the path instead of the host name; by default where there is an endpoint.
        s3_ca_bundle: File with the certificates that the endpoint is checked against.
        s3_encryption: Server-side encryption of objects: none, AES256 or aws:kms.
        s3_kms_key: Key for aws:kms.
        s3_threads: Calls that may run at one time.
        s3_timeout_s: Deadline of one call.
        disk_write: When a put that does not ask for the disk is written there: behind the answer, or through.
        s3_write: The same for S3.
        shrink_level: Highest quality level that chunks keep in a tier without room.
        placement: Whether `shrink_level` alone says so, or what fetches ask for, where profiles were pushed.
        token: Bearer token of the default tenant.
        tenants: Bearer token of every further tenant, by tenant name.
        tenant_secret: Key of the hash that keeps tenants apart; needed where `tenants` is set.
        insecure: Listen on any address without a token.
        body_bytes_max: Largest body of one request.
        inflight_bytes_max: Bytes of bodies that may be in receipt at one time.
        write_behind_bytes: Bytes that may wait for the disk tier, and for S3, before puts are refused with 503.
        quality_budget_nats: Largest quality loss of what is fetched, where a request names none.
        decision_log: File to which decisions are written with their reasons and outcomes; none writes none.
        decision_log_bytes: Size from which on the file is begun anew; the one before is kept beside it.
        scrub_bytes_per_s: Rate at which what is stored is read and verified in the background; 0 never does.
        body_timeout_s: A body must arrive at 1 MB/s after this many seconds.
        wait_s_max: Longest time that a request may wait for chunks.
        waiters_max: Requests that may wait for chunks at one time.
        tenant_waiters_max: The same for one tenant.
        fetch_bytes_max: Bytes of chunks that fetches may hold at one time.
        shutdown_timeout_s: Time that running requests get on shutdown.
        flush_timeout_s: Time that queued writes get after that.
    """

    host: str = "127.0.0.1"
    port: int = 8420
    data_dir: Path = Path("kvstore-data")
    memory_bytes: int = 2 * 2**30
    disk_bytes: int = 20 * 2**30
    gpu_bytes: int = 0
    gpu_device: str = "cuda"
    s3_bucket: str | None = None
    s3_endpoint: str | None = None
    s3_prefix: str = "kvstore/"
    s3_region: str | None = None
    s3_access_key: str | None = field(default=None, repr=False)
    s3_secret_key: str | None = field(default=None, repr=False)
    s3_path_style: bool | None = None
    s3_ca_bundle: Path | None = None
    s3_encryption: str = "none"
    s3_kms_key: str | None = None
    s3_threads: int = 16
    s3_timeout_s: float = 30.0
    disk_write: str = "behind"
    s3_write: str = "behind"
    shrink_level: int = 1
    placement: str = "learned"
    token: str | None = field(default=None, repr=False)
    tenants: Mapping[str, str] = field(default_factory=dict, repr=False)
    tenant_secret: str | None = field(default=None, repr=False)
    insecure: bool = False
    body_bytes_max: int = 256 * 2**20
    inflight_bytes_max: int = 2**30
    write_behind_bytes: int = 512 * 2**20
    quality_budget_nats: float = 0.01
    decision_log: Path | None = None
    decision_log_bytes: int = 64 * 2**20
    scrub_bytes_per_s: int = 8 * 2**20
    body_timeout_s: float = 30.0
    wait_s_max: float = 60.0
    waiters_max: int = 4096
    tenant_waiters_max: int = 1024
    fetch_bytes_max: int = 2**30
    shutdown_timeout_s: float = 30.0
    flush_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be 0 to 65535, not {self.port}")
        if self.memory_bytes < 2**20:
            raise ConfigError(f"memory must be at least 1MiB, not {self.memory_bytes} bytes")
        if 0 < self.disk_bytes < 2**20 or self.disk_bytes > 2**48:
            raise ConfigError(f"disk must be 0 (no disk tier) or 1MiB to 256TiB, not {self.disk_bytes} bytes")
        if 0 < self.gpu_bytes < 2**20:
            raise ConfigError(f"gpu must be 0 (no GPU tier) or at least 1MiB, not {self.gpu_bytes} bytes")
        for name in ("disk_write", "s3_write"):
            if getattr(self, name) not in WRITES:
                raise ConfigError(f"{name} must be one of {', '.join(WRITES)}, not {getattr(self, name)!r}")
        if not 0 <= self.shrink_level <= _LEVEL_MAX:
            raise ConfigError(f"shrink_level must be 0 to {_LEVEL_MAX}, not {self.shrink_level}")
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"placement must be one of {', '.join(PLACEMENTS)}, not {self.placement!r}")
        self._check_s3()
        if self.body_bytes_max < 2**10:
            raise ConfigError(f"body_bytes_max must be at least 1KiB, not {self.body_bytes_max} bytes")
        if self.decision_log_bytes < 2**16:
            raise ConfigError(f"decision_log_bytes must be at least 64KiB, not {self.decision_log_bytes}")
        if min(self.waiters_max, self.tenant_waiters_max) < 0:
            raise ConfigError("waiters_max and tenant_waiters_max must be 0 (nobody may wait) or more")
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

    def _check_s3(self) -> None:
        if self.s3_bucket is None and self.s3_endpoint is not None:
            raise ConfigError("s3_endpoint is set, s3_bucket is not: name the bucket, or leave both out")
        if self.s3_encryption not in ENCRYPTIONS:
            raise ConfigError(f"s3_encryption must be one of {', '.join(ENCRYPTIONS)}, not {self.s3_encryption!r}")
        if self.s3_kms_key is not None and self.s3_encryption != "aws:kms":
            raise ConfigError("s3_kms_key is only used with s3_encryption: aws:kms")
        if (self.s3_access_key is None) != (self.s3_secret_key is None):
            raise ConfigError("s3_access_key and s3_secret_key belong together: set both or neither")
        if not 1 <= self.s3_threads <= 256:
            raise ConfigError(f"s3_threads must be 1 to 256, not {self.s3_threads}")

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


def parse_url(value: object) -> str:
    """A server's URL, without a slash at its end.

    Raises:
        ConfigError: The text is none.
    """
    try:
        parts = urlsplit(value if isinstance(value, str) else "")
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts.geturl().rstrip("/")
        problem = "it must start with http:// or https:// and name a host"
    except ValueError as exc:
        # The port is no number, or out of range.
        problem = str(exc)
    raise ConfigError(f"{value!r} is not a server's URL: {problem}, such as http://127.0.0.1:8420")


def _public_name(field_name: str) -> str:
    """`memory` for `memory_bytes`: the budgets of tiers drop their unit, as sizes carry one."""
    return {"memory_bytes": "memory", "disk_bytes": "disk", "gpu_bytes": "gpu"}.get(field_name, field_name)


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
    if name.endswith(("_bytes", "_bytes_max", "_bytes_per_s")):
        convert: Callable[[object], object] = parse_size
    elif name.endswith(("_s", "_s_max")):
        convert = _positive
    else:
        convert = _CONVERTERS.get(name, str)
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


def _nats(value: object) -> float:
    try:
        number = float(str(value))
    except ValueError as exc:
        raise ConfigError(f"{value!r} is not a number") from exc
    if not 0 <= number <= 1e3:
        raise ConfigError(f"{value!r} must be a number of nats from 0 to 1000")
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


_CONVERTERS: Mapping[str, Callable[[object], object]] = {
    "port": _integer,
    "data_dir": _path,
    "s3_ca_bundle": _path,
    "s3_path_style": _boolean,
    "s3_threads": _integer,
    "shrink_level": _integer,
    "quality_budget_nats": _nats,
    "decision_log": _path,
    "waiters_max": _integer,
    "tenant_waiters_max": _integer,
    "insecure": _boolean,
    "tenants": _tenants,
}
