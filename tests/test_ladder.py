"""Nested levels, the classes and the coder of their indices, and token importance."""

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvstore.codecs import CALIBRATED, Context, Pipeline, build_pipeline, decode, encode
from kvstore.codecs.artefact import load_artefact
from kvstore.codecs.context import known_specs
from kvstore.codecs.fast import nested as fast
from kvstore.codecs.fast.quantise import best_offset, row_cost
from kvstore.codecs.importance import token_importance
from kvstore.codecs.nested import Nested
from kvstore.codecs.rans import Rans
from kvstore.codecs.ref import rans as ref
from kvstore.codecs.ref.classes import (
    CLASS_MAX,
    EXTRA_DIGITS_MAX,
    FREQUENCY_SUM,
    HEAD_MAX,
    extra_digits,
    index_limit,
    make_tables,
    tables,
)
from kvstore.codecs.ref.nested import CLASS_MIN, class_of, coarser, costs, limits, sigma_units, step_size
from kvstore.errors import FrameCorruptError, PipelineError
from kvstore.layout import Layout, PlaneSpec, Rope
from tests.codec_cases import (
    FLOATS,
    TINY,
    artefacts_of,
    case_of,
    error,
    every_case,
    key_of,
    make_tensors,
    of_dtype,
    planes_like,
    whole_chunk,
)
from tests.make_golden import GOLDEN

CASES = every_case()
LADDERS = {name: case for name, case in CASES.items() if any(isinstance(stage, Rans) for stage in case.pipeline.stages)}
ANY_CLASS = st.integers(CLASS_MIN, CLASS_MAX)
Coded = tuple[list[int], list[list[int]]]


# The coder.


def fast_encode(index: torch.Tensor, classes: torch.Tensor, level: int, rows: int, columns: int) -> Coded:
    count, n = index.shape
    lanes, room = rows * columns, count * n * (1 + EXTRA_DIGITS_MAX)
    words, states, lengths = np.zeros(room * lanes, np.uint16), np.zeros(lanes, np.uint32), np.zeros(lanes, np.uint16)
    total = fast.encode(
        index.int().contiguous().numpy(),
        classes.int().contiguous().numpy(),
        np.zeros(count, np.int32),
        1,
        1,
        level,
        rows,
        columns,
        tables().head,
        tables().digit,
        np.zeros(room, np.uint16),
        words,
        states,
        lengths,
    )
    ends = lengths.astype(int).cumsum()
    assert total == ends[-1]
    return states.tolist(), [words[end - length : end].tolist() for length, end in zip(lengths, ends, strict=True)]


def fast_decode(
    coded: Coded, parents: torch.Tensor, classes: torch.Tensor, level: int, rows: int, columns: int
) -> torch.Tensor:
    states, words = coded
    index = parents.int().contiguous().clone()
    ends = np.array([len(lane) for lane in words]).cumsum()
    sound = fast.decode(
        index.numpy(),
        classes.int().contiguous().numpy(),
        np.zeros(len(index), np.int32),
        1,
        1,
        level,
        rows,
        columns,
        *fast.decode_tables(),
        np.array([word for lane in words for word in lane], np.uint16),
        np.array(states, np.uint64),
        ends - [len(lane) for lane in words],
        ends,
    )
    if not sound:
        raise ValueError("a lane does not end where its coder began")
    return index


def limits_of(classes: torch.Tensor, levels: int) -> torch.Tensor:
    return torch.from_numpy(limits(levels))[classes - CLASS_MIN]


def parents_of(index: torch.Tensor, level: int) -> torch.Tensor:
    return coarser(index) if level else torch.zeros_like(index)


@st.composite
def grids(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int, int, int]:
    """Indices within what their classes can code, classes, level, and lanes along rows and columns."""
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    low, high = sorted((draw(ANY_CLASS), draw(ANY_CLASS)))
    level = draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    classes = torch.randint(low, high + 1, shape, generator=generator)
    limit = limits_of(classes, level + 1)
    kind = draw(st.sampled_from(["gaussian", "limits", "uniform", "zero"]))
    unit = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    index = {
        "gaussian": torch.randn(shape, generator=generator, dtype=torch.float64) * 3.0 ** ((classes - 9) / 5 + level),
        "limits": unit.sign() * limit,
        "uniform": unit * limit,
        "zero": unit * 0,
    }[kind]
    clipped = torch.minimum(torch.maximum(index.round(), -limit.double()), limit.double()).int()
    return clipped, classes, level, 1 << draw(st.integers(0, 4)), 1 << draw(st.integers(0, 4))


