"""`kvstore inspect`: what a frame or a calibration artefact says of itself, as JSON and as tables.

Neither is decoded, so this needs no torch. Lengths that a file claims are compared with the file before they are used.
"""

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from kvstore.errors import ConfigError, KVStoreError
from kvstore.frame import MAGIC, VERSION, Frame, blob_of, padded_bytes, parse_frame
from kvstore.keys import split_key

Report = dict[str, Any]

_ARTEFACT_CARD = "kvstore_artefact"
_ARTEFACT_VERSION = 1
_ARTEFACT_HEADER_BYTES_MAX = 1 << 24
_LABELS = {"continuation_tokens": "continuation"}
"""Names that would leave no room for a digest on a line of 80."""
_AXES_MAX = 8
_SIZE_BYTES = 8
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def inspect_file(path: Path, *, segments: bool = False) -> Report:
    """Report on a file: `kind` is `frame` or `artefact`, the rest follows from it.

    Args:
        path: The file.
        segments: Whether a frame's report lists every segment.

    Raises:
        ConfigError: It cannot be read.
        FrameError: It is a damaged frame, or one of another version.
        KVStoreError: It is a damaged artefact, or something else.
    """
    try:
        with path.open("rb") as stream:
            # Nothing is read that is not looked at, and nothing is allocated, whatever the file says of itself.
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}") from exc
    view = memoryview(data)
    if bytes(view[: len(MAGIC)]) == MAGIC[: len(view)]:
        return frame_report(parse_frame(view), segments=segments)
    if bytes(view[8:9]) == b"{":
        return artefact_report(view)
    raise KVStoreError(f"{path} is neither a frame nor a calibration artefact")


def frame_report(frame: Frame, *, segments: bool = False) -> Report:
    """What a frame says of itself, once all that it holds was compared with its checksums.

    Raises:
        FrameCorruptError: A segment is not what its checksum says.
    """
    frame.verify()
    header = frame.head.header
    namespace, digest = split_key(frame.key)
    blob = None if header.tokens else blob_of(frame)
    report: Report = {
        "kind": "frame",
        "version": VERSION,
        "id": frame.id.hex(),
        "namespace": namespace.hex(),
        "digest": digest.hex(),
        "blob_bytes": None if blob is None else len(blob),
        "tokens": header.tokens,
        "first_position": header.first_position,
        "groups": list(header.groups),
        "pipeline": [dict(stage) for stage in header.pipeline],
        "artefacts": list(header.artefacts),
        "behind": None if header.behind is None else {"level": header.behind.level, "kl_nats": header.behind.kl_nats},
        "head_bytes": len(frame.head.raw),
        "size_bytes": frame.size_bytes,
        "whole_bytes": len(frame.head.raw) + sum(frame.head.level_bytes),
        "held_levels": frame.levels,
        "checksums": "verified",
        "levels": _levels(frame),
    }
    return report | ({"segments": _segments(frame)} if segments else {})


def _levels(frame: Frame) -> list[Report]:
    header, total = frame.head.header, sum(frame.head.level_bytes)
    found, end = [], len(frame.head.raw)
    for level, size_bytes in enumerate(frame.head.level_bytes):
        end += size_bytes
        errors = {name: errors[level] for name, errors in header.distortion.items()}
        found.append(
            {
                "level": level,
                "held": level < frame.levels,
                "planes": list(header.planes[level]),
                "segments": len(header.groups) * len(header.planes[level]),
                "size_bytes": size_bytes,
                "cumulative_bytes": end,
                "share": size_bytes / total if total else 0.0,
                "relative_squared_error": errors,
                "snr_db": {name: _decibels(error) for name, error in errors.items()},
            }
        )
    return found


def _decibels(relative_squared_error: float) -> float | None:
    """Signal-to-noise ratio; None where nothing was lost."""
    return -10 * math.log10(relative_squared_error) if relative_squared_error else None


def _segments(frame: Frame) -> list[Report]:
    header = frame.head.header
    places = [
        (level, group, name)
        for level, names in enumerate(header.planes)
        for group in range(len(header.groups))
        for name in names
    ]
    return [
        {
            "level": level,
            "held": level < frame.levels,
            "group": group,
            "plane": name,
            "offset": segment.offset,
            "size_bytes": segment.length,
            "padding_bytes": padded_bytes(segment.length) - segment.length,
            "checksum": f"{segment.checksum:016x}",
        }
        for (level, group, name), segment in zip(places, frame.head.segments, strict=True)
    ]


