"""Rotary position embedding, undone and applied again."""

import math

import torch

from kvstore.errors import PipelineError
from kvstore.layout import Rope


def inverse_frequencies(rope: Rope) -> tuple[torch.Tensor, float]:
    """Rotation speeds, `[rotary_dim / 2]` float64 in radians a token, and the factor on sine and cosine.

    The kinds are those of Hugging Face configurations: `default`, `linear`, `llama3`, `yarn`.

    Raises:
        PipelineError: The kind is another one, or one of its parameters is missing or out of range.
    """
    if rope.rotary_dim < 2 or rope.rotary_dim % 2:
        raise PipelineError(f"a rotary embedding turns pairs, so rotary_dim cannot be {rope.rotary_dim}")
    try:
        speeds, factor = _speeds(rope)
    except KeyError as exc:
        raise PipelineError(f"rotary embedding of kind {rope.kind!r} needs the parameter {exc}") from exc
    except (ValueError, ArithmeticError) as exc:
        raise PipelineError(f"rotary embedding of kind {rope.kind!r} has parameters that cannot be: {exc}") from exc
    if not torch.isfinite(speeds).all():
        raise PipelineError(f"rotary embedding of kind {rope.kind!r} has parameters that cannot be")
    return speeds, factor


def is_known(rope: Rope | None) -> bool:
    """Whether this build can turn such an embedding back."""
    try:
        return rope is not None and bool(inverse_frequencies(rope))
    except PipelineError:
        return False


def _speeds(rope: Rope) -> tuple[torch.Tensor, float]:
    speeds = float(rope.theta) ** -(torch.arange(0, rope.rotary_dim, 2, dtype=torch.float64) / rope.rotary_dim)
    scaling = dict(rope.scaling)
    if rope.kind == "default":
        return speeds, 1.0
    if rope.kind == "linear":
        return speeds / scaling["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(speeds, scaling), 1.0
    if rope.kind == "yarn":
        return _yarn(speeds, rope, scaling)
    raise PipelineError(f"rotary embedding of kind {rope.kind!r} is not known; known: default, linear, llama3, yarn")


def _llama3(speeds: torch.Tensor, scaling: dict[str, float]) -> torch.Tensor:
    """Slow rotations are slowed down by `factor`, fast ones stay, those between are blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * speeds / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return speeds * kept + speeds / scaling["factor"] * (1 - kept)


def _yarn(speeds: torch.Tensor, rope: Rope, scaling: dict[str, float]) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolation of slow rotations, and a temperature on the attention."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return rope.rotary_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dimension(scaling.get("beta_fast", 32.0)), dimension(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", 1.0):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.rotary_dim - 1)
    ramp = (torch.arange(rope.rotary_dim // 2, dtype=torch.float64) - first) / max(last - first, 1e-3)
    kept = 1 - ramp.clamp(0, 1)
    return speeds * kept + speeds / factor * (1 - kept), _yarn_magnitude(factor, scaling)


def _yarn_magnitude(factor: float, scaling: dict[str, float]) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1.0)


def rotary_planes(rope: Rope, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `rotate` needs.

    Args:
        rope: The embedding.
        positions: `[tokens]` integers.

    Returns:
        Cosines and signed sines, `[tokens, rotary_dim]` float32, and for every dimension the other one of its pair,
        `[rotary_dim]` int64.
    """
    speeds, factor = inverse_frequencies(rope)
    angle = positions.double()[:, None] * speeds
    cos, sin = angle.cos() * factor, angle.sin() * factor
    half = rope.rotary_dim // 2
    if rope.interleaved:
        partner = torch.arange(rope.rotary_dim).view(-1, 2).flip(1).flatten()
        return (
            cos.repeat_interleave(2, 1).float(),
            torch.stack([-sin, sin], 2).flatten(1).float(),
            partner,
        )
    partner = torch.arange(rope.rotary_dim).roll(half)
    return torch.cat([cos, cos], 1).float(), torch.cat([-sin, sin], 1).float(), partner


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """Apply the embedding: `[layers, tokens, heads, dim]` float32; dimensions beyond `rotary_dim` pass."""
    rotary = cos.shape[1]
    turned = x[..., :rotary]
    turned = turned * cos[:, None] + turned.index_select(-1, partner) * sin[:, None]
    return turned if rotary == x.shape[-1] else torch.cat([turned, x[..., rotary:]], -1)


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, partner: torch.Tensor) -> torch.Tensor:
    """Undo `rotate`. A rotation with a factor on it is a multiple of an orthonormal one."""
    squared = cos.square() + sin.square()
    return rotate(x, cos / squared, -sin / squared, partner)
