"""Mixing of repeated tokens: orthonormal, derived from the ids alone, and worth its place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.codecs import Context, build_pipeline, decode, encode, named_pipeline
from kvstore.codecs.named import ladder, ladder_repeats
from kvstore.codecs.ref.repeats import mixing
from kvstore.errors import PipelineError
from kvstore.keys import chunk_keys
from kvstore.layout import Rope, attention_layout

LAYOUT = attention_layout("m", "r", layers=2, kv_heads=2, head_dim=32, chunk_tokens=64, rope=Rope(10000.0, 32))
IDS = [number % 16 for number in range(64)]
KEY = chunk_keys(LAYOUT, IDS)[0]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=24))
def test_the_matrix_is_orthonormal_and_leaves_single_tokens_alone(ids: list[int]) -> None:
    matrix = mixing(torch.tensor(ids))
    assert torch.allclose(matrix @ matrix.T, torch.eye(len(ids)), atol=1e-5)
    for number, token in enumerate(ids):
        if ids.count(token) == 1:
            assert torch.equal(matrix[number], torch.eye(len(ids))[number])


def test_equal_tokens_with_equal_values_leave_one_vector() -> None:
    ids = torch.tensor([7, 3, 7, 7, 3])
    x = torch.tensor([2.0, -1.0, 2.0, 2.0, -1.0])
    mixed = mixing(ids) @ x
    assert torch.allclose(mixed, torch.tensor([2 * 3**0.5, -(2**0.5), 0.0, 0.0, 0.0]), atol=1e-6)


def planes_that_depend_on_the_token() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    planes = {}
    for name in ("k", "v"):
        own = torch.randn(2, 16, 2, 32, generator=generator)
        planes[name] = (own[:, IDS] + 0.2 * torch.randn(2, 64, 2, 32, generator=generator)).bfloat16()
    return planes


def test_repeated_tokens_take_fewer_bytes_at_no_more_error() -> None:
    planes = planes_that_depend_on_the_token()
    context = Context(token_ids=IDS)
    # The rotary embedding of random values would hide what equal tokens share.
    specs = [[stage for stage in make() if stage["stage"] != "rope"] for make in (ladder, ladder_repeats)]
    plain, mixed = (encode(planes, LAYOUT, build_pipeline(spec), key=KEY, context=context) for spec in specs)
    fewer = [sum(map(len, mixed.payload[: n + 1])) / sum(map(len, plain.payload[: n + 1])) for n in range(3)]
    noise = mixed.head.header.distortion["v"][2] / plain.head.header.distortion["v"][2]
    assert noise < 0.3 or max(fewer) < 0.8


def test_every_level_has_the_error_that_its_header_says() -> None:
    planes = planes_that_depend_on_the_token()
    frame = encode(planes, LAYOUT, named_pipeline("ladder-repeats"), key=KEY, context=Context(token_ids=IDS))
    for level in range(3):
        found = decode(frame.truncated(level), LAYOUT, key=KEY, token_ids=IDS)
        for name, exact in planes.items():
            error = (found[name].double() - exact.double()).square().sum() / exact.double().square().sum()
            assert float(error) == pytest.approx(frame.head.header.distortion[name][level], rel=1e-3)


def test_without_token_ids_it_says_what_is_missing() -> None:
    planes = planes_that_depend_on_the_token()
    pipeline = named_pipeline("ladder-repeats")
    with pytest.raises(PipelineError, match="'repeats' needs the token ids"):
        encode(planes, LAYOUT, pipeline, key=KEY)
    frame = encode(planes, LAYOUT, pipeline, key=KEY, context=Context(token_ids=IDS))
    with pytest.raises(PipelineError, match="'repeats' needs the token ids"):
        decode(frame, LAYOUT, key=KEY)
    with pytest.raises(PipelineError, match="token ids"):
        decode(frame, LAYOUT, key=KEY, token_ids=IDS[:10])