def artefact_report(data: memoryview) -> Report:
    """What a calibration artefact says of itself: its card and its tensors.

    Raises:
        KVStoreError: It is none, or damaged.
    """
    header, payload_bytes = _safetensors_header(data)
    metadata = header.pop("__metadata__", None)
    text = metadata.get(_ARTEFACT_CARD) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise KVStoreError("these safetensors have no card, so they are no calibration artefact")
    card = _json_object(text, "the card of the artefact")
    if card.get("version") != _ARTEFACT_VERSION:
        raise KVStoreError(f"artefact of version {card.get('version')!r}; this build knows {_ARTEFACT_VERSION}")
    return {
        "kind": "artefact",
        "digest": hashlib.sha256(data).hexdigest(),
        "size_bytes": len(data),
        "card": card,
        "pipelines": pipelines_for(card, header),
        "tensors": _tensors(header, payload_bytes),
    }


def pipelines_for(card: Mapping[str, Any], tensors: Iterable[str]) -> list[str]:
    """Calibrated pipelines that an artefact with these tensors was made for.

    Bases of what a prediction leaves over fit nothing else, and KVTC knows no metric.
    """
    names = set(tensors)
    basis = bool(names & {"kv.inverse.0", "k.inverse.0"})
    predicts = {"tokens", "k.predict.0"} <= names
    suits = {
        "ladder-weighted": {"probes", "k.mean", "k.weight", "k.spread"} <= names,
        "ladder-klt": basis and {"probes", "k.mean"} <= names and not predicts,
        "ladder-tokens": basis and "probes" in names and predicts,
        "kvtc": basis and "k.mean" in names and not predicts and card.get("metric") == "none",
    }
    return [name for name, fits in suits.items() if fits]


def _safetensors_header(data: memoryview) -> tuple[Report, int]:
    """The JSON header, and the bytes behind it."""
    if len(data) < _SIZE_BYTES:
        raise KVStoreError(f"{len(data)} bytes are too few for an artefact")
    size = struct.unpack_from("<Q", data)[0]
    if size > min(len(data) - 8, _ARTEFACT_HEADER_BYTES_MAX):
        raise KVStoreError(f"the artefact claims a header of {size} bytes; it is cut, or something else")
    return _json_object(bytes(data[8 : 8 + size]), "the header of the artefact"), len(data) - 8 - size


def _json_object(text: str | bytes, what: str) -> Report:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise KVStoreError(f"{what} is not JSON: {exc}") from exc
    if not isinstance(found, dict):
        raise KVStoreError(f"{what} is not a JSON object")
    return found


def _tensors(header: Mapping[str, Any], payload_bytes: int) -> list[Report]:
    """The tensors in the order of their bytes, which must be all that there is."""
    found, end = [], 0
    try:
        for name, spec in sorted(header.items(), key=lambda one: tuple(one[1]["data_offsets"])):
            start, stop = spec["data_offsets"]
            size_bytes = math.prod(spec["shape"][:_AXES_MAX]) * _ITEM_BYTES[spec["dtype"]]
            if len(spec["shape"]) > _AXES_MAX or start != end or stop != start + size_bytes:
                raise KVStoreError(f"tensor {name!r} does not have the bytes that it claims")
            found.append({"name": name, "dtype": spec["dtype"], "shape": list(spec["shape"]), "size_bytes": size_bytes})
            end = stop
    except (KeyError, TypeError, ValueError) as exc:
        raise KVStoreError(f"the header of the artefact does not describe tensors: {exc!r}") from exc
    if end != payload_bytes:
        raise KVStoreError(f"the tensors end at {end}, the artefact at {payload_bytes}")
    return found


def tables(report: Report) -> list[Table]:
    """A report for people."""
    if report["kind"] == "artefact":
        return [artefact_table(report), _tensor_table(report["tensors"])]
    found = [_frame_table(report), _level_table(report)]
    return [*found, _segment_table(report)] if "segments" in report else found


