"""What the tiers of a server share, with the placement that its configuration asks for."""

from random import Random

from kvstore.backends.policies import Fetched, Policies, StaticPlacement
from kvstore.config import ServerConfig
from kvstore.controller.placement import LearnedPlacement
from kvstore.metrics import Metrics

_LEVEL_MAX = 15


def policies_of(config: ServerConfig, metrics: Metrics) -> Policies:
    """The policies of a server's tiers."""
    static = StaticPlacement(config.shrink_level)
    if config.placement == "static":
        return Policies(placement=static)
    tiers = [name for name, there in _tiers(config).items() if there]

    def count(tier: str, level: int) -> None:
        metrics.placements.labels(tier, str(min(level, _LEVEL_MAX))).inc()

    # Not a secret; other servers are to try other things.
    placement = LearnedPlacement(tiers, Random(), fallback=static, decided=count)  # noqa: S311

    def learn(fetched: Fetched) -> None:
        placement.fetched(fetched)
        for chunk in fetched.chunks:
            # Levels of frames are whatever a client writes; those of profiles are few.
            if placement.knows(chunk.profile):
                metrics.fetched_levels.labels(chunk.tier or "none", str(min(chunk.level, _LEVEL_MAX))).inc()

    return Policies(placement=placement, learners=[learn])


def _tiers(config: ServerConfig) -> dict[str, bool]:
    """Which tiers there are, the fastest first."""
    return {
        "gpu": config.gpu_bytes > 0,
        "host": True,
        "lmdb": config.disk_bytes > 0,
        "s3": config.s3_bucket is not None,
    }
