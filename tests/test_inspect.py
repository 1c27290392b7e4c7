"""`kvstore inspect`: what it shows of frames and artefacts, and what it says of everything else."""

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli import main
from kvstore.frame import Frame, blob_frame, pack_frame, padded_bytes
from kvstore.header import Behind, Header
from kvstore.inspection import pipelines_for
from kvstore.keys import ChunkKey, chunk_key
from tests.frames import frame_bytes

KEY: ChunkKey = chunk_key(bytes(16), bytes(range(32)))
GOLDEN = Path(__file__).parent / "golden"
ESCAPE = "\x1b[31m"


def frame(**fields: Any) -> Frame:
    """Two groups; two planes at level 0, one at level 1."""
    defaults: dict[str, Any] = {
        "key": KEY,
        "tokens": 16,
        "first_position": 32,
        "groups": (2, 1),
        "planes": (("k.0", "v.0"), ("k.1",)),
        "pipeline": ({"stage": "nested", "levels": 2}, {"stage": "klt", "artefact": 0}),
        "artefacts": ("ab" * 32,),
        "distortion": {"k": (0.1, 0.01), "v": (0.5, 0.0)},
        "behind": Behind(1, 0.25),
    }
    return pack_frame(Header(**defaults | fields), [bytes([n + 1]) * (10 * n + 5) for n in range(6)])


def saved(folder: Path, data: bytes) -> Path:
    path = folder / "file"
    path.write_bytes(data)
    return path


def report(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def text(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["inspect", str(path), *flags]) == 0
    return capsys.readouterr().out


def refusal(path: Path, capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    for flags in ([], ["--json"], ["--segments"]):
        assert main(["inspect", str(path), *flags]) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("kvstore: ")
    return err


def artefact_bytes(card: object = None, header: dict[str, Any] | None = None, payload: bytes = bytes(24)) -> bytes:
    """Safetensors without safetensors: two tensors of 16 and 8 bytes."""
    card = {"version": 1, "model": "tiny", "texts": ["a.txt", "b.txt"], "tokens": 7} if card is None else card
    tensors = {
        "k.mean": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "k.sigma.0": {"dtype": "I16", "shape": [2], "data_offsets": [16, 20]},
        "k.sigma.1": {"dtype": "I16", "shape": [2], "data_offsets": [20, 24]},
    }
    fields = {"__metadata__": {"kvstore_artefact": json.dumps(card)}, **tensors} if header is None else header
    head = json.dumps(fields).encode()
    return struct.pack("<Q", len(head)) + head + payload


def test_a_frame_is_shown_level_by_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = frame()
    found = report(saved(tmp_path, frame_bytes(whole)), capsys)
    assert (found["kind"], found["id"], found["checksums"]) == ("frame", whole.id.hex(), "verified")
    assert (found["namespace"] + found["digest"], found["tokens"], found["first_position"]) == (KEY.hex(), 16, 32)
    assert (found["groups"], found["artefacts"]) == ([2, 1], ["ab" * 32])
    assert found["pipeline"] == [{"stage": "nested", "levels": 2}, {"stage": "klt", "artefact": 0}]
    assert found["behind"] == {"level": 1, "kl_nats": 0.25}
    assert found["size_bytes"] == found["whole_bytes"] == whole.size_bytes
    base, fine = found["levels"]
    assert (base["segments"], base["planes"], fine["segments"]) == (4, ["k.0", "v.0"], 2)
    assert base["cumulative_bytes"] == found["head_bytes"] + base["size_bytes"]
    assert fine["cumulative_bytes"] == whole.size_bytes
    assert base["share"] + fine["share"] == pytest.approx(1)
    assert base["relative_squared_error"] == {"k": 0.1, "v": 0.5}
    assert base["snr_db"] == pytest.approx({"k": 10.0, "v": 3.0103})
    assert fine["snr_db"]["v"] is None, "nothing was lost"


def test_people_get_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, frame_bytes(frame()))
    shown = text(path, capsys)
    for word in (KEY.hex()[:32], KEY.hex()[32:], "ab" * 32, "levels=2", "32 to 47", "2, 1", "0.25 nats", "verified"):
        assert word in shown, word
    assert "exact" in shown
    assert "xxh3-64" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    segments = text(path, capsys, "--segments")
    assert f"{frame().head.segments[5].checksum:016x}" in segments


def test_segments_are_listed_where_they_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, frame_bytes(frame()))
    assert "segments" not in report(path, capsys)
    segments = report(path, capsys, "--segments")["segments"]
    assert [(one["level"], one["group"], one["plane"]) for one in segments] == [
        (0, 0, "k.0"),
        (0, 0, "v.0"),
        (0, 1, "k.0"),
        (0, 1, "v.0"),
        (1, 0, "k.1"),
        (1, 1, "k.1"),
    ]
    assert [one["size_bytes"] for one in segments] == [10 * n + 5 for n in range(6)]
    assert all((one["size_bytes"] + one["padding_bytes"]) % 16 == 0 for one in segments)


def test_a_cut_frame_is_shown_with_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, frame_bytes(frame().truncated(0)))
    found = report(path, capsys, "--segments")
    assert (found["held_levels"], [level["held"] for level in found["levels"]]) == (1, [True, False])
    assert found["size_bytes"] == found["levels"][0]["cumulative_bytes"] < found["whole_bytes"] == frame().size_bytes
    assert [one["held"] for one in found["segments"]] == [True] * 4 + [False] * 2
    shown = text(path, capsys)
    assert "cut from" in shown
    assert "not here" in shown


