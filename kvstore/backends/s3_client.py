"""The client of boto3 that settings ask for; boto3 is imported only here."""

from typing import Any

import boto3
from botocore.config import Config

from kvstore.backends.s3_settings import S3Settings


def make_client(settings: S3Settings) -> Any:
    """A client of boto3 for S3."""
    session = boto3.session.Session(
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key,
        aws_session_token=settings.session_token,
        region_name=settings.region,
    )
    path_style = settings.endpoint_url is not None if settings.path_style is None else settings.path_style
    config = Config(
        connect_timeout=min(settings.connect_timeout_s, settings.deadline_s),
        read_timeout=min(settings.read_timeout_s, settings.deadline_s),
        max_pool_connections=settings.threads + settings.rebuild_threads,
        retries={"total_max_attempts": settings.attempts, "mode": settings.retry_mode},
        s3={"addressing_style": "path" if path_style else "auto"},
        # Frames carry checksums of their own, and many servers get these ones wrong for a part of an object. What is
        # sent is still guarded: the signature covers its SHA-256.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = None if session.region_name or settings.endpoint_url is None else "us-east-1"
    verify = None if settings.ca_bundle is None else str(settings.ca_bundle)
    return session.client("s3", endpoint_url=settings.endpoint_url, region_name=region, verify=verify, config=config)


def encryption(settings: S3Settings) -> dict[str, str]:
    """What requests that write an object say of its encryption."""
    if settings.encryption == "none":
        return {}
    key = {} if settings.kms_key_id is None else {"SSEKMSKeyId": settings.kms_key_id}
    return {"ServerSideEncryption": settings.encryption} | key


def advice(settings: S3Settings, status: int) -> str | None:
    """What to do about the answer to a question for the bucket; None where waiting may help."""
    server = settings.endpoint_url or "Amazon S3"
    where = f"the bucket {settings.bucket!r} at {server}"
    return {
        301: f"{where} lies in another region: set region",
        400: f"{where} could not be asked: check region and credentials",
        401: f"{where} wants credentials: check access_key and secret_key",
        403: f"{where} refuses these credentials: check access_key, secret_key, this machine's clock, and that they "
        "may list the bucket and get, put and delete objects",
        404: f"there is no bucket {settings.bucket!r} at {server}: create it or set bucket",
    }.get(status)
