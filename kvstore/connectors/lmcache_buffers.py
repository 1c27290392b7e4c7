"""What LMCache says of its buffers, in terms of this package. Nothing here imports LMCache."""

import logging
from importlib.metadata import version
from typing import Any

import torch

SUPPORTED = ("0.5.6",)
"""Versions of LMCache that the tests run."""

log = logging.getLogger(__name__)


def check_version() -> None:
    """Warn where LMCache is a version that the tests do not run."""
    found = version("lmcache")
    if found not in SUPPORTED:
        log.warning("LMCache %s was not tested with this connector; tested: %s", found, ", ".join(SUPPORTED))


def parts_of(described: Any) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Shapes and dtypes from a `MemoryLayoutDesc` or a `MemoryObjMetadata`."""
    shapes, dtypes = described.shapes, described.dtypes
    if not shapes:
        shapes, dtypes = [described.shape], [described.dtype]
    return tuple((tuple(dims), name_of(dtype)) for dims, dtype in zip(shapes, dtypes, strict=True))


def name_of(dtype: torch.dtype) -> str:
    """Name of a dtype as layouts have it."""
    return str(dtype).removeprefix("torch.")


def bytes_of(buffer: Any) -> memoryview:
    """The bytes of a `MemoryObj`; writes go to it."""
    return memoryview(buffer.byte_array).cast("B")
