"""A KV cache of Llama-3.1-8B's geometry, made of a small model's caches of real text, no part of which is used twice.

Layer `l` of the large cache comes from layer `l mod n` of the small model, and each of its heads, and each turn of the
layers, from another stretch of the text. A head of 128 dimensions is as many heads of the same small layer as fit into
it, their rotary pairs taking turns: the rotary embedding of K is undone, the pairs are dealt out, and the embedding of
the large head is applied. So nothing in it is a copy of anything else, whatever a codec looks at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.cache import documents, load_text
from kvstore.calibration.model import Model
from kvstore.codecs import Planes
from kvstore.codecs.ref.rope import rotary_planes, rotate, unrotate
from kvstore.layout import Layout, Rope, attention_layout
from kvstore.profiler.prompts import Prompt, bfloat16_layout, take_prompt

LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128
_DOCUMENT_TOKENS_MIN = 256


@dataclass(frozen=True, eq=False)
class LargeCache:
    """A cache of the large geometry, and what it was made of.

    Args:
        layout: Its layout.
        planes: K and V, `[32, tokens, 8, 128]` bfloat16.
        token_ids: A prompt to key it by.
        source_layout: Layout of the small model.
        sources: The small caches.
    """

    layout: Layout
    planes: dict[str, torch.Tensor]
    token_ids: list[int]
    source_layout: Layout
    sources: Sequence[Prompt]

    @property
    def raw_bytes(self) -> int:
        """Bytes of the exact cache."""
        return sum(x.numel() * x.element_size() for x in self.planes.values())


def large_cache(folder: Path, text: Path, tokens: int, chunk_tokens: int) -> LargeCache:
    """The cache of a prompt of `tokens` tokens.

    Args:
        folder: The small model.
        text: What it reads; stretches are spread evenly over all of it.
        tokens: A multiple of the chunk.
        chunk_tokens: Tokens of a chunk.
    """
    model = Model(folder, dtype="float32")
    small = bfloat16_layout(model, chunk_tokens)
    layers, _, heads, dim = small.planes["k"].shape
    joined = HEAD_DIM // dim
    assert small.rope is not None, "the pairs of K are dealt out"
    assert HEAD_DIM % dim == heads % joined == 0, "heads fit into one another"
    stream = [token for ids in documents(load_text(text), _DOCUMENT_TOKENS_MIN, model) for token in ids]
    # So many heads of the large cache does a layer of one stretch make.
    each = heads // joined
    count = -(-LAYERS // layers) * (KV_HEADS // each)
    starts = [number * (len(stream) - tokens - 1) // (count - 1) for number in range(count)]
    sources = [take_prompt(model, stream[start : start + tokens + 1], tokens) for start in starts]
    rope = replace(small.rope, rotary_dim=HEAD_DIM)
    name = f"{small.model}-as-8b"
    layout = attention_layout(
        name, small.revision, layers=LAYERS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, chunk_tokens=chunk_tokens, rope=rope
    )
    planes = {name: torch.empty(LAYERS, tokens, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16) for name in ("k", "v")}
    for layer in range(LAYERS):
        for first in range(0, KV_HEADS, each):
            source = sources[(layer // layers) * (KV_HEADS // each) + first // each]
            made = _heads(source.planes, layer % layers, small.rope, rope)
            for plane in planes:
                planes[plane][layer, :, first : first + each] = made[plane]
    return LargeCache(layout, planes, sources[0].token_ids[:tokens], small, sources)


def _heads(planes: Planes, layer: int, small: Rope, large: Rope) -> dict[str, torch.Tensor]:
    """A layer of a small cache as heads of the large one, `[tokens, heads, 128]`."""
    keys, values = (planes[name][layer : layer + 1].float() for name in ("k", "v"))
    _, tokens, heads, dim = keys.shape
    joined = HEAD_DIM // dim
    positions = torch.arange(tokens)
    bare = unrotate(keys, *rotary_planes(small, positions))[0]
    # A pair is the same place in both halves of a head; pairs of equal speed come to lie side by side.
    pairs = bare.view(tokens, heads // joined, joined, 2, dim // 2).permute(0, 1, 3, 4, 2)
    turned = rotate(pairs.reshape(1, tokens, heads // joined, HEAD_DIM), *rotary_planes(large, positions))[0]
    return {"k": turned.bfloat16(), "v": values[0].reshape(tokens, heads // joined, HEAD_DIM).bfloat16()}