def _frame_table(report: Report) -> Table:
    table = _facts()
    _add(table, "frame", report["id"])
    _add(table, "key", f"{report['namespace']}\n{report['digest']}")
    if report["blob_bytes"] is None:
        first = report["first_position"]
        _add(table, "tokens", f"{report['tokens']:,} at positions {first:,} to {first + report['tokens'] - 1:,}")
        groups = report["groups"]
        _add(table, "layers", f"{sum(groups):,} in groups of {_runs(groups)}")
        _add(table, "pipeline", "\n".join(_stage_text(stage) for stage in report["pipeline"]))
    else:
        _add(table, "opaque blob", f"{report['blob_bytes']:,} bytes")
    for number, digest in enumerate(report["artefacts"]):
        _add(table, f"artefact {number}", digest)
    if report["behind"]:
        behind = report["behind"]
        _add(table, "behind", f"inexact: on a prefix of level {behind['level']}, up to {behind['kl_nats']:g} nats")
    held, levels = report["held_levels"], len(report["levels"])
    cut = "" if held == levels else f"; cut from {report['whole_bytes']:,} bytes with {levels} levels"
    _add(table, "bytes", f"{report['size_bytes']:,}, {report['head_bytes']:,} of them the head{cut}")
    _add(table, "checksums", "verified: head and every segment that is here")
    return table


def _level_table(report: Report) -> Table:
    lossy = list(report["levels"][0]["relative_squared_error"])
    headings = ["level", "segments", "bytes", "up to here", "share"]
    table = _figures([*headings, *(f"{name} {what}" for name in lossy for what in ("error", "dB"))])
    if lossy:
        table.caption = "up to here: with the head and all levels below; error: relative and squared"
    for level in report["levels"]:
        row = [
            str(level["level"]) + ("" if level["held"] else " (not here)"),
            f"{level['segments']:,}",
            f"{level['size_bytes']:,}",
            f"{level['cumulative_bytes']:,}",
            f"{level['share']:.1%}",
        ]
        for name in lossy:
            snr_db = level["snr_db"][name]
            row += [f"{level['relative_squared_error'][name]:.2g}", "exact" if snr_db is None else f"{snr_db:.1f}"]
        table.add_row(*row)
    return table


def _segment_table(report: Report) -> Table:
    table = _figures(["level", "group", "plane", "offset", "bytes", "padding", "xxh3-64"])
    for segment in report["segments"]:
        table.add_row(
            str(segment["level"]) + ("" if segment["held"] else " (not here)"),
            str(segment["group"]),
            segment["plane"],
            f"{segment['offset']:,}",
            f"{segment['size_bytes']:,}",
            str(segment["padding_bytes"]),
            segment["checksum"],
        )
    return table


def artefact_table(report: Report) -> Table:
    """An artefact's card, its digest, and what can use it."""
    table = _facts()
    _add(table, "artefact", report["digest"])
    _add(table, "bytes", f"{report['size_bytes']:,}")
    _add(table, "pipelines", ", ".join(report["pipelines"]) or "none")
    for name, value in report["card"].items():
        if name != "version":
            _add(table, _LABELS.get(name, name.replace("_", " ")), _value_text(value))
    return table


def _tensor_table(tensors: Sequence[Report]) -> Table:
    """Tensors that differ in their layer alone are one row."""
    alike: dict[tuple[str, str, str], list[int]] = {}
    for tensor in tensors:
        stem, _, last = tensor["name"].rpartition(".")
        name = f"{stem}.LAYER" if last.isdigit() else tensor["name"]
        alike.setdefault((name, tensor["dtype"], str(tensor["shape"])), []).append(tensor["size_bytes"])
    table = _figures(["tensor", "dtype", "shape", "number", "bytes"])
    for (name, dtype, shape), sizes in sorted(alike.items()):
        table.add_row(Text(_value_text(name)), dtype, Text(shape), str(len(sizes)), f"{sum(sizes):,}")
    return table


def _facts() -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    return table


def _figures(headings: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _add(table: Table, name: str, value: str) -> None:
    # Text is never read as markup.
    table.add_row(Text(_printable(name)), Text("\n".join(_printable(line) for line in value.split("\n"))))


def _stage_text(stage: Mapping[str, Any]) -> str:
    options = [f"{name}={json.dumps(value)}" for name, value in stage.items() if name != "stage"]
    return " ".join([stage["stage"], *options])


def _value_text(value: object) -> str:
    """A value of a card, on one line."""
    if isinstance(value, str):
        return _printable(value)
    if isinstance(value, list):
        return ", ".join(_value_text(one) for one in value)
    return json.dumps(value)


def _printable(text: str) -> str:
    """Text that cannot steer a terminal."""
    return text if text.isprintable() else json.dumps(text)


def _runs(groups: Sequence[int]) -> str:
    """`3, 3, 3, 1` as `3 (3 times), 1`."""
    runs: list[list[int]] = []
    for layers in groups:
        if runs and runs[-1][0] == layers:
            runs[-1][1] += 1
        else:
            runs.append([layers, 1])
    return ", ".join(f"{layers:,}" + (f" ({times:,} times)" if times > 1 else "") for layers, times in runs)
