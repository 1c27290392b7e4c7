"""Rotary embedding: the one that models apply, undone and applied again, and refused where it is not known."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvstore.codecs import Context, decode, encode, named_pipeline
from kvstore.codecs.context import known_specs
from kvstore.codecs.ref.rope import inverse_frequencies, rotary_planes, rotate, unrotate
from kvstore.errors import PipelineError
from kvstore.layout import Rope
from tests.codec_cases import (
    TINY,
    error,
    every_case,
    key_of,
    planes_like,
)

CASES = every_case()


SCALINGS: dict[str, dict[str, float]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 2048},
    "yarn-tuned": {
        "factor": 16.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "yarn-attention": {"factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.25},
}


def rope_of(name: str, dim: int = 64, theta: float = 5e5, **options: Any) -> Rope:
    kind = name.partition("-")[0]
    return Rope(theta, dim, kind, scaling=tuple(sorted(SCALINGS.get(name, {}).items())), **options)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_frequencies_are_those_of_transformers(name: str, dim: int) -> None:
    parameters = {"rope_type": name.partition("-")[0], "rope_theta": 5e5, **SCALINGS[name]}
    config = LlamaConfig(
        hidden_size=2 * dim,
        num_attention_heads=2,
        head_dim=dim,
        max_position_embeddings=1 << 17,
        rope_parameters=parameters,
    )
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    speeds, found = inverse_frequencies(rope_of(name, dim))
    assert torch.allclose(speeds.float(), expected, rtol=2e-6)
    assert math.isclose(found, factor, rel_tol=1e-6)


def test_default_frequencies_are_powers_of_theta() -> None:
    speeds, factor = inverse_frequencies(Rope(10000.0, 8))
    assert torch.allclose(speeds, torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64))
    assert factor == 1.0


@pytest.mark.parametrize("name", ["default", *SCALINGS])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [64, 96])
def test_undoing_an_embedding_undoes_it(name: str, interleaved: bool, dim: int) -> None:
    x = torch.randn(2, 5, 3, dim, generator=torch.Generator().manual_seed(0))
    planes = rotary_planes(rope_of(name, interleaved=interleaved), torch.arange(100_000, 100_005))
    turned = rotate(x, *planes)
    assert not torch.allclose(turned[..., :64], x[..., :64], atol=0.1)
    assert torch.equal(turned[..., 64:], x[..., 64:])
    assert torch.allclose(unrotate(turned, *planes), x, atol=1e-5)


def test_an_embedding_is_that_of_transformers() -> None:
    x = torch.randn(1, 6, 2, 64)
    positions = torch.arange(7, 13)
    speeds, factor = inverse_frequencies(rope_of("yarn"))
    angle = torch.cat([positions[:, None] * speeds] * 2, 1)
    expected, _ = apply_rotary_pos_emb(
        x, x, (angle.cos() * factor).float()[None], (angle.sin() * factor).float()[None], unsqueeze_dim=2
    )
    assert torch.allclose(rotate(x, *rotary_planes(rope_of("yarn"), positions)), expected, atol=1e-5)


def test_an_interleaved_embedding_turns_neighbours() -> None:
    x = torch.randn(1, 6, 2, 64)
    positions = torch.arange(6)
    speeds, _ = inverse_frequencies(rope_of("default"))
    turn = torch.polar(torch.ones(6, 32, dtype=torch.float64), positions[:, None] * speeds)
    pairs = torch.view_as_complex(x.double().reshape(1, 6, 2, 32, 2))
    expected = torch.view_as_real(pairs * turn[:, None]).flatten(-2).float()
    assert torch.allclose(
        rotate(x, *rotary_planes(rope_of("default", interleaved=True), positions)), expected, atol=1e-5
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [4, 8])
def test_frames_of_keys_with_partial_and_interleaved_embeddings_come_back(interleaved: bool, rotary: int) -> None:
    layout = dataclasses.replace(TINY, rope=Rope(1e4, rotary, interleaved=interleaved))
    planes, key = planes_like(layout), key_of(layout)
    frame = encode(planes, layout, named_pipeline("ladder"), key=key, context=Context(1 << 20))
    assert error(decode(frame, layout, key=key)["k"], planes["k"]) < 0.01


UNKNOWN = [
    (Rope(1e4, 8, "longrope"), "does not name or this build not know"),
    (Rope(1e4, 8, "llama3"), "does not name or this build not know"),
    (Rope(1e4, 7), "does not name or this build not know"),
    (Rope(1e4, 0), "does not name or this build not know"),
    (Rope(1e4, 8, "linear", scaling=(("factor", 0.0),)), "does not name or this build not know"),
    (Rope(1e4, 16), "rotates 16"),
    (None, "does not name or this build not know"),
]


@pytest.mark.parametrize(("rope", "message"), UNKNOWN)
def test_embeddings_that_cannot_be_undone_are_refused_where_they_must_be(rope: Rope | None, message: str) -> None:
    layout = dataclasses.replace(TINY, rope=rope)
    for name in ("ladder", "ladder-klt"):
        with pytest.raises(PipelineError, match=message):
            CASES[name].pipeline.infer(known_specs(layout, 3))
    planes, key = planes_like(layout), key_of(layout)
    for name in ("raw", "ladder-packed"):
        found = decode(encode(planes, layout, named_pipeline(name), key=key), layout, key=key)
        assert error(found["k"], planes["k"]) < 0.01


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (Rope(1e4, 8, "dynamic"), "kind 'dynamic' is not known; known: default, linear, llama3, yarn"),
        (Rope(1e4, 8, "yarn"), "needs the parameter 'factor'"),
        (Rope(1e4, 9), "rotary_dim cannot be 9"),
        (Rope(-1.0, 8), "parameters that cannot be"),
        (Rope(1e4, 8, "yarn", scaling=(("factor", 2.0), ("original_max_position_embeddings", -1.0))), "cannot be"),
    ],
)
def test_parameters_of_embeddings_that_cannot_be_are_named(rope: Rope, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        inverse_frequencies(rope)
