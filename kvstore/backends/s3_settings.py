"""Settings of the S3 tier, checked before anything is opened."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from kvstore.errors import ConfigError

PART_BYTES_MIN = 5 << 20
"""S3 refuses smaller parts of a multipart upload, the last one excepted."""
_PARTS_MAX = 10_000


@dataclass(frozen=True, kw_only=True)
class S3Settings:
    """Settings of an `S3Backend`.

    Args:
        bucket: Bucket that exists already.
        prefix: Prepended to every object's name; end it with `/` for a folder.
        endpoint_url: Such as `http://127.0.0.1:9000`; None asks Amazon.
        region: Region of the bucket; None leaves it to boto3's own configuration.
        access_key: With `secret_key`, the credentials; without both, boto3 looks where it always does.
        secret_key: See `access_key`.
        session_token: Of temporary credentials.
        path_style: Whether the bucket is named in the path, not in the host; None: where there is an `endpoint_url`.
        ca_bundle: PEM file of the authorities to trust instead of the usual ones.
        encryption: What S3 encrypts objects with: `none` (whatever the bucket does), `AES256` or `aws:kms`.
        kms_key_id: Key of `aws:kms`; None takes the account's own.
        threads: Requests of callers under way at one time.
        deadline_s: Time that any call may take, however many requests it makes.
        connect_timeout_s: Time for one connection to open.
        read_timeout_s: Time without a single byte from S3 after which a request is given up and tried again.
        attempts: Tries of one request, the first included.
        retry_mode: How botocore spaces them: `standard`, or `adaptive`, which also limits the rate when S3 asks.
        multipart_bytes: Frames of this size and above are sent in parts, several at a time.
        part_bytes: Size of those parts.
        frame_bytes_max: Larger frames are neither stored nor read.
        rebuild_threads: Requests under way at one time for the rebuilding of the index.
        breaker_failures: Failures in a row after which S3 is left alone for a while.
        breaker_cooldown_s: Length of the first such while; it doubles from one to the next.
        breaker_cooldown_max_s: Longest such while.

    Raises:
        ConfigError: A setting is out of range or contradicts another.
    """

    bucket: str
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None
    access_key: str | None = field(default=None, repr=False)
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    path_style: bool | None = None
    ca_bundle: Path | None = None
    encryption: Literal["none", "AES256", "aws:kms"] = "none"
    kms_key_id: str | None = None
    threads: int = 16
    deadline_s: float = 20.0
    connect_timeout_s: float = 3.0
    read_timeout_s: float = 10.0
    attempts: int = 3
    retry_mode: Literal["standard", "adaptive"] = "standard"
    multipart_bytes: int = 64 << 20
    part_bytes: int = 16 << 20
    frame_bytes_max: int = 1 << 30
    rebuild_threads: int = 4
    breaker_failures: int = 5
    breaker_cooldown_s: float = 1.0
    breaker_cooldown_max_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.bucket or "/" in self.bucket:
            raise ConfigError(f"s3: {self.bucket!r} is not the name of a bucket")
        if self.prefix.startswith("/") or "//" in self.prefix or len(self.prefix) > 512:
            raise ConfigError(f"s3: the prefix {self.prefix!r} must be short and have no empty folders")
        self._check_endpoint()
        if (self.access_key is None) != (self.secret_key is None):
            raise ConfigError("s3: access_key and secret_key belong together: set both or neither")
        if self.encryption not in ("none", "AES256", "aws:kms"):
            raise ConfigError(f"s3: encryption must be none, AES256 or aws:kms, not {self.encryption!r}")
        if self.kms_key_id is not None and self.encryption != "aws:kms":
            raise ConfigError("s3: kms_key_id needs encryption aws:kms")
        if self.retry_mode not in ("standard", "adaptive"):
            raise ConfigError(f"s3: retry_mode must be standard or adaptive, not {self.retry_mode!r}")
        self._check_numbers()

    def _check_endpoint(self) -> None:
        if self.endpoint_url is None:
            return
        try:
            url = urlsplit(self.endpoint_url)
            sound = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            sound = False
        if not sound or url.username is not None or url.query or url.fragment:
            raise ConfigError(
                f"s3: {self.endpoint_url!r} is not an endpoint: write http:// or https://, a host and perhaps a port"
            )

    def _check_numbers(self) -> None:
        for name in ("threads", "attempts", "rebuild_threads", "breaker_failures"):
            if not 1 <= getattr(self, name) <= 1024:
                raise ConfigError(f"s3: {name} must be 1 to 1024, not {getattr(self, name)}")
        for name in ("deadline_s", "connect_timeout_s", "read_timeout_s", "breaker_cooldown_s"):
            if not 0 < getattr(self, name) < 1e6:
                raise ConfigError(f"s3: {name} must be a positive number of seconds, not {getattr(self, name)}")
        if self.breaker_cooldown_max_s < self.breaker_cooldown_s:
            raise ConfigError("s3: breaker_cooldown_max_s must be at least breaker_cooldown_s")
        if self.part_bytes < PART_BYTES_MIN or self.frame_bytes_max > self.part_bytes * _PARTS_MAX:
            raise ConfigError(f"s3: part_bytes must be at least 5 MiB and {_PARTS_MAX} parts hold frame_bytes_max")
