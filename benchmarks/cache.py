"""KV caches for codec benchmarks: a Gaussian source, and text split by documents."""

import re
from pathlib import Path

import torch

from kvstore.calibration.model import Model
from kvstore.codecs import Planes
from kvstore.layout import Layout, Rope, attention_layout

_DOCUMENT_START = re.compile(r"^(?=PEP: \d|- Feature Name:|eip: \d|# |Question: )", re.MULTILINE)


def gaussian_cache(seed: int) -> tuple[Layout, Planes]:
    """A unit Gaussian chunk of four layers of Llama-3.1-8B geometry, in float32 so that nothing else rounds it."""
    rope = Rope(500_000.0, 128)
    layout = attention_layout("gaussian", "1", layers=4, kv_heads=8, head_dim=128, dtype="float32", rope=rope)
    generator = torch.Generator().manual_seed(seed)
    return layout, {name: torch.randn(spec.shape, generator=generator) for name, spec in layout.planes.items()}


def documents(text: str, tokens_min: int, model: Model) -> list[list[int]]:
    """Token ids of the documents of a text, short ones joined to the one before so that each begins a prompt."""
    parts = [part for part in _DOCUMENT_START.split(text) if part.strip()]
    found: list[list[int]] = []
    for part in parts:
        ids = model.tokenize(part)
        if found and len(found[-1]) < tokens_min:
            found[-1] += ids
        else:
            found.append(ids)
    if len(found) > 1 and len(found[-1]) < tokens_min:
        last = found.pop()
        found[-1] += last
    return found


def snr_db(exact: Planes, found: Planes) -> float:
    """Signal to noise over all planes, decibels."""
    signal = sum(float(x.double().square().sum()) for x in exact.values())
    noise = sum(float((x.double() - found[name].double()).square().sum()) for name, x in exact.items())
    return float(10 * torch.tensor(signal / noise).log10()) if noise else float("inf")


def load_text(path: Path) -> str:
    """A text file."""
    return path.read_text("utf-8")
