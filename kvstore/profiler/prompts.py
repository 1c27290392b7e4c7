"""Prompts of a model with their exact KV caches, and what becomes of them in frames."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from transformers import DynamicCache

from kvstore.calibration.model import Model, planes_of
from kvstore.codecs import Context, Pipeline, Planes, decode, encode, encode_levels
from kvstore.codecs.importance import token_importance
from kvstore.frame import Frame
from kvstore.keys import ChunkKey, chunk_keys
from kvstore.layout import Layout, PlaneSpec

CHUNK_TOKENS = 256
CONTINUATION_TOKENS = 128
"""Tokens behind a compressed prefix over which quality is measured."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt with the exact cache of its prefix.

    Args:
        token_ids: The prefix, and the continuation behind it.
        planes: K and V of the prefix, bfloat16.
        log_p: Log-probabilities over the continuation with the exact cache, `[continuation, vocabulary]`.
    """

    token_ids: list[int]
    planes: dict[str, torch.Tensor]
    log_p: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the prefix."""
        return self.planes["k"].shape[1]

    @property
    def raw_bytes(self) -> int:
        """Bytes of the exact cache."""
        return sum(x.numel() * x.element_size() for x in self.planes.values())


def bfloat16_layout(model: Model, chunk_tokens: int = CHUNK_TOKENS) -> Layout:
    """Layout of a model's cache as engines keep it, whatever the model is computed in."""
    exact = model.layout_of([0, 1], chunk_tokens)
    specs = {name: PlaneSpec("bfloat16", spec.shape) for name, spec in exact.planes.items()}
    return Layout(exact.model, exact.revision, specs, chunk_tokens, rope=exact.rope)


def text_windows(documents: Sequence[list[int]], count: int, prefix: int, seed: int) -> list[list[int]]:
    """Token ids of `count` prompts with their continuations; they begin in the documents in turns.

    A prompt that is longer than what is left of its document goes on in the next one.
    """
    generator = torch.Generator().manual_seed(seed)
    stream = [token for ids in documents for token in ids]
    starts = list(accumulate((len(ids) for ids in documents), initial=0))
    length = prefix + CONTINUATION_TOKENS
    windows = []
    for number in range(count):
        first = starts[number % len(documents)]
        room = max(1, len(documents[number % len(documents)]) - length)
        start = first + int(torch.randint(0, room, (1,), generator=generator))
        start = min(start, len(stream) - length)
        windows.append(stream[start : start + length])
    return windows


def kl_nats(exact: torch.Tensor, found: torch.Tensor) -> float:
    """KL(exact || found), nats, mean over tokens, of log-probabilities `[tokens, vocabulary]`."""
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@torch.inference_mode()
def take_prompt(model: Model, token_ids: Sequence[int], prefix: int) -> Prompt:
    """Prefill a prompt; its cache is rounded to bfloat16 before anything is compared with it."""
    cache = DynamicCache()
    model.forward(token_ids[:prefix], cache)
    planes = {name: x.bfloat16() for name, x in planes_of(cache).items()}
    log_p = model.log_probabilities({name: x.float() for name, x in planes.items()}, token_ids[prefix:])
    return Prompt(list(token_ids), planes, log_p)


def encode_prompt(prompt: Prompt, layout: Layout, pipeline: Pipeline) -> list[Frame]:
    """Frames of a prompt's chunks, encoded as `put_prefix` does."""
    return [
        encode(planes, layout, pipeline, key=key, context=context)
        for planes, key, context in _chunks(prompt, layout, pipeline)
    ]


def encode_prompt_levels(
    prompt: Prompt, layout: Layout, pipeline: Pipeline
) -> tuple[list[Frame], list[dict[str, torch.Tensor]]]:
    """The same, and by level the planes of all chunks as they will come out of the frames."""
    coded = [
        encode_levels(planes, layout, pipeline, key=key, context=context)
        for planes, key, context in _chunks(prompt, layout, pipeline)
    ]
    levels = zip(*(decoded for _, decoded in coded), strict=True)
    return [frame for frame, _ in coded], [_joined(parts) for parts in levels]


def _chunks(prompt: Prompt, layout: Layout, pipeline: Pipeline) -> Iterator[tuple[Planes, ChunkKey, Context]]:
    importance = None
    if pipeline.importance is not None:
        importance = token_importance(prompt.planes["k"], layout, pipeline.importance)
    for number, key in enumerate(chunk_keys(layout, prompt.token_ids[: prompt.tokens])):
        start, end = number * CHUNK_TOKENS, (number + 1) * CHUNK_TOKENS
        context = Context(
            first_position=start,
            importance=None if importance is None else importance[:, start:end],
            last=end == prompt.tokens,
            token_ids=prompt.token_ids[:end],
        )
        yield {name: x[:, start:end] for name, x in prompt.planes.items()}, key, context


def decode_chunks(
    frames: Sequence[Frame], layout: Layout, artefacts: Mapping[str, bytes], token_ids: Sequence[int]
) -> Iterator[Planes]:
    """Planes of the chunks of a prompt, one after the other."""
    for number, frame in enumerate(frames):
        known = token_ids[: (number + 1) * layout.chunk_tokens]
        yield decode(frame, layout, artefacts, key=frame.key, token_ids=known)


def decode_prompt(
    frames: Sequence[Frame], layout: Layout, artefacts: Mapping[str, bytes], prompt: Prompt
) -> dict[str, torch.Tensor]:
    """Planes of all chunks, as they come out of frames."""
    return _joined(list(decode_chunks(frames, layout, artefacts, prompt.token_ids)))


def _joined(parts: Sequence[Planes]) -> dict[str, torch.Tensor]:
    """Planes of consecutive chunks as one."""
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
