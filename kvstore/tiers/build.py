"""The stack of tiers that a configuration describes."""

from kvstore.backend import Ack, Backend
from kvstore.backends.host import HostBackend
from kvstore.backends.lmdb import LmdbBackend
from kvstore.config import ServerConfig
from kvstore.metrics import Metrics
from kvstore.tiers.stack import TieredBackend
from kvstore.tiers.write_behind import WriteBehind


async def open_tiers(config: ServerConfig, metrics: Metrics) -> TieredBackend:
    """Open host memory and, unless its budget is 0, the disk tier behind it.

    Raises:
        ConfigError: The data directory cannot be used.
    """
    tiers: list[Backend] = [HostBackend(config.memory_bytes, metrics=metrics)]
    if config.disk_bytes:
        disk = await LmdbBackend.open(config.data_dir / "lmdb", config.disk_bytes, metrics=metrics)
        tiers.append(
            WriteBehind(
                disk,
                inner_ack=Ack.DISK,
                queue_bytes_max=min(config.write_behind_bytes, config.disk_bytes),
                metrics=metrics,
            )
        )
    return TieredBackend(tiers, metrics=metrics)
