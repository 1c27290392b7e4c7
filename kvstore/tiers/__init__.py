"""Tiers: several backends as one, with promotion on hits and writes behind the answer."""

from kvstore.tiers.build import open_s3, open_tiers
from kvstore.tiers.scrub import Scrubber, running_scrubber
from kvstore.tiers.stack import TieredBackend
from kvstore.tiers.write_behind import WriteBehind

__all__ = ["Scrubber", "TieredBackend", "WriteBehind", "open_s3", "open_tiers", "running_scrubber"]
