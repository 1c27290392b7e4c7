"""docs/codecs.md is enough to decode: golden frames by a decoder that was written from it."""

import json
import struct

import numpy as np
import pytest
import torch

from kvstore.codecs import decode
from kvstore.codecs.ref.rope import rotary_planes, unrotate
from kvstore.frame import Frame
from tests import second_decoder
from tests.codec_cases import Case, every_case
from tests.make_golden import golden_case, golden_frame
from tests.second_reader import read


def card_of(data: bytes) -> dict[str, object]:
    (size,) = struct.unpack_from("<Q", data)
    card: dict[str, object] = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["kvstore_artefact"])
    return card


def check(case: Case, frame: Frame) -> None:
    layers, tokens, heads, dim = case.layout.planes["k"].shape
    data = next(iter(case.artefacts.values()), None)
    artefact = second_decoder.read_artefact(data) if data else {}
    card = {"joint": False, "group_layers": 1} | (card_of(data) if data else {})
    ids = case.context.token_ids
    for level in range(frame.levels):
        held = frame.truncated(level)
        found = second_decoder.decode(
            read(b"".join(held.buffers())), second_decoder.Shape(tokens, heads, dim), artefact, card, ids
        )
        exact = {
            name: x.float()
            for name, x in decode(held, case.layout, case.artefacts, key=case.key, token_ids=ids).items()
        }
        assert case.layout.rope is not None
        first = frame.head.header.first_position
        rotary = rotary_planes(case.layout.rope, torch.arange(first, first + tokens))
        exact["k"] = unrotate(exact["k"], *rotary)
        for name, x in exact.items():
            assert found[name].shape == (layers, tokens, heads, dim)
            # Decoded planes are rounded to bfloat16.
            largest = float(x.abs().max())
            assert np.allclose(found[name], x.numpy(), rtol=0.02, atol=0.01 * largest), (name, level)
            error = float(np.square(found[name] - x.double().numpy()).mean())
            assert error < 1e-5 * float(x.double().square().mean()), (name, level)


@pytest.mark.parametrize("name", ["ladder", "ladder-weighted", "ladder-klt", "ladder-tokens"])
def test_golden_frames_are_decoded_from_the_page_alone(name: str) -> None:
    check(golden_case(name, "bfloat16"), golden_frame(f"{name}-bfloat16"))


@pytest.mark.parametrize("name", ["ladder-klt-groups", "ladder-klt-heads", "ladder-tokens-heads", "kvtc"])
def test_frames_of_other_bases_are_too(name: str) -> None:
    case = every_case()[name]
    check(case, case.encode())
