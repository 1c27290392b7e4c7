"""Frames: golden ones never change, two readers agree, and whatever is damaged is refused by both."""

import random
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import FrameCorruptError, FrameError, FrameVersionError, LayoutMismatchError
from kvstore.frame import Frame, blob_frame, blob_of, pack_frame, padded_bytes, parse_frame
from kvstore.header import Behind, Header, dump_header, load_header
from kvstore.testing import make_frame, make_key
from tests import second_reader

GOLDEN = Path(__file__).parent / "golden"
KEY = make_key(1)
HEADER = Header(
    key=KEY,
    tokens=256,
    first_position=512,
    groups=(2, 1),
    planes=(("k.0", "v.0"), ("k.1",), ("v.1",)),
    pipeline=({"stage": "test", "option": 3},),
    artefacts=("ab" * 32,),
    distortion={"k": (0.5, 0.1, 0.1), "v": (0.5, 0.5, 1e-9)},
    behind=Behind(1, 0.25),
)
SEGMENTS = [bytes([number]) * length for number, length in enumerate((5, 16, 0, 33, 1, 40, 17, 64))]
FRAME = pack_frame(HEADER, SEGMENTS)


def data_of(frame: Frame) -> bytes:
    return b"".join(bytes(view) for view in frame.buffers())


DATA = data_of(FRAME)
ENDS = [len(FRAME.head.raw) + end for end in accumulate(FRAME.head.level_bytes)]


def read_both(data: bytes) -> None:
    """Read with both readers; they must agree on whether it is a frame and on what is in it."""
    try:
        frame = parse_frame(data)
        frame.verify(KEY)
    except FrameError:
        with pytest.raises(ValueError, match=r"\w"):
            second_reader.read(data, KEY)
        raise
    theirs = second_reader.read(data, KEY)
    assert (theirs.id, theirs.levels_held, theirs.key) == (frame.id, frame.levels, KEY)
    assert theirs.segments == {(lv, group, name): bytes(view) for lv, group, name, view in frame.segments()}


def test_a_frame_reads_back_as_it_was_written() -> None:
    read_both(DATA)
    frame = parse_frame(DATA)
    assert frame.head.header == HEADER
    assert [bytes(view) for *_, view in frame.segments()] == SEGMENTS
    assert [(level, group, name) for level, group, name, _ in frame.segments()] == [
        (0, 0, "k.0"), (0, 0, "v.0"), (0, 1, "k.0"), (0, 1, "v.0"),
        (1, 0, "k.1"), (1, 1, "k.1"), (2, 0, "v.1"), (2, 1, "v.1"),
    ]  # fmt: skip


def test_the_golden_frame_is_written_again_byte_for_byte() -> None:
    assert (GOLDEN / "frame-v1.kvf").read_bytes() == DATA


def test_the_payload_is_aligned() -> None:
    assert len(FRAME.head.raw) % 64 == 0
    assert all(segment.offset % 16 == 0 for segment in FRAME.head.segments)


@pytest.mark.parametrize("cut", range(len(DATA)))
def test_only_ends_of_levels_are_ends_of_frames(cut: int) -> None:
    if cut in ENDS:
        read_both(DATA[:cut])
        assert parse_frame(DATA[:cut]).levels == ENDS.index(cut) + 1
    else:
        with pytest.raises(FrameError):
            read_both(DATA[:cut])


def test_a_truncated_frame_is_the_same_frame() -> None:
    for level in range(3):
        short = FRAME.truncated(level)
        assert data_of(short) == DATA[: ENDS[level]]
        assert short.id == FRAME.id
    assert FRAME.truncated(None) is FRAME
    assert FRAME.truncated(9) is FRAME


@pytest.mark.parametrize("position", range(len(DATA)))
def test_every_flipped_byte_is_found(position: int) -> None:
    damaged = bytearray(DATA)
    damaged[position] ^= 1 << random.Random(position).randrange(8)
    with pytest.raises(FrameError):
        read_both(bytes(damaged))


def test_bytes_behind_the_frame_are_damage() -> None:
    with pytest.raises(FrameCorruptError):
        read_both(DATA + b"\0")