@settings(max_examples=150, deadline=None)
@given(grids())
def test_the_compiled_coder_is_the_plain_one(grid: tuple[torch.Tensor, torch.Tensor, int, int, int]) -> None:
    index, classes, *how = grid
    coded = ref.encode(index, classes, *how)
    assert fast_encode(index, classes, *how) == coded
    parents = parents_of(index, how[0])
    assert torch.equal(ref.decode(*coded, parents, classes, *how), index)
    assert torch.equal(fast_decode(coded, parents, classes, *how), index)


@settings(max_examples=150, deadline=None)
@given(grids(), st.data())
def test_damage_is_noticed_by_both_coders_or_by_none(
    grid: tuple[torch.Tensor, torch.Tensor, int, int, int], data: st.DataObject
) -> None:
    index, classes, *how = grid
    states, words = ref.encode(index, classes, *how)
    lane: int = data.draw(st.integers(0, len(states) - 1))
    in_words: bool = data.draw(st.booleans())
    if words[lane] and in_words:
        place: int = data.draw(st.integers(0, len(words[lane]) - 1))
        words[lane][place] ^= data.draw(st.integers(1, 65535))
    else:
        states[lane] = data.draw(st.integers(0, (1 << 32) - 1))
    parents = parents_of(index, how[0])
    try:
        expected = ref.decode(states, words, parents, classes, *how)
    except ValueError:
        with pytest.raises(ValueError, match="does not end where its coder began"):
            fast_decode((states, words), parents, classes, *how)
    else:
        assert torch.equal(fast_decode((states, words), parents, classes, *how), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1 << 30))
def test_classes_are_those_of_the_block_plus_those_of_the_row(
    layers: int, tokens: int, heads: int, n: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(-10, 20, (layers, 1, heads, n), generator=generator)
    offset = torch.randint(-20, 20, (layers, tokens, heads, 1), generator=generator)
    classes = (base + offset).reshape(-1, n)
    limit = limits_of(classes, 1)
    index = (torch.rand(classes.shape, generator=generator) * 2 * limit).round().int() - limit.int()
    planes = {
        ".k.class": base.int(),
        "k.class": offset.to(torch.int8),
        "k.0": index.view(layers, tokens, heads, n),
    }
    specs = {
        ".k.class": PlaneSpec("int32", (layers, 1, heads, n)),
        "k.class": PlaneSpec("int8", (layers, tokens, heads, 1), level=0),
        "k.0": PlaneSpec("int32", (layers, tokens, heads, n), level=0),
    }
    coded = Rans().encode(planes, specs)
    found = Rans().decode({**coded, ".k.class": base.int()}, {name: specs[name] for name in ("k.class", "k.0")})
    assert torch.equal(found["k.0"].view(-1, n), index)
    assert torch.equal(found["k.class"], planes["k.class"])


def test_golden_vectors_of_rans_never_change() -> None:
    for vector in json.loads((GOLDEN / "rans.json").read_text()):
        index, classes, parents = (torch.tensor(vector[name]) for name in ("index", "classes", "parents"))
        how = (vector["level"], *vector["lanes"])
        states = [int(state, 16) for state in vector["states"]]
        words = [[int(lane[at : at + 4], 16) for at in range(0, len(lane), 4)] for lane in vector["words"]]
        assert ref.encode(index, classes, *how) == (states, words)
        assert fast_encode(index, classes, *how) == (states, words)
        assert torch.equal(ref.decode(states, words, parents, classes, *how), index.int())
        assert torch.equal(fast_decode((states, words), parents, classes, *how), index.int())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-127, 127), min_size=1, max_size=300), st.integers(0, 200))
