"""Codecs: stages that transform planes, pipelines of stages, and frames encoded by them.

A new codec is one file here: a frozen dataclass that is a `Stage`, listed in `registry.STAGES`. The arithmetic of a
stage lives in `ref/`, where a kernel with the same name and signature can be held against it.
"""

from kvstore.codecs.coding import Decoding, by_group, decode, encode, encode_levels
from kvstore.codecs.context import Context
from kvstore.codecs.named import CALIBRATED, NAMED, named_pipeline
from kvstore.codecs.pipeline import Pipeline, build_pipeline
from kvstore.codecs.stage import Planes, Specs, Stage

__all__ = [
    "CALIBRATED",
    "NAMED",
    "Context",
    "Decoding",
    "Pipeline",
    "Planes",
    "Specs",
    "Stage",
    "build_pipeline",
    "by_group",
    "decode",
    "encode",
    "encode_levels",
    "named_pipeline",
]
