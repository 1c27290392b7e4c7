"""Stages that need an artefact, each against its definition, and artefacts that are not what they should be."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_safetensors

from kvstore.codecs import CALIBRATED, Context, Pipeline, build_pipeline, decode, encode, named_pipeline
from kvstore.codecs.artefact import artefact_digest, load_artefact, save_artefact
from kvstore.codecs.context import known_planes, known_specs
from kvstore.codecs.nested import Nested
from kvstore.codecs.ref.predict import HISTORY
from kvstore.errors import PipelineError
from kvstore.keys import chunk_keys
from kvstore.layout import PlaneSpec
from tests.codec_cases import (
    TINY,
    TOKEN_IDS,
    VOCABULARY,
    Artefacts,
    Case,
    Planes,
    artefacts_of,
    case_of,
    error,
    key_of,
    make_tensors,
    of_dtype,
    planes_like,
    whole_chunk,
)

# Calibrated stages, each by itself.


STAGE_CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "klt by head": ([{"stage": "klt"}], {"by_head": True}, {}),
    "klt by layer": ([{"stage": "klt"}], {}, {}),
    "klt over layers": ([{"stage": "klt"}], {"group_layers": 2}, {"group_layers": 2}),
    "klt over all layers": ([{"stage": "klt"}], {"group_layers": 3}, {"group_layers": 3}),
    "joint klt": ([{"stage": "klt"}], {"joint": True}, {"joint": True}),
    "joint klt over layers": (
        [{"stage": "klt"}],
        {"group_layers": 2, "joint": True},
        {"group_layers": 2, "joint": True},
    ),
    "weigh": ([{"stage": "weigh"}], {}, {}),
    "mean": ([{"stage": "mean"}], {}, {}),
    **{f"predict from {n}": ([{"stage": "predict"}], {"window": n}, {"window": n}) for n in (1, 2, 3, 4)},
}


@pytest.mark.parametrize("name", STAGE_CASES)
def test_a_calibrated_stage_alone_loses_only_rounding(name: str) -> None:
    stages, made, card = STAGE_CASES[name]
    artefacts = artefacts_of(make_tensors(**made), **card)
    bound = [{**stage, "artefact": next(iter(artefacts))} for stage in stages]
    layout = of_dtype(TINY, "float32")
    planes, key = planes_like(layout), chunk_keys(layout, TOKEN_IDS)[0]
    pipeline = build_pipeline([*bound, {"stage": "raw"}], artefacts)
    frame = encode(planes, layout, pipeline, key=key, context=Context(token_ids=TOKEN_IDS[:16]))
    step = card.get("group_layers", 0)
    if step:
        # The last group is ragged where the layers are no multiple.
        assert frame.head.header.groups == ((2, 1) if step == 2 else (3,))
    found = decode(frame, layout, artefacts, key=key, token_ids=TOKEN_IDS[:16])
    assert all(error(found[plane], x) < 1e-9 for plane, x in planes.items())
    assert not pipeline.lossless


def test_a_cap_on_the_rank_keeps_the_leading_coefficients_and_costs_nothing_for_the_others() -> None:
    tensors = make_tensors()
    artefacts = artefacts_of(tensors)
    layout = of_dtype(TINY, "float32")
    planes, key = planes_like(layout), chunk_keys(layout, TOKEN_IDS)[0]
    found, sizes = {}, {}
    for rank in (0, 6):
        stage = {"stage": "klt", "artefact": next(iter(artefacts)), "rank": rank}
        coder: list[dict[str, Any]] = [{"stage": "nested", "step": -300}, {"stage": "rans"}]
        empty: list[dict[str, Any]] = []
        for name, rest in (("raw", empty), ("coded", coder)):
            pipeline = build_pipeline([stage, *rest, {"stage": "raw"}], artefacts)
            frame = encode(planes, layout, pipeline, key=key)
            found[name, rank] = decode(frame, layout, artefacts, key=key)
            sizes[name, rank] = frame.size_bytes
    forward, inverse = (tensors[f"k.{side}.0"][0].double() for side in ("forward", "inverse"))
    projected = planes["k"][0].flatten(1).double() @ forward[:, :6] @ inverse[:6]
    assert error(found["raw", 6]["k"][0].flatten(1), projected) < 1e-9
    assert error(found["coded", 6]["k"][0].flatten(1), projected) < 0.01
    assert sizes["coded", 6] < 0.8 * sizes["coded", 0]
    with pytest.raises(PipelineError, match="rank must be an integer"):
        build_pipeline([{"stage": "klt", "artefact": next(iter(artefacts)), "rank": -1}], artefacts)


def test_a_basis_makes_an_error_cost_the_same_in_every_direction() -> None:
    tensors = make_tensors()
    forward, inverse = tensors["k.forward.0"][0].double(), tensors["k.inverse.0"][0].double()
    assert torch.allclose(forward @ inverse, torch.eye(16, dtype=torch.float64), atol=1e-4)
    assert (tensors["k.sigma.0"].diff() <= 0).all()


def test_groups_that_a_basis_was_not_made_for_are_refused() -> None:
    artefacts = artefacts_of(make_tensors(group_layers=2), group_layers=2)
    pipeline = named_pipeline("kvtc", artefacts)
    with pytest.raises(PipelineError, match=r"stage 'klt'.*artefact"):
        encode(planes_like(TINY), TINY, pipeline, key=key_of(TINY), context=Context(group_layers=1))
    with pytest.raises(PipelineError, match="spans 2 layers; it has no basis for 48 dimensions of plane 'k'"):
        encode(planes_like(TINY), TINY, pipeline, key=key_of(TINY), context=Context(group_layers=3))
    larger = dataclasses.replace(
        TINY, planes={name: dataclasses.replace(spec, shape=(4, *spec.shape[1:])) for name, spec in TINY.planes.items()}
    )
    with pytest.raises(PipelineError, match=r"'k.mean' for layer 3|'k.sigma.2'"):
        encode(planes_like(larger), larger, pipeline, key=key_of(larger))


def test_a_joint_basis_needs_planes_of_one_shape() -> None:
    artefacts = artefacts_of(make_tensors(joint=True), joint=True)
    stage = build_pipeline([{"stage": "klt", "artefact": next(iter(artefacts))}], artefacts)
    with pytest.raises(PipelineError, match="a joint basis needs K and V of the same shape"):
        stage.infer({"k": PlaneSpec("float32", (3, 4, 2, 8)), "v": PlaneSpec("float32", (3, 4, 2, 16))})
    with pytest.raises(PipelineError, match=r"stage 'klt'.* another stage has turned them into codes"):
        Pipeline((Nested(), *stage.stages)).infer(known_specs(TINY, 3))


# Predictions.


def predicting(window: int) -> tuple[Pipeline, Artefacts, Planes]:
    tensors = make_tensors(window=window)
    artefacts = artefacts_of(tensors, window=window)
    stages = [{"stage": "predict", "artefact": next(iter(artefacts))}, {"stage": "raw"}]
    return build_pipeline(stages, artefacts), artefacts, tensors


@pytest.mark.parametrize("window", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [0, 1])
def test_a_prediction_is_a_linear_function_of_the_last_tokens(window: int, chunk: int) -> None:
    pipeline, _, tensors = predicting(window)
    case = case_of("ladder-klt")._replace(
        pipeline=Pipeline(pipeline.stages[:1]),
        layout=of_dtype(TINY, "float32"),
        context=Context(16 * chunk, token_ids=TOKEN_IDS[: 16 * (chunk + 1)]),
    )
    specs, planes = whole_chunk(case)
    left = case.pipeline.encode(planes, specs)
    for layer, token in ((0, 0), (1, 1), (2, 2), (0, 15)):
        at = 16 * chunk + token
        vectors = [
            tensors["tokens"][TOKEN_IDS[at - back]].float() if at >= back else torch.zeros(4) for back in range(window)
        ]
        predicted = torch.cat([*vectors, torch.ones(1)]) @ tensors[f"v.predict.{layer}"].float()
        expected = planes["v"][layer, token].flatten() - predicted
        assert torch.allclose(left["v"][layer, token].flatten(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("position", "token_ids", "message"),
    [
        (0, (), "stage 'predict' needs the token ids of the chunk"),
        (0, TOKEN_IDS[:15], "needs 16 token ids, it has 15"),
        (16, TOKEN_IDS[:18], "needs 19 token ids, it has 18"),
        (2, TOKEN_IDS[:17], "needs 18 token ids, it has 17"),
        (0, [*TOKEN_IDS[:15], VOCABULARY], f"stage 'predict': token {VOCABULARY} is beyond the artefact's 40"),
        (0, [*TOKEN_IDS[:15], 1 << 40], "stage 'predict': token 1099511627776 is beyond"),
        (0, [*TOKEN_IDS[:15], -1], "needs 16 token ids"),
    ],
)
def test_token_ids_that_do_not_do_are_refused_on_both_sides(position: int, token_ids: list[int], message: str) -> None:
    pipeline, artefacts, _ = predicting(4)
    planes, key = planes_like(TINY), key_of(TINY)
    with pytest.raises(PipelineError, match=message):
        encode(planes, TINY, pipeline, key=key, context=Context(position, token_ids=token_ids))
    frame = encode(planes, TINY, pipeline, key=key, context=Context(position, token_ids=TOKEN_IDS))
    with pytest.raises(PipelineError, match=message):
        decode(frame, TINY, artefacts, key=key, token_ids=token_ids)


def test_only_the_last_tokens_are_looked_at() -> None:
    known = known_planes(TINY, 16, TOKEN_IDS)[".token"].tolist()
    assert known == TOKEN_IDS[16 - HISTORY :]
    assert known_planes(TINY, 0, TOKEN_IDS[:16])[".token"].tolist() == [-1, -1, -1, *TOKEN_IDS[:16]]
    assert known_planes(TINY, 2, TOKEN_IDS[:18])[".token"].tolist() == [-1, *TOKEN_IDS[:18]]


# Artefacts.


def bytes_with(change: dict[str, torch.Tensor | None], **card: object) -> bytes:
    """An artefact for every calibrated pipeline with some tensors changed, or left out where they are None."""
    tensors: dict[str, torch.Tensor | None] = {**make_tensors(window=2), **change}
    return save_artefact({name: x for name, x in tensors.items() if x is not None}, card)


SOUND = bytes_with({})
CARD = {"kvstore_artefact": json.dumps({"version": 1})}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"no safetensors at all, not even close", "cannot be read"),
        (SOUND[:7], "cannot be read"),
        (SOUND[:-1], "cannot be read"),
        (SOUND[: len(SOUND) // 2], "cannot be read"),
        (SOUND + b"\0", "cannot be read"),
        (save_safetensors({"a": torch.ones(1)}), "cannot be read"),
        (save_safetensors({"a": torch.ones(1)}, {"kvstore_artefact": "{"}), "cannot be read"),
        (save_safetensors({"a": torch.ones(1)}, {"kvstore_artefact": "[" * 100_000}), "cannot be read"),
        (save_safetensors({"a": torch.ones(1)}, {"kvstore_artefact": "[1]"}), "not of version 1"),
        (save_artefact({"a": torch.ones(1)}, {"version": 2}), "not of version 1"),
        (bytes_with({"k.mean": torch.full((3, 2, 8), math.nan)}), "not finite"),
        (bytes_with({"v.inverse.1": torch.full((1, 16, 16), -math.inf)}), "tensor 'v.inverse.1'"),
        (bytes_with({"k.mean": torch.ones(3, 2, 8).to(torch.float8_e4m3fn)}), "float8_e4m3fn"),
        (bytes_with({"k.mean": torch.ones(3, 2, 8, dtype=torch.bool)}), "bool"),
    ],
)
def test_bytes_that_are_no_artefact_are_refused_by_their_digest(data: bytes, message: str) -> None:
    digest = artefact_digest(data)
    with pytest.raises(PipelineError, match=digest) as refusal:
        load_artefact(data, digest)
    assert message in str(refusal.value)


def test_bytes_with_another_digest_are_refused_by_both_digests() -> None:
    for digest in ("ab" * 32, "", artefact_digest(SOUND).upper()):
        with pytest.raises(PipelineError, match=f"{digest} have the digest {artefact_digest(SOUND)}"):
            load_artefact(SOUND, digest)
    with pytest.raises(PipelineError, match=f"artefact {'ab' * 32} have the digest"):
        named_pipeline("ladder-klt", {"ab" * 32: SOUND})


SHAPES = [
    ("ladder-weighted", "k.weight", (3, 2, 7)),
    ("ladder-weighted", "v.spread", (3, 2, 1)),
    ("ladder-weighted", "k.mean", (2, 2, 8)),
    ("ladder-weighted", "k.spread", (2, 2)),
    ("ladder-klt", "probes", (3, 4, 6, 7)),
    ("ladder-klt", "probes", (2, 4, 6, 8)),
    ("ladder-klt", "probes", (3, 3, 6, 8)),
    ("ladder-klt", "k.mean", (3, 16)),
    ("ladder-klt", "k.inverse.0", (1, 16, 15)),
    ("ladder-klt", "k.inverse.0", (2, 8, 9)),
    ("ladder-klt", "k.inverse.1", (1, 15, 16)),
    ("ladder-klt", "v.inverse.2", (16, 16)),
    ("ladder-klt", "k.forward.0", (1, 16, 15)),
    ("ladder-klt", "v.forward.2", (2, 8, 8)),
    ("ladder-klt", "k.sigma.1", (2, 8)),
    ("ladder-tokens", "tokens", (40,)),
    ("ladder-tokens", "tokens", (40, 5)),
    ("ladder-tokens", "tokens", (40, 0)),
    ("ladder-tokens", "k.predict.0", (9, 15)),
    ("ladder-tokens", "k.predict.0", (1, 16)),
    ("ladder-tokens", "v.predict.0", (8, 16)),
    ("ladder-tokens", "v.predict.1", (5, 16)),
    ("ladder-tokens", "v.predict.2", (21, 16)),
    ("ladder-tokens", "v.predict.2", (9, 17)),
]


def calibrated_case(name: str, data: bytes) -> Case:
    artefacts = {artefact_digest(data): data}
    context = Context(16, token_ids=TOKEN_IDS)
    return Case(named_pipeline(name, artefacts), TINY, artefacts, context, chunk_keys(TINY, TOKEN_IDS)[1])


@pytest.mark.parametrize(("name", "tensor", "shape"), SHAPES)
def test_tensors_of_another_shape_are_refused_by_name(name: str, tensor: str, shape: tuple[int, ...]) -> None:
    case = calibrated_case(name, bytes_with({tensor: torch.ones(shape)}))
    with pytest.raises(PipelineError, match=f"{tensor}|{next(iter(case.artefacts))}|probes of the artefact"):
        decode(case.encode(), TINY, case.artefacts, key=case.key, token_ids=TOKEN_IDS)


@pytest.mark.parametrize(("name", "tensor"), sorted({(name, tensor) for name, tensor, _ in SHAPES}))
def test_tensors_that_are_missing_are_refused_by_name(name: str, tensor: str) -> None:
    case = calibrated_case(name, bytes_with({tensor: None}))
    with pytest.raises(PipelineError, match=f"artefact {next(iter(case.artefacts))} has no (tensor )?'{tensor}'"):
        decode(case.encode(), TINY, case.artefacts, key=case.key, token_ids=TOKEN_IDS)


def test_the_sound_artefact_does_for_all() -> None:
    for name in CALIBRATED:
        case = calibrated_case(name, SOUND)
        found = decode(case.encode(), TINY, case.artefacts, key=case.key, token_ids=TOKEN_IDS)
        assert error(found["v"], planes_like(TINY)["v"]) < 0.03


@pytest.mark.parametrize("group_layers", ["2", 0, -1, 2.5, None])
def test_a_card_that_says_no_number_of_layers_means_one(group_layers: object) -> None:
    data = bytes_with({}, group_layers=group_layers)
    frame = calibrated_case("ladder-klt", data).encode()
    assert frame.head.header.groups == (3,)


def test_a_frame_that_a_bound_stage_made_needs_the_same_artefact() -> None:
    case, other = calibrated_case("ladder-klt", SOUND), bytes_with({}, note="another")
    frame = case.encode()
    with pytest.raises(PipelineError, match=artefact_digest(SOUND)):
        decode(frame, TINY, {artefact_digest(other): other}, key=case.key)
    with pytest.raises(PipelineError, match=f"{artefact_digest(SOUND)} have the digest {artefact_digest(other)}"):
        decode(frame, TINY, {artefact_digest(SOUND): other}, key=case.key)