@example([127, -127, 125], 189)
def test_any_small_integers_come_back(rare: list[int], common: int) -> None:
    numbers = torch.tensor([*rare, *range(-common // 20, common - common // 20)]).clamp(-127, 127).to(torch.int8)
    shape = (1, len(numbers), 1, 1)
    grid = {".k.class": torch.zeros(1, 1, 1, 1, dtype=torch.int32), "k.0": torch.zeros(shape, dtype=torch.int32)}
    specs = {
        ".k.class": PlaneSpec("int32", (1, 1, 1, 1)),
        "k.class": PlaneSpec("int8", shape, level=0),
        "k.mean": PlaneSpec("int8", shape, level=0),
        "k.0": PlaneSpec("int32", shape, level=0),
    }
    zero = torch.zeros(shape, dtype=torch.int8)
    coded = Rans().encode({**grid, "k.class": zero, "k.mean": numbers.view(shape)}, specs)
    like = {name: spec for name, spec in specs.items() if not name.startswith(".")}
    assert torch.equal(Rans().decode({**coded, ".k.class": grid[".k.class"]}, like)["k.mean"].view(-1), numbers)


# Classes and their tables.


def test_the_committed_tables_are_those_that_the_program_makes() -> None:
    path = Path(ref.__file__).with_name("classes.json")
    assert json.loads(path.read_text("ascii")) == make_tables()


def test_every_symbol_of_every_table_can_be_coded() -> None:
    for rows in (tables().head, tables().digit):
        assert (rows[:, 0] == 0).all()
        assert (rows[:, -1] == FREQUENCY_SUM).all()
        assert (np.diff(rows.astype(int), axis=1) > 0).all()


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5])
def test_every_index_within_its_limit_can_be_coded_and_no_other(levels: int) -> None:
    for sigma_class in range(CLASS_MIN, CLASS_MAX + 1):
        limit = index_limit(sigma_class, levels)
        assert limit == limits(levels)[sigma_class - CLASS_MIN]
        assert 3 * limit + 1 < 1 << 31
        for index in (-limit, limit, -limit - 1, limit + 1):
            assert codable(index, sigma_class, levels) == (abs(index) <= limit)


def codable(index: int, sigma_class: int, levels: int) -> bool:
    """Whether all levels of an index have symbols; a level without any must be three times its parent."""
    for level in reversed(range(levels)):
        parent = (index + 1) // 3 if level else 0
        if sigma_class + 5 * level < 0:
            if index != 3 * parent:
                return False
        elif level == 0:
            head = index
            for _ in range(extra_digits(sigma_class)):
                head = (head + 1) // 3
            if abs(head) > HEAD_MAX:
                return False
        for low, width in ref.symbols_of(index, sigma_class, level) if sigma_class + 5 * level >= 0 else ():
            assert 0 <= low < low + width <= FREQUENCY_SUM
        index = parent
    return True


def test_a_class_is_a_fifth_of_a_factor_of_three() -> None:
    sigma = torch.tensor([1.0, 3.0, 1 / 3, 9.0, 1e-30, 0.0])
    classes = class_of(sigma_units(sigma), 0).tolist()
    assert classes == [9, 14, 4, 19, CLASS_MIN, CLASS_MIN]
    assert math.isclose(step_size(80), 3.0)
    assert int(class_of(torch.tensor(30000, dtype=torch.int16), -1600)) == CLASS_MAX


def test_a_coarser_index_is_a_third_rounded() -> None:
    index = torch.arange(-100, 101)
    assert torch.equal(coarser(index), (index / 3).round().long())
    assert torch.equal((index - 3 * coarser(index)).abs().amax(), torch.tensor(1))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 48),
    st.integers(1, 4),
    st.floats(-8, 8),
    st.floats(1, 1e4),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_the_class_of_a_row_is_nearly_the_best_there_is(
    n: int, levels: int, log_scale: float, outlier: float, uneven: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.full((n,), 9) if not uneven else torch.linspace(25, -20, n).round().long()
    x = torch.randn(n, generator=generator) * 3.0 ** ((classes - 9) / 5) * 3.0**log_scale
    x[int(seed) % n] *= outlier
    how = (costs(), limits(levels), 3.0 ** (levels - 1))
    row, shape = x.numpy(), classes.int().numpy()
    found = best_offset(row, 1.0, shape, -60, 60, *how)
    # Narrower classes may say less at level 0 by leaving all to the finer levels, which the cost does not see.
    all_bits = [row_cost(row, 1.0, shape, offset, *how) for offset in range(max(found - 2, -60), 61)]
    assert row_cost(row, 1.0, shape, found, *how) <= 1.05 * min(all_bits) + 10


def test_an_outlier_where_nothing_was_expected_is_coded_and_not_cut() -> None:
    classes = torch.linspace(25, -20, 40).round().int()
    x = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 3.0 ** ((classes - 9) / 5)
    x[38] = 10.0
    how = (costs(), limits(3), 9.0)
    offset = best_offset(x.numpy(), 1.0, classes.numpy(), -60, 60, *how)
    assert index_limit(int(classes[38]) + offset, 3) >= 90


# The stage `nested`.


@pytest.mark.parametrize("sigma", [False, True])
def test_a_prefix_of_the_levels_is_the_coarser_quantisation(sigma: bool) -> None:
    shape = (2, 9, 2, 7)
    specs = {"k": PlaneSpec("float32", shape)}
    planes = {"k": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    if sigma:
        specs[".k.sigma"] = PlaneSpec("int16", (2, 1, 2, 7))
        planes[".k.sigma"] = torch.zeros(2, 1, 2, 7, dtype=torch.int16)
    one, four = (Pipeline((Nested(levels, step=30),)) for levels in (1, 4))
    coarse, fine = one.encode(planes, specs), four.encode(planes, specs)
    assert torch.equal(coarse["k.0"], fine["k.0"])
    index = fine["k.0"]
    for level in (1, 2, 3):
        digit = fine[f"k.{level}"].int() - 1
        assert torch.equal(coarser(3 * index + digit), index)
        index = 3 * index + digit
    context = {name: x for name, x in planes.items() if name.startswith(".")}
    errors = []
    for levels in (1, 2, 3, 4):
        held = {name: x for name, x in fine.items() if not name[-1].isdigit() or int(name[-1]) < levels}
        errors.append(error(four.decode({**held, **context}, specs)["k"], planes["k"]))
    assert all(3 < before / after < 12 for before, after in pairwise(errors))


def test_an_outlier_keeps_its_sign_however_large_it_is() -> None:
    shape = (1, 2, 1, 4)
    specs = {"k": PlaneSpec("float32", shape), ".k.sigma": PlaneSpec("int16", (1, 1, 1, 4))}
    x = torch.tensor([1e38, -1e38, 1e25, -1e25, 1.0, -1.0, 0.0, 1e-45]).view(shape)
    planes = {"k": x, ".k.sigma": torch.zeros(1, 1, 1, 4, dtype=torch.int16)}
    stage = Pipeline((Nested(),))
    found = stage.decode({**stage.encode(planes, specs), ".k.sigma": planes[".k.sigma"]}, specs)["k"]
    assert torch.equal(found.sign()[0, 0], x.sign()[0, 0])
    assert torch.allclose(found[0, 1], x[0, 1], atol=0.2)


@pytest.mark.parametrize("name", LADDERS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_level_has_the_distortion_that_its_header_says(name: str, dtype: str) -> None:
    case = LADDERS[name]
    layout = of_dtype(case.layout, dtype)
    key, planes = key_of(layout), planes_like(layout)
    frame = encode(planes, layout, case.pipeline, key=key, context=case.context)
    assert frame.levels == (1 if name == "kvtc" else 3)
    errors = []
    for level in range(frame.levels):
        held = frame.truncated(level)
        found = decode(held, layout, case.artefacts, key=key, token_ids=case.context.token_ids)
        errors.append(sum(error(found[plane], x) for plane, x in planes.items()))
        for plane, x in planes.items():
            said = frame.head.header.distortion[plane][level]
            assert found[plane].dtype == x.dtype
            assert math.isclose(error(found[plane], x), said, rel_tol=2e-3, abs_tol=1e-9)
    # What bfloat16 keeps of a value is a floor.
    least = 4 if dtype == "float32" else 1
    assert all(before >= least * after for before, after in pairwise(errors))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example("ladder", [3e38] * 8, 1.0, 0)
@example("ladder-klt", [1e30, -1e30, 0.0, 0.0, 0.0, 0.0, 0.0, 1e-45], 1.0, 0)
@example("ladder-weighted", [0.0] * 8, 1e-40, 0)
@example("ladder-tokens", [0.0] * 8, 0.0, 0)
@given(
    st.sampled_from(sorted(LADDERS)),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8),
    st.sampled_from([0.0, 1e-45, 1e-40, 1e-20, 1.0, 1e6, 1e20, 1e37]),
    st.integers(0, 99),
)
def test_any_finite_values_decode_to_finite_ones_or_are_refused(
    name: str, values: list[float], scale: float, seed: int
) -> None:
    case = LADDERS[name]._replace(layout=of_dtype(LADDERS[name].layout, "float32"))
    case = case._replace(key=key_of(case.layout))
    planes = {plane: x * scale for plane, x in planes_like(case.layout, seed).items()}
    planes["k"][0, 1, 0, :8] = torch.tensor(values)
    try:
        frame = case.encode(planes)
    except PipelineError as exc:
        # Near the largest float32 the arithmetic itself overflows.
        assert "float32 arithmetic" in str(exc)
        assert max(float(x.abs().max()) for x in planes.values()) > 1e34
        return
    for level in range(frame.levels):
        held = frame.truncated(level)
        found = decode(held, case.layout, case.artefacts, key=case.key, token_ids=case.context.token_ids)
        assert all(torch.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("name", LADDERS)
def test_an_outlier_of_a_million_sigma_costs_its_row_and_no_other(name: str) -> None:
    case = LADDERS[name]
    planes = planes_like(case.layout)
    planes["v"][1, 3, 1, 2] = 1e6
    found, plain = (
        decode(frame, case.layout, case.artefacts, key=case.key, token_ids=case.context.token_ids)
        for frame in (case.encode(planes), case.encode())
    )
    if not case.artefacts:
        # Without calibration the step is that of the head, which the outlier widens.
        assert error(found["v"][1, 3], planes["v"][1, 3]) < 0.01
    else:
        # On an absolute step the largest class may cut it, but not into something worse than nothing.
        assert error(found["v"][1, 3], planes["v"][1, 3]) < 1
        assert error(found["v"][:, 4:], plain["v"][:, 4:]) < 1e-6


# Token importance.


def test_a_step_follows_the_importance_of_its_token() -> None:
    artefacts = artefacts_of(make_tensors())
    pipeline = build_pipeline(CALIBRATED["ladder-klt"](next(iter(artefacts))), artefacts)
    importance = torch.ones(3, 16)
    importance[:, :4] = 1e-9
    importance[:, 4:8] = 1e9
    layout = of_dtype(TINY, "float32")
    planes, key = planes_like(layout), key_of(layout)
    frame = encode(planes, layout, pipeline, key=key, context=Context(importance=importance))
    found = decode(frame, layout, artefacts, key=key)
    errors = [error(found["v"][:, at : at + 4], planes["v"][:, at : at + 4]) for at in (0, 4, 8)]
    # A step of five classes more is three times as wide, its squared error nine times as large.
    assert 5 < errors[0] / errors[2] < 14
    assert 5 < errors[2] / errors[1] < 14


@pytest.mark.parametrize("by_layer", [False, True])
def test_scales_are_powers_of_importance_in_classes(by_layer: bool) -> None:
    artefacts = artefacts_of(make_tensors())
    stages = [{"stage": "importance", "artefact": next(iter(artefacts)), "by_layer": by_layer, "exponent": 100}]
    importance = torch.tensor([[1.0, 3.0, 1 / 3, 3**0.2], [1.0, 3.0, 3.0, 3**0.2], [1.0, 3.0, 3.0, 3**0.2]])
    importance = importance.repeat(1, 4)
    case = case_of("ladder-klt")._replace(
        pipeline=build_pipeline(stages, artefacts), context=Context(importance=importance)
    )
    specs, chunk = whole_chunk(case)
    scale = case.pipeline.encode(chunk, specs)["token.scale"][:, :4, 0, 0].tolist()
    expected = [[0, -5, 5, -1], [0, -5, -5, -1], [0, -5, -5, -1]] if by_layer else [[0, -5, -2, -1]]
    assert scale == expected


def test_importance_is_relative_and_follows_the_probes() -> None:
    artefact = load_artefact(next(iter(artefacts_of(make_tensors()).values())))
    keys = torch.randn(3, 16, 2, 8, generator=torch.Generator().manual_seed(0))
    found = token_importance(keys, TINY, artefact)
    assert found.shape == (3, 16)
    assert torch.allclose(found.log().mean(1), torch.zeros(3), atol=1e-5)
    assert float(found.std()) > 0.01
    other = dataclasses.replace(TINY, rope=None)
    with pytest.raises(PipelineError, match="stage 'importance': the probes"):
        token_importance(keys, other, artefact)


@pytest.mark.parametrize("shape", [(3, 15), (2, 16), (16,), (3, 16, 1)])
def test_importance_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    case = case_of("ladder-klt")
    with pytest.raises(PipelineError, match=r"stage 'importance'.*\[3, 16\]|stage 'importance'.*\[1, 16\]"):
        case._replace(context=Context(importance=torch.ones(shape))).encode()


def test_importance_by_layer_needs_layers_of_their_own() -> None:
    artefacts = artefacts_of(make_tensors(group_layers=2), group_layers=2)
    digest = next(iter(artefacts))
    first, *rest = CALIBRATED["ladder-klt"](digest)
    pipeline = build_pipeline([{**first, "by_layer": True}, *rest], artefacts)
    with pytest.raises(PipelineError, match="stage 'nested': plane 'k' spans several layers"):
        pipeline.infer(known_specs(TINY, 2))


# Combinations that are refused without data.


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["nested", "rans", "rans"], "stage 'rans': plane 'k.* is not as the stage 'nested' makes it"),
        (["nested", "zstd", "rans"], "stage 'rans': plane 'k.* is not as the stage 'nested' makes it"),
        (["nested", "raw", "rans"], "stage 'rans': plane 'k.* is not as the stage 'nested' makes it"),
        (["nested", "pack", "rans"], "stage 'rans': plane 'k.1' is not as the stage 'nested' makes it"),
        (["nested", "ans", "rans"], "stage 'rans': plane 'k.1' is not as the stage 'nested' makes it"),
        (["rans"], "stage 'rans' codes what the stage 'nested' makes"),
        (["mean", "hadamard", "mean"], "stage 'mean': an earlier stage has made a plane 'k.mean'"),
        (["anchor", "anchor"], "stage 'anchor': an earlier stage has made a plane 'k.anchor'"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages: list[str], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        build_pipeline([{"stage": stage} for stage in stages]).infer(known_specs(TINY, 3))


@pytest.mark.parametrize(
    "stage",
    [
        {"stage": "absmax", "first_bins": 8, "first_layers": 1},
        {"stage": "minmax", "low_levels": 4, "low_heads": [1]},
    ],
)
def test_options_by_layer_are_refused_where_layers_are_joined(stage: dict[str, Any]) -> None:
    artefacts = artefacts_of(make_tensors(group_layers=2), group_layers=2)
    klt: dict[str, Any] = {"stage": "klt", "artefact": next(iter(artefacts))}
    pipeline = build_pipeline([klt, stage], artefacts)
    with pytest.raises(PipelineError, match=f"stage '{stage['stage']}'.*plane 'k' spans several"):
        pipeline.infer(known_specs(TINY, 2))


def test_two_stages_keep_would_lose_the_kept_tokens() -> None:
    stages: list[dict[str, Any]] = [{"stage": "keep", "sinks": 2}, {"stage": "keep", "sinks": 2}, {"stage": "raw"}]
    with pytest.raises(PipelineError, match=r"stage 'keep': .* 'k.kept'"):
        encode(planes_like(TINY), TINY, build_pipeline(stages), key=key_of(TINY))


def test_a_scale_beyond_its_classes_is_no_frame() -> None:
    stage = Nested()
    specs = {"k": PlaneSpec("float32", (1, 2, 1, 4))}
    made = Pipeline((stage,)).encode({"k": torch.ones(1, 2, 1, 4)}, specs)
    for offset in (127, -128):
        with pytest.raises(FrameCorruptError, match="leaves the range of classes"):
            Pipeline((stage,)).decode({**made, "k.class": torch.full((1, 2, 1, 1), offset, dtype=torch.int8)}, specs)


def test_layouts_without_keys_have_no_ladder() -> None:
    layout = Layout("m", "r", {"latent": PlaneSpec("bfloat16", (3, 16, 1, 8))}, 16, rope=Rope(1e4, 8))
    for case in LADDERS.values():
        with pytest.raises(PipelineError, match="plane 'k'"):
            case.pipeline.infer(known_specs(layout, 3))
