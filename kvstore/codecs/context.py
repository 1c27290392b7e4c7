"""Context planes: what the stages of a chunk know beside its planes, on both sides, without a byte of the frame."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvstore.codecs.ref.predict import HISTORY
from kvstore.codecs.ref.rope import is_known, rotary_planes
from kvstore.codecs.stage import Planes, Specs
from kvstore.errors import PipelineError
from kvstore.layout import Layout, PlaneSpec


@dataclass(frozen=True, slots=True)
class Context:
    """What encoding a chunk may use beside its planes.

    Args:
        first_position: Position of the chunk's first token in its prompt.
        group_layers: Layers in a layer group; 0 lets the pipeline choose, or the size of a layer.
        importance: Attention that every token will receive, `[layers, tokens]` float32, as `token_importance`
            estimates it over a whole prefix; None lets the stage `importance` estimate it within the chunk.
        last: Whether this is the last chunk of the prefix that is being put.
        token_ids: Token ids of the prompt up to the chunk's last token; only the chunk's own and the few before them
            are looked at. The stage `predict` needs them.
    """

    first_position: int = 0
    group_layers: int = 0
    importance: torch.Tensor | None = None
    last: bool = False
    token_ids: Sequence[int] = ()


def known_specs(layout: Layout, layers: int) -> Specs:
    """Specs of the planes of a group of layers, and of the context that goes with them."""
    tokens = layout.chunk_tokens
    known = {
        ".position": PlaneSpec("int64", (tokens,)),
        ".layer": PlaneSpec("int64", (layers,)),
        ".token": PlaneSpec("int64", (HISTORY + tokens,)),
    }
    if layout.rope is not None and is_known(layout.rope):
        rotary = layout.rope.rotary_dim
        known |= {name: PlaneSpec("float32", (tokens, rotary)) for name in (".cos", ".sin")}
        known[".partner"] = PlaneSpec("int64", (rotary,))
    return layout.group_specs(layers) | known


def known_planes(layout: Layout, first_position: int, token_ids: Sequence[int] = ()) -> Mapping[str, torch.Tensor]:
    """Context of a whole chunk; `.layer` holds the number of every layer.

    Args:
        layout: What is encoded or decoded.
        first_position: Position of the chunk's first token.
        token_ids: Token ids up to the chunk's last one, or none, and then there is no `.token`.

    Raises:
        PipelineError: There are too few token ids.
    """
    positions = torch.arange(first_position, first_position + layout.chunk_tokens)
    known = {".position": positions, ".layer": torch.arange(layout.layers)}
    if token_ids:
        known[".token"] = _recent_tokens(token_ids, layout.chunk_tokens, first_position)
    if layout.rope is not None and is_known(layout.rope):
        known[".cos"], known[".sin"], known[".partner"] = rotary_planes(layout.rope, positions)
    return known


def _recent_tokens(token_ids: Sequence[int], tokens: int, first_position: int) -> torch.Tensor:
    """`[HISTORY + tokens]` int64; -1 before the prompt's first token."""
    wanted = tokens + min(HISTORY, first_position)
    recent = list(token_ids[-wanted:])
    if len(recent) < wanted or min(recent) < 0:
        raise PipelineError(f"the context of a chunk needs {wanted} token ids, it has {len(recent)}")
    return torch.tensor([-1] * (HISTORY + tokens - wanted) + recent)


def written_planes(context: Context) -> Planes:
    """Context that only the writer has."""
    planes = {".last": torch.tensor(context.last)}
    if context.importance is not None:
        planes[".importance"] = context.importance
    return planes


def of_group(context: Planes, start: int, layers: int) -> Planes:
    """The context of a group of layers."""
    by_layer = (".layer", ".importance")
    return {name: x[start : start + layers] if name in by_layer else x for name, x in context.items()}
