"""Writes golden files that are not there yet, and never over one that is: `python -m tests.make_golden`."""

import json
from pathlib import Path
from typing import Any

import torch

from kvstore.codecs.ref import rans
from kvstore.codecs.ref.classes import index_limit
from kvstore.codecs.ref.nested import coarser
from kvstore.frame import Frame, parse_frame
from tests.codec_cases import (
    NAMED_CASES,
    Artefacts,
    Case,
    case_of,
    joint_artefacts,
    planes_digest,
    quantised,
    separate_artefacts,
)

GOLDEN = Path(__file__).parent / "golden"
ARTEFACTS = {"artefact": separate_artefacts, "artefact-joint": joint_artefacts}
CALIBRATED_CASES = {"ladder-weighted": "artefact", "ladder-klt": "artefact", "ladder-tokens": "artefact-joint"}


def committed(file: str) -> dict[str, str]:
    """A committed JSON object: `artefacts` has digests of artefacts, `planes` those of decoded planes."""
    found: dict[str, str] = json.loads((GOLDEN / f"{file}.json").read_text())
    return found


def golden_artefacts(file: str) -> Artefacts:
    """A committed artefact under the digest that golden frames name."""
    return {committed("artefacts")[file]: (GOLDEN / f"{file}.safetensors").read_bytes()}


def golden_frame(name: str) -> Frame:
    """A committed frame."""
    return parse_frame(bytearray((GOLDEN / f"{name}-v1.kvf").read_bytes()))


def golden_case(name: str, dtype: str) -> Case:
    """How a golden frame was made."""
    file = CALIBRATED_CASES.get(name)
    return case_of(name, dtype, golden_artefacts(file) if file else None)


GOLDEN_CASES = [*NAMED_CASES, *((name, "bfloat16") for name in CALIBRATED_CASES)]


def rans_vector(seed: int, shape: tuple[int, int], classes: tuple[int, int], level: int, lanes: tuple[int, int]) -> Any:
    """A golden vector: indices within what their classes can code, and the states and words of all lanes."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randint(classes[0], classes[1] + 1, shape, generator=generator)
    limit = torch.tensor([[index_limit(int(x), level + 1) for x in row] for row in c])
    spread = torch.randn(shape, generator=generator) * 3.0 ** ((c - 9) / 5 + level)
    index = spread.round().clamp(-limit, limit).int()
    states, words = rans.encode(index, c, level, *lanes)
    return {
        "level": level,
        "lanes": list(lanes),
        "classes": c.tolist(),
        "index": index.tolist(),
        "parents": (coarser(index) if level else torch.zeros_like(index)).tolist(),
        "states": [f"{state:08x}" for state in states],
        "words": ["".join(f"{word:04x}" for word in lane) for lane in words],
    }


def main() -> None:
    """Write what is missing."""
    for file, make in ARTEFACTS.items():
        path = GOLDEN / f"{file}.safetensors"
        if not path.exists():
            ((digest, data),) = make().items()
            path.write_bytes(data)
            _add("artefacts", file, digest)
    for name, dtype in GOLDEN_CASES:
        case, file = golden_case(name, dtype), f"{name}-{dtype}"
        path = GOLDEN / f"{file}-v1.kvf"
        if not path.exists():
            path.write_bytes(b"".join(case.encode().buffers()))
        _add("planes", file, planes_digest(quantised(golden_frame(file), case)))
    path = GOLDEN / "rans.json"
    if not path.exists():
        vectors = [
            rans_vector(0, (7, 5), (-60, 52), 0, (1, 1)),
            rans_vector(1, (16, 12), (0, 12), 0, (4, 2)),
            rans_vector(2, (9, 20), (-8, 20), 1, (2, 4)),
            rans_vector(3, (5, 17), (-15, 9), 2, (8, 1)),
            rans_vector(4, (3, 33), (-20, 52), 3, (1, 16)),
        ]
        path.write_text("[\n" + ",\n".join(map(json.dumps, vectors)) + "\n]\n")


def _add(file: str, name: str, digest: str) -> None:
    """Add a digest to a committed JSON object, unless it has one of that name."""
    path = GOLDEN / f"{file}.json"
    known = committed(file) if path.exists() else {}
    path.write_text(json.dumps({name: digest, **known}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
