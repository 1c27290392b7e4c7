"""The stack of tiers that a configuration describes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from types import ModuleType

from kvstore.backend import Ack, Backend
from kvstore.backends.host import HostBackend
from kvstore.backends.lmdb import LmdbBackend
from kvstore.backends.policies import Policies, StaticPlacement
from kvstore.config import ServerConfig
from kvstore.errors import ConfigError
from kvstore.metrics import Metrics
from kvstore.tiers.stack import TieredBackend
from kvstore.tiers.write_behind import WriteBehind

_S3_BATCH_BYTES = 8 << 20
"""Of a slow tier little is written at one time, so that a delete does not wait for much."""


async def open_tiers(config: ServerConfig, metrics: Metrics, policies: Policies | None = None) -> TieredBackend:
    """Open GPU memory, host memory, the disk and S3, as far as each is configured.

    Args:
        config: What is configured.
        metrics: Where the tiers count.
        policies: What they share; by default with `shrink_level` for every tier.

    Raises:
        ConfigError: A tier cannot be used as it is configured; what was opened is closed again.
    """
    policies = policies or Policies(placement=StaticPlacement(config.shrink_level))
    async with _all_or_none() as tiers:
        if config.gpu_bytes:
            tiers.append(await _open_gpu(config, metrics, policies))
        tiers.append(HostBackend(config.memory_bytes, metrics=metrics, policies=policies))
        if config.disk_bytes:
            disk = await LmdbBackend.open(
                config.data_dir / "lmdb", config.disk_bytes, metrics=metrics, policies=policies
            )
            tiers.append(disk)
            if config.disk_write == "behind":
                tiers[-1] = WriteBehind(
                    disk,
                    inner_ack=Ack.DISK,
                    queue_bytes_max=min(config.write_behind_bytes, config.disk_bytes),
                    flush_timeout_s=config.flush_timeout_s,
                    metrics=metrics,
                )
        if config.s3_bucket is not None:
            tiers.append(await open_s3(config, metrics))
            if config.s3_write == "behind":
                tiers[-1] = WriteBehind(
                    tiers[-1],
                    inner_ack=Ack.REMOTE,
                    # Without a disk nothing else outlives the process.
                    waits_for=Ack.REMOTE if config.disk_bytes else Ack.DISK,
                    queue_bytes_max=config.write_behind_bytes,
                    batch_bytes=_S3_BATCH_BYTES,
                    flush_timeout_s=config.flush_timeout_s,
                    metrics=metrics,
                )
    return TieredBackend(
        tiers,
        promoted=("gpu",),
        policies=policies,
        pins_bytes_max=(config.disk_bytes or config.memory_bytes) // 2,
        metrics=metrics,
    )


@asynccontextmanager
async def _all_or_none() -> AsyncIterator[list[Backend]]:
    """A list of tiers that are closed again if one of them cannot be opened."""
    tiers: list[Backend] = []
    try:
        yield tiers
    except BaseException:
        await asyncio.gather(*(tier.aclose() for tier in tiers), return_exceptions=True)
        raise


async def _open_gpu(config: ServerConfig, metrics: Metrics, policies: Policies) -> Backend:
    gpu = _optional("gpu", "codecs")
    tier: Backend = await gpu.GpuBackend.open(
        config.gpu_bytes, device=config.gpu_device, metrics=metrics, policies=policies
    )
    return tier


async def open_s3(config: ServerConfig, metrics: Metrics) -> Backend:
    """Open the S3 tier that a configuration describes.

    Raises:
        ConfigError: It cannot be used as it is configured.
    """
    s3 = _optional("s3", "s3")
    settings = s3.S3Settings(
        bucket=config.s3_bucket,
        prefix=config.s3_prefix,
        endpoint_url=config.s3_endpoint,
        region=config.s3_region,
        access_key=config.s3_access_key,
        secret_key=config.s3_secret_key,
        path_style=config.s3_path_style,
        ca_bundle=config.s3_ca_bundle,
        encryption=config.s3_encryption,
        kms_key_id=config.s3_kms_key,
        threads=config.s3_threads,
        deadline_s=config.s3_timeout_s,
    )
    tier: Backend = await s3.S3Backend.open(settings, metrics=metrics)
    return tier


def _optional(name: str, extra: str) -> ModuleType:
    """The module of a tier that needs more than a storage node has; never imported unless it is configured."""
    try:
        return import_module(f"kvstore.backends.{name}")
    except ImportError as exc:
        raise ConfigError(f"the {name} tier needs more: pip install 'kvstore[{extra}]' ({exc})") from exc
