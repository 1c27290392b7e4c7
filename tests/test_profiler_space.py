"""The space of strategies: what can be built, and that every point is a pipeline and comes back from it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore.calibration.settings import Settings
from kvstore.codecs import build_pipeline
from kvstore.codecs.named import NAMED
from kvstore.errors import ConfigError
from kvstore.profiler.search import neighbours, start_pool
from kvstore.profiler.space import Basis, Configuration, Space

SPACE = Space(6, 2, 64)
PLAIN = Space(6, 2, 64, calibrated=False)
DIGEST = "a" * 64
SHARES = st.lists(st.floats(0, 1), min_size=len(SPACE.names), max_size=len(SPACE.names))


def test_the_grid_is_large_and_every_point_of_it_is_another_one() -> None:
    grid = list(SPACE.grid())
    assert len(set(grid)) == len(grid) >= 8_000
    assert {one.basis for one in grid} == {None, *SPACE.bases}
    assert all(one.basis is None for one in PLAIN.grid())


@given(SHARES)
def test_a_point_maps_to_a_pipeline_and_back(shares: list[float]) -> None:
    configuration = SPACE.at(shares)
    assert SPACE.configuration(configuration.values) == configuration
    pipeline = SPACE.pipeline(configuration, DIGEST if configuration.basis else "")
    assert SPACE.configuration_of(pipeline, configuration.basis) == configuration


@given(st.lists(st.floats(0, 1), min_size=len(PLAIN.names), max_size=len(PLAIN.names)))
def test_a_point_says_its_pipeline_as_the_pipeline_says_itself(shares: list[float]) -> None:
    pipeline = PLAIN.pipeline(PLAIN.at(shares))
    assert [dict(stage) for stage in build_pipeline(pipeline).spec] == [dict(stage) for stage in pipeline]


@given(SHARES, st.integers(0, 1 << 30))
def test_a_near_point_is_a_point(shares: list[float], seed: int) -> None:
    near = SPACE.near(SPACE.at(shares), torch.Generator().manual_seed(seed))
    assert SPACE.configuration(near.values) == near


@pytest.mark.parametrize("name", ["ladder", "ladder-repeats"])
def test_our_own_pipelines_are_points(name: str) -> None:
    configuration = PLAIN.configuration_of(NAMED[name])
    assert configuration.values["transform"] == "hadamard"
    assert configuration.values["step"] == {"ladder": 0.0, "ladder-repeats": -16.0}[name]


GOOD: dict[str, Any] = {"quantiser": "codebook", "bits": 3, "sinks": 0, "recent": 0, "coder": "ans-layer"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"coder": "pack"}, "coder is one of ans-layer here, not 'pack'"),
        ({"bits": 6}, "bits is an integer from 1 to 5 here, not 6"),
        ({"bits": True}, "not True"),
        ({"bits": 3.0}, "not 3.0"),
        ({"levels": 3}, "has no 'levels'"),
        ({"quantiser": "lloyd"}, "quantiser is one of nested"),
        ({"sinks": None}, "not None"),
    ],
)
def test_what_cannot_be_built_cannot_be_made(change: dict[str, Any], says: str) -> None:
    SPACE.configuration(GOOD)
    with pytest.raises(ConfigError, match=says):
        SPACE.configuration(GOOD | change)


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(ConfigError, match=r"codebook needs 'bits': an integer from 1 to 5"):
        SPACE.configuration({"quantiser": "codebook"})


def test_a_pipeline_that_is_no_point_is_refused() -> None:
    for pipeline in ([{"stage": "hadamard", "seed": 1}, *NAMED["turboquant"][1:]], NAMED["ladder-packed"][:-2]):
        with pytest.raises((ConfigError, StopIteration, IndexError, KeyError)) as found:
            PLAIN.configuration_of(tuple(pipeline))
        assert found.type is ConfigError


def test_a_basis_says_how_to_calibrate_it() -> None:
    for basis in SPACE.bases:
        settings = basis.settings(Settings(prompts=5, seed=3))
        settings.check()
        assert (settings.prompts, settings.seed, settings.group_layers) == (5, 3, basis.group_layers)
    assert len({basis.name for basis in SPACE.bases}) == len(SPACE.bases)
    assert Basis() in SPACE.bases


def test_pools_are_seeded_and_hold_different_points() -> None:
    first, again, other = start_pool(SPACE, 60, 1), start_pool(SPACE, 60, 1), start_pool(SPACE, 60, 2)
    assert first == again != other
    assert len(set(first)) == 60
    assert {one.values["quantiser"] for one in first} >= {"nested", "minmax", "absmax"}
    near = neighbours(SPACE, first[:3], 20, 5)
    assert near == neighbours(SPACE, first[:3], 20, 5)
    assert len(set(near)) == 20
    assert not set(near) & set(first[:3])
    tiny = [Configuration({"quantiser": "exact", "coder": "raw"})]
    assert len(neighbours(SPACE, [], 5, 0)) == 0
    assert tiny[0] in start_pool(SPACE, 3000, 0)
