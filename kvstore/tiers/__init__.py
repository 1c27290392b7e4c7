"""Tiers: several backends as one, with promotion on hits and writes behind the answer."""

from kvstore.tiers.build import open_tiers
from kvstore.tiers.stack import TieredBackend
from kvstore.tiers.write_behind import WriteBehind

__all__ = ["TieredBackend", "WriteBehind", "open_tiers"]