@given(st.binary(max_size=200))
def test_garbage_is_no_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        read_both(data)
    with pytest.raises(FrameError):
        read_both(DATA[:40] + data)


@given(st.binary(max_size=300))
def test_garbage_is_no_header(text: bytes) -> None:
    with pytest.raises(FrameCorruptError):
        load_header(text)


def test_headers_of_one_layout_keep_their_own_keys() -> None:
    keys = [make_key(number) for number in range(3)]
    headers = [load_header(dump_header(replace(HEADER, key=key))) for key in keys]
    assert headers == [replace(HEADER, key=key) for key in keys]


@pytest.mark.parametrize(
    "more", [b'"digest":"%s",' % (b"0" * 64), b'"n\\u0061mespace":"%s",' % (b"0" * 32), b'"tokens":256,', b","]
)
def test_a_header_that_names_a_field_twice_is_none(more: bytes) -> None:
    text = dump_header(HEADER)
    assert load_header(text) == HEADER
    end = text.index(b'"tokens"')
    with pytest.raises(FrameCorruptError):
        load_header(text[:end] + more + text[end:])


def test_another_version_is_named() -> None:
    with pytest.raises(FrameVersionError, match="version 2"):
        parse_frame(DATA[:8] + b"\2\0" + DATA[10:])


def test_the_same_segments_under_another_key_do_not_pass() -> None:
    other = make_frame(make_key(2), (64,))
    mine = make_frame(KEY, (64,))
    with pytest.raises(FrameCorruptError):
        Frame(mine.head, other.payload).verify()
    with pytest.raises(LayoutMismatchError):
        other.verify(KEY)


def test_a_level_of_another_frame_of_the_same_key_does_not_pass() -> None:
    one, two = make_frame(KEY, (64, 64), seed=1), make_frame(KEY, (64, 64), seed=2)
    with pytest.raises(FrameCorruptError):
        Frame(one.head, (one.payload[0], two.payload[1])).verify()


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 5000])
def test_a_blob_is_a_frame_too(length: int) -> None:
    blob = random.Random(length).randbytes(length)
    buffer = memoryview(bytearray(padded_bytes(length)))
    buffer[:length] = blob
    frame = blob_frame(KEY, buffer, length)
    read_both(data_of(frame))
    found = blob_of(parse_frame(data_of(frame)))
    assert found is not None
    assert bytes(found) == blob
    assert blob_of(FRAME) is None


NAMES = st.from_regex(r"[a-z0-9_.-]{1,8}", fullmatch=True)


@st.composite
def frames(draw: st.DrawFn) -> tuple[Header, list[bytes]]:
    planes = draw(st.lists(st.lists(NAMES, min_size=1, max_size=3, unique=True), min_size=1, max_size=4))
    groups = draw(st.lists(st.integers(1, 80), min_size=1, max_size=3))
    errors = st.floats(0, 1e300, allow_nan=False)
    distortion = draw(st.dictionaries(NAMES, st.lists(errors, min_size=len(planes), max_size=len(planes)), max_size=2))
    header = Header(
        key=KEY,
        tokens=draw(st.integers(1, 65536)),
        first_position=draw(st.integers(0, 2**40)),
        groups=tuple(groups),
        planes=tuple(tuple(level) for level in planes),
        pipeline=({"stage": "test", "é": [1, 2.5, None, {"deep": "ü"}]},),
        distortion={name: tuple(values) for name, values in distortion.items()},
    )
    lengths = [st.binary(min_size=1 if level else 0, max_size=40) for level, n in enumerate(header.segment_counts()) for _ in range(n)]  # fmt: skip  # noqa: E501
    return header, [draw(length) for length in lengths]


@settings(max_examples=60)
@given(frames())
def test_any_frame_reads_back(frame: tuple[Header, list[bytes]]) -> None:
    header, segments = frame
    data = data_of(pack_frame(header, segments))
    read_both(data)
    assert parse_frame(data).head.header == header


@pytest.mark.parametrize("count", [7, 9])
def test_a_wrong_number_of_segments_is_our_mistake(count: int) -> None:
    with pytest.raises(ValueError, match="segments"):
        pack_frame(HEADER, [b"x"] * count)
