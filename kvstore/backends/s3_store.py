"""The bucket behind `S3Backend`: plain blocking calls of boto3 for its threads.

One object a frame, `{prefix}{namespace}/{digest}` in hexadecimal, its body the frame's bytes and nothing else that is
needed, so any tool can copy a bucket. Damaged objects move to `{prefix}quarantine/...`.
"""

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    SSLError,
)
from urllib3.exceptions import HTTPError

from kvstore.backends.s3_body import Found, ReadFrame, WriteBody, slice_views
from kvstore.backends.s3_calls import AbsentError, ChangedError, DamagedError, Deadline, DeadlineError, ForeignError
from kvstore.backends.s3_client import advice, encryption, make_client
from kvstore.backends.s3_settings import S3Settings
from kvstore.errors import (
    BackendError,
    BackendFullError,
    BackendUnavailableError,
    ConfigError,
    FrameCorruptError,
    FrameError,
    FrameVersionError,
)
from kvstore.keys import NAMESPACE_BYTES, ChunkKey
from kvstore.metrics import Metrics
from kvstore.wire import FRAME_TYPE

_NAME = re.compile("([0-9a-f]{32})/([0-9a-f]{64})")
_QUARANTINE = "quarantine/"
_READ_TRIES = 3
_ABSENT = {"NoSuchKey", "404", "NotFound"}
_CHANGED = {"PreconditionFailed", "ConditionalRequestConflict", "412"}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage"}
# What S3 answers while credentials, clock, region, bucket or network are wrong: no single request is at fault.
_OUT_OF_ORDER_STATUS = {301, 401, 403, 408, 429}
_OUT_OF_ORDER = {"NoSuchBucket", "RequestTimeout", "SlowDown", "ExpiredToken", "InvalidToken"}
_OUT_OF_ORDER |= {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}


class Listed(NamedTuple):
    """A page of a listing: keys of what look like frames, how many other objects there were, and where to go on."""

    keys: list[ChunkKey]
    foreign: int
    token: str | None