def test_a_blob_is_shown_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for length in (0, 100):
        blob = blob_frame(KEY, memoryview(bytearray(padded_bytes(length))), length)
        path = saved(tmp_path, frame_bytes(blob))
        found = report(path, capsys)
        assert (found["blob_bytes"], found["tokens"], found["pipeline"]) == (length, 0, [{"stage": "blob"}])
        assert f"{length} bytes" in text(path, capsys, "--segments")


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.kvf")), ids=lambda path: path.stem)
def test_golden_frames_are_shown(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(path, capsys)["size_bytes"] == path.stat().st_size
    assert text(path, capsys)


def test_every_flipped_byte_and_every_cut_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = frame_bytes(frame())
    whole = {frame().truncated(level).size_bytes for level in (0, 1)}
    for at in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        assert main(["inspect", str(saved(tmp_path, bytes(damaged)))]) == 1, at
    for length in range(1, len(data)):
        if length not in whole:
            assert main(["inspect", str(saved(tmp_path, data[:length]))]) == 1, length
    assert capsys.readouterr().out == ""


def test_another_version_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray(frame_bytes(frame()))
    data[8] = 9
    assert "version 9" in refusal(saved(tmp_path, bytes(data)), capsys)


def test_text_of_a_header_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = {"stage": "x", f"a{ESCAPE}": f"{ESCAPE}[bold]", "b": "[/red]"}
    shown = text(saved(tmp_path, frame_bytes(frame(pipeline=(stage,)))), capsys)
    assert "\x1b" not in shown
    assert "[/red]" in shown, "nothing is read as markup"


def test_an_artefact_shows_its_card_and_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, artefact_bytes())
    found = report(path, capsys)
    assert (found["kind"], found["card"]["model"], found["pipelines"]) == ("artefact", "tiny", [])
    assert [(one["name"], one["shape"], one["size_bytes"]) for one in found["tensors"]] == [
        ("k.mean", [2, 2], 16),
        ("k.sigma.0", [2], 4),
        ("k.sigma.1", [2], 4),
    ]
    shown = text(path, capsys)
    for word in (found["digest"], "tiny", "a.txt, b.txt", "k.sigma.LAYER", "none"):
        assert word in shown, word
    escaping = text(saved(tmp_path, artefact_bytes({"version": 1, "model": ESCAPE, ESCAPE: 1})), capsys)
    assert "\x1b" not in escaping


def test_pipelines_follow_from_the_tensors() -> None:
    plain = ["probes", "k.mean", "k.weight", "k.spread", "kv.inverse.0"]
    predicting = [*plain, "tokens", "k.predict.0"]
    assert pipelines_for({"metric": "fisher"}, plain) == ["ladder-weighted", "ladder-klt"]
    assert pipelines_for({"metric": "none"}, plain) == ["ladder-weighted", "ladder-klt", "kvtc"]
    assert pipelines_for({"metric": "none"}, predicting) == ["ladder-weighted", "ladder-tokens"]
    assert pipelines_for({}, ["probes"]) == []


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
CARD = {"kvstore_artefact": '{"version": 1}'}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (artefact_bytes({"version": 2}), "version 2"),
        (artefact_bytes([]), "not a JSON object"),
        (artefact_bytes(header={"__metadata__": {"kvstore_artefact": "{"}}), "not JSON"),
        (artefact_bytes(header={"__metadata__": {}, "k": TENSOR}, payload=bytes(8)), "no card"),
        (artefact_bytes(header={"k": TENSOR}, payload=bytes(8)), "no card"),
        (artefact_bytes(payload=bytes(23)), "the artefact at 23"),
        (artefact_bytes(payload=bytes(25)), "the artefact at 25"),
        (artefact_bytes()[:40], "cut"),
        (struct.pack("<Q", 1 << 60) + b"{}", "cut"),
        (struct.pack("<Q", 3) + b"{]}", "not JSON"),
        (struct.pack("<Q", 90_000) + b'{"a":' + b"[" * 89_995, "not JSON"),
        (artefact_bytes(header={"__metadata__": CARD, "k": {**TENSOR, "shape": [3]}}, payload=bytes(8)), "claims"),
        (artefact_bytes(header={"__metadata__": CARD, "k": {**TENSOR, "shape": [1] * 9}}, payload=bytes(8)), "claims"),
        (artefact_bytes(header={"__metadata__": CARD, "k": {**TENSOR, "data_offsets": [8, 16]}}), "claims"),
        (artefact_bytes(header={"__metadata__": CARD, "k": {**TENSOR, "dtype": "F9"}}), "F9"),
        (artefact_bytes(header={"__metadata__": CARD, "k": {**TENSOR, "data_offsets": 5}}), "describe"),
        (artefact_bytes(header={"__metadata__": CARD, "k": []}), "describe"),
        (b"hello, world", "neither"),
        (b"h", "neither"),
        (b"\x89KVF", "at least 40 bytes"),
    ],
)
def test_what_is_no_artefact_is_named(
    data: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(saved(tmp_path, data), capsys)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no-such" in refusal(tmp_path / "no-such", capsys, status=2)
    assert "cannot read" in refusal(tmp_path, capsys, status=2)
    assert "cannot read" in refusal(saved(tmp_path, b""), capsys, status=2)


def test_inspecting_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from kvstore.cli import main; main(['inspect', sys.argv[1]]); "
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    for data in (frame_bytes(frame()), artefact_bytes()):
        path = saved(tmp_path, data)
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)
