"""Text for profiling: cut into stretches, and dealt out so that what chooses has not seen what calibrated."""

from collections.abc import Sequence
from pathlib import Path

from kvstore.calibration.model import Model
from kvstore.errors import ConfigError
from kvstore.files import read_text
from kvstore.profiler.prompts import CONTINUATION_TOKENS, text_windows

_BLOCKS = 16
"""Into how many blocks a text is cut; of four neighbours two calibrate, one is searched on and one measures."""


def stretches(texts: Sequence[Path], model: Model, tokens_min: int) -> list[list[int]]:
    """Token ids of stretches of whole paragraphs, each at least `tokens_min` long; none spans two files.

    Raises:
        ConfigError: A file cannot be read.
    """
    found: list[list[int]] = []
    for text in texts:
        held: list[str] = []
        size = 0
        for paragraph in read_text(text).split("\n\n"):
            held.append(paragraph)
            # A token has at least a byte of text, mostly several: few stretches are tokenised in vain.
            size += len(paragraph)
            if size >= tokens_min:
                ids = model.tokenize("\n\n".join(held))
                if len(ids) >= tokens_min:
                    found.append(ids)
                    held, size = [], 0
                else:
                    size = len(ids)
        if held and found:
            found[-1] = found[-1] + model.tokenize("\n\n".join(held))
    return found


def deal(found: Sequence[list[int]]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Stretches to calibrate, to search and to measure on: a half, a quarter and a quarter, in blocks of neighbours."""
    parts: tuple[list[list[int]], list[list[int]], list[list[int]]] = ([], [], [])
    for number, ids in enumerate(found):
        block = number * _BLOCKS // len(found)
        parts[(0, 1, 0, 2)[block % 4]].append(ids)
    return parts


def bucket_name(tokens: int) -> str:
    """What a bucket of plain text is called: its prefix's tokens."""
    return f"text-{tokens}"


def windows(
    parts: Sequence[list[int]], buckets: Sequence[int], count: int, seed: int
) -> dict[str, list[tuple[int, ...]]]:
    """Prompts with their continuations, `count` for each bucket.

    Raises:
        ConfigError: There is too little text.
    """
    tokens = sum(len(ids) for ids in parts)
    longest = max(buckets) + CONTINUATION_TOKENS
    if tokens < longest:
        raise ConfigError(
            f"{tokens} tokens of the text are for this purpose, the longest bucket takes {longest}: "
            "give more text, or shorter buckets"
        )
    return {bucket_name(bucket): [tuple(ids) for ids in text_windows(parts, count, bucket, seed)] for bucket in buckets}