class S3Store:
    """One bucket, or the part of it under a prefix.

    Args:
        settings: Where it is and how to talk to it.
        tier: Name of the tier, for errors.
        metrics: Where to count requests.

    Raises:
        ConfigError: The settings make no client.
    """

    def __init__(self, settings: S3Settings, tier: str, metrics: Metrics) -> None:
        self._settings = settings
        self._tier = tier
        self._metrics = metrics
        self._encryption = encryption(settings)
        self._calling = threading.local()
        self._conditional = True
        if settings.ca_bundle is not None and not settings.ca_bundle.is_file():
            raise ConfigError(f"s3: there is no CA bundle {settings.ca_bundle}")
        try:
            self._client = make_client(settings)
        except (BotoCoreError, ValueError, OSError) as exc:
            raise ConfigError(f"s3: no client can be made of these settings: {exc}") from exc
        # botocore's retries know nothing of deadlines.
        self._client.meta.events.register("before-send.s3", self._check_deadline)

    def find_bucket(self, deadline: Deadline) -> None:
        """See that the bucket answers.

        Raises:
            ConfigError: It is not there or not ours.
            BackendUnavailableError: It cannot be asked now.
        """
        with self._request("bucket", deadline):
            try:
                self._client.head_bucket(Bucket=self._settings.bucket)
            except (NoCredentialsError, PartialCredentialsError) as exc:
                raise ConfigError(f"s3: {exc}: set access_key and secret_key, or what boto3 reads") from exc
            except ParamValidationError as exc:
                raise ConfigError(f"s3: {exc}") from exc
            except SSLError as exc:
                if "CERTIFICATE_VERIFY_FAILED" not in str(exc):
                    raise
                raise ConfigError(f"s3: the endpoint's certificate is not trusted, set ca_bundle: {exc}") from exc
            except ClientError as exc:
                if (found := advice(self._settings, _status(exc))) is None:
                    raise
                raise ConfigError(f"s3: {found}") from exc

    def read(self, key: ChunkKey, guess_bytes: int, levels_max: int, deadline: Deadline) -> Found:
        """The frame under a key, verified, with its first `levels_max` levels (0: the head alone, unverified).

        Args:
            key: Which one.
            guess_bytes: How much to ask for at first.
            levels_max: Levels to read at most.
            deadline: When to give up.

        Raises:
            AbsentError: There is no such object.
            DamagedError: It is not that frame.
            ForeignError: It is larger than any frame here, or has a version that this build does not know.
            BackendError: It could not be read.
        """

        def open_range(start: int, end: int) -> Mapping[str, Any]:
            try:
                answer: Mapping[str, Any] = self._client.get_object(
                    Bucket=self._settings.bucket, Key=self.name_of(key), Range=f"bytes={start}-{end - 1}"
                )
            except ClientError as exc:
                if _status(exc) != 416:
                    raise
                raise FrameCorruptError(f"the object has no bytes from {start} on") from exc
            return answer

        with self._request("get" if levels_max else "head", deadline):
            for _ in range(_READ_TRIES):
                reading = ReadFrame(
                    self._tier, open_range, self._settings.attempts, self._settings.frame_bytes_max, deadline
                )
                try:
                    return reading.read(key, guess_bytes, levels_max)
                except ChangedError:
                    # It was replaced between two requests for it.
                    continue
                except FrameVersionError as exc:
                    raise ForeignError(str(exc)) from exc
                except ForeignError:
                    raise
                except FrameError as exc:
                    raise DamagedError(str(exc), reading.etag) from exc
                finally:
                    reading.close()
            raise BackendError(self._tier, "an object is replaced faster than it can be read")

    def write(self, key: ChunkKey, views: Sequence[memoryview], expected: str | None, deadline: Deadline) -> None:
        """Write an object in one request.

        Args:
            key: Which one.
            views: Its bytes.
            expected: The ETag that it must still have, `*` where there must be none, None for no condition.
            deadline: When to give up.

        Raises:
            ChangedError: The condition does not hold.
            BackendError: It was not written.
        """
        with self._request("put", deadline):
            self._conditionally(
                self._client.put_object,
                expected,
                Bucket=self._settings.bucket,
                Key=self.name_of(key),
                Body=WriteBody(views, deadline),
                ContentType=FRAME_TYPE,
                **self._encryption,
            )

    def begin_parts(self, key: ChunkKey, deadline: Deadline) -> str:
        """Begin a multipart upload, and its id."""
        with self._request("begin", deadline):
            answer = self._client.create_multipart_upload(
                Bucket=self._settings.bucket, Key=self.name_of(key), ContentType=FRAME_TYPE, **self._encryption
            )
            return str(answer["UploadId"])

    def write_part(
        self, key: ChunkKey, upload_id: str, number: int, views: Sequence[memoryview], deadline: Deadline
    ) -> str:
        """Write one part, counted from 1, of an object of these bytes, and its ETag."""
        part_bytes = self._settings.part_bytes
        part = slice_views(views, (number - 1) * part_bytes, part_bytes)
        with self._request("part", deadline):
            answer = self._client.upload_part(
                Bucket=self._settings.bucket,
                Key=self.name_of(key),
                UploadId=upload_id,
                PartNumber=number,
                Body=WriteBody(part, deadline),
            )
            return str(answer["ETag"])

    def end_parts(
        self, key: ChunkKey, upload_id: str, etags: Sequence[str], expected: str | None, deadline: Deadline
    ) -> None:
        """Make one object of the parts; see `write`."""
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, start=1)]
        with self._request("complete", deadline):
            self._conditionally(
                self._client.complete_multipart_upload,
                expected,
                Bucket=self._settings.bucket,
                Key=self.name_of(key),
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )

    def abort_parts(self, key: ChunkKey, upload_id: str, deadline: Deadline) -> None:
        """Give up a multipart upload."""
        with self._request("abort", deadline):
            self._client.abort_multipart_upload(Bucket=self._settings.bucket, Key=self.name_of(key), UploadId=upload_id)

    def delete(self, keys: Sequence[ChunkKey], deadline: Deadline) -> list[ChunkKey]:
        """Delete at most 1,000 objects, and those that were not deleted; absent ones are."""
        bucket = self._settings.bucket
        with self._request("delete", deadline):
            if len(keys) == 1:
                try:
                    self._client.delete_object(Bucket=bucket, Key=self.name_of(keys[0]))
                except ClientError as exc:
                    if _code(exc) not in _ABSENT:
                        raise
                return []
            names = {self.name_of(key): key for key in keys}
            wanted = {"Objects": [{"Key": name} for name in names], "Quiet": True}
            answer = self._client.delete_objects(Bucket=bucket, Delete=wanted)
            errors = answer.get("Errors", [])
            return [names[error["Key"]] for error in errors if error.get("Code") not in _ABSENT]

    def quarantine(self, key: ChunkKey, etag: str, deadline: Deadline) -> bool:
        """Move a damaged object out of the way, unless it is another one by now; False where it is or has gone."""
        name = self.name_of(key)
        bucket = self._settings.bucket
        with self._request("quarantine", deadline):
            try:
                # An object without bytes tells no ETag when a range of it is asked for.
                if self._client.head_object(Bucket=bucket, Key=name)["ETag"] != etag and etag:
                    return False
                self._client.copy_object(
                    Bucket=bucket,
                    Key=self._settings.prefix + _QUARANTINE + _local(key),
                    CopySource={"Bucket": bucket, "Key": name},
                    **self._encryption,
                )
                self._client.delete_object(Bucket=bucket, Key=name)
            except ClientError as exc:
                if _code(exc) not in _ABSENT:
                    raise
                return False
        return True

    def list_page(self, token: str | None, deadline: Deadline) -> Listed:
        """Up to 1,000 objects under the prefix, from a token of the page before on."""
        settings = self._settings
        more = {} if token is None else {"ContinuationToken": token}
        with self._request("list", deadline):
            answer = self._client.list_objects_v2(Bucket=settings.bucket, Prefix=settings.prefix, **more)
        names = [str(listed["Key"]).removeprefix(settings.prefix) for listed in answer.get("Contents", [])]
        matches = [_NAME.fullmatch(name) for name in names if not name.startswith(_QUARANTINE)]
        keys = [ChunkKey(bytes.fromhex(match[1] + match[2])) for match in matches if match]
        following = answer.get("NextContinuationToken") if answer.get("IsTruncated") else None
        if following == token is not None:
            raise BackendError(self._tier, "S3 lists the same page for ever")
        return Listed(keys, len(matches) - len(keys), following)

    def name_of(self, key: ChunkKey) -> str:
        """Name of a chunk's object."""
        return self._settings.prefix + _local(key)

    def close(self) -> None:
        """Close every connection."""
        self._client.close()

    def _conditionally(self, call: Any, expected: str | None, **request: Any) -> None:
        """Make a call under a condition, or without it where the server says that it does not know conditions."""
        condition = {} if expected is None else {"IfNoneMatch": "*"} if expected == "*" else {"IfMatch": expected}
        try:
            call(**request, **(condition if self._conditional else {}))
        except ClientError as exc:
            if condition and _code(exc) in _ABSENT:
                raise ChangedError(_code(exc)) from exc
            if not condition or not self._conditional or _code(exc) != "NotImplemented":
                raise
            self._conditional = False
            if "Body" in request:
                request["Body"].seek(0)
            call(**request)

    @contextmanager
    def _request(self, operation: str, deadline: Deadline) -> Iterator[None]:
        """Count a call, end it at its deadline, and let every error come out as ours."""
        self._calling.deadline = deadline
        outcome = "ok"
        try:
            deadline.check()
            yield
        except (BotoCoreError, ClientError, HTTPError, OSError) as exc:
            error = self._translated(exc)
            outcome = _OUTCOMES.get(type(error), "failed")
            raise error from exc
        except Exception as exc:
            outcome = _OUTCOMES.get(type(exc), "failed")
            raise
        finally:
            self._calling.deadline = None
            self._metrics.s3_requests.labels(operation, outcome).inc()

    def _translated(self, exc: Exception) -> Exception:
        if not isinstance(exc, ClientError):
            return BackendUnavailableError(self._tier, _one_line(exc))
        code, status = _code(exc), _status(exc)
        if code in _ABSENT:
            return AbsentError(code)
        if code in _CHANGED:
            return ChangedError(code)
        if code in _FULL:
            return BackendFullError(self._tier, _one_line(exc))
        if status >= 500 or status in _OUT_OF_ORDER_STATUS or code in _OUT_OF_ORDER:
            return BackendUnavailableError(self._tier, _one_line(exc))
        return BackendError(self._tier, _one_line(exc))

    def _check_deadline(self, **_: Any) -> None:
        if (deadline := getattr(self._calling, "deadline", None)) is not None:
            deadline.check()


_OUTCOMES: dict[type[Exception], str] = {
    AbsentError: "absent",
    ChangedError: "changed",
    DamagedError: "damaged",
    ForeignError: "foreign",
    DeadlineError: "deadline",
    BackendUnavailableError: "unavailable",
    BackendFullError: "full",
}


def _code(exc: ClientError) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))


def _status(exc: ClientError) -> int:
    return int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _local(key: ChunkKey) -> str:
    return f"{key[:NAMESPACE_BYTES].hex()}/{key[NAMESPACE_BYTES:].hex()}"


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split())[:500] or type(exc).__name__
