"""Between planes and frames: run a pipeline on every layer group, and lay its planes out level by level."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from kvstore.codecs.context import Context, known_planes, known_specs, of_group, written_planes
from kvstore.codecs.importance import token_importance
from kvstore.codecs.pipeline import Pipeline, build_pipeline
from kvstore.codecs.stage import TORCH_DTYPES, Planes, Specs, base_planes, is_context
from kvstore.errors import FrameCorruptError, LayoutMismatchError, PipelineError
from kvstore.frame import Frame, Head, pack_frame
from kvstore.header import Header, StageSpec
from kvstore.keys import ChunkKey, namespace_of, split_key
from kvstore.layout import Layout

GROUP_BYTES_MIN = 1 << 20
"""A layer group has at least this many uncompressed bytes, so that small models do not drown in segments."""


_NO_CONTEXT = Context()


def encode(
    planes: Planes, layout: Layout, pipeline: Pipeline, *, key: ChunkKey, context: Context = _NO_CONTEXT
) -> Frame:
    """Encode one chunk.

    Args:
        planes: The planes of the layout, `[layers, tokens, kv_heads, head_dim]` each, on the CPU.
        layout: What they are.
        pipeline: How to encode them.
        key: Key of the chunk.
        context: What else is known about it.

    Raises:
        PipelineError: The planes do not fit the layout, the pipeline does not fit the planes, or a value cannot be
            encoded.
    """
    return _encode(planes, layout, pipeline, key, context, keep=False)[0]


def encode_levels(
    planes: Planes, layout: Layout, pipeline: Pipeline, *, key: ChunkKey, context: Context = _NO_CONTEXT
) -> tuple[Frame, list[dict[str, torch.Tensor]]]:
    """`encode`, and what `decode` makes of each level of the frame: to measure distortion, that is known anyway."""
    frame, found = _encode(planes, layout, pipeline, key, context, keep=True)
    return frame, [{name: torch.cat([part[name] for part in parts]) for name in layout.planes} for parts in found]


def _encode(
    planes: Planes, layout: Layout, pipeline: Pipeline, key: ChunkKey, context: Context, *, keep: bool
) -> tuple[Frame, list[list[Planes]]]:
    """The frame, and with `keep`, by level, the decoded planes of every layer group."""
    _check_planes(planes, layout)
    groups = _groups(layout, pipeline, context.group_layers)
    names = _planes_by_level(pipeline, known_specs(layout, groups[0]))
    if pipeline.importance is not None and context.importance is None:
        # Less is known within a chunk than over the whole prefix, but half the gain is here.
        estimate = token_importance(planes["k"], layout, pipeline.importance, context.first_position)
        context = replace(context, importance=estimate)
    known = known_planes(layout, context.first_position, context.token_ids)
    chunk = {**planes, **known, **written_planes(context)}
    lossy, coder = pipeline.split()
    parts = [(known_specs(layout, layers), part) for layers, part in _parts(chunk, groups)]
    quantised = [lossy.encode(part, specs) for specs, part in parts]
    coded = [
        coder.encode({**found, **lossy.announce(specs, _context(part))}, lossy.infer(specs))
        for (specs, part), found in zip(parts, quantised, strict=True)
    ]
    kept = [[exact for _, exact in parts]] if keep else []
    distortion = {}
    if not pipeline.lossless:
        # One level at a time, where nobody wants them: of a large model each takes what the chunk does.
        levels = _decoded(lossy, parts, quantised, len(names))
        kept = list(levels) if keep else []
        distortion = _distortion(parts, kept or levels)
    artefacts = pipeline.artefacts
    header = Header(
        key=key,
        tokens=layout.chunk_tokens,
        first_position=context.first_position,
        groups=groups,
        planes=names,
        pipeline=_numbered(pipeline.spec, artefacts),
        artefacts=artefacts,
        distortion=distortion,
    )
    frame = pack_frame(
        header, [part[name].contiguous().numpy().data for level in names for part in coded for name in level]
    )
    return frame, kept


def decode(
    frame: Frame,
    layout: Layout,
    artefacts: Mapping[str, bytes] | None = None,
    *,
    key: ChunkKey,
    token_ids: Sequence[int] = (),
    out: Planes | None = None,
) -> Planes:
    """Decode one chunk at the quality of the levels that its frame holds.

    The sizes of everything come from `layout`; what the frame says is only compared with them.

    Args:
        frame: A verified frame.
        layout: The caller's layout.
        artefacts: Calibration artefacts by digest.
        key: The key that the caller asked for.
        token_ids: Token ids of the prompt up to the chunk's last one, for pipelines that predict from them.
        out: Where to write, `[layers, tokens, kv_heads, head_dim]` a plane; new tensors by default.

    Raises:
        LayoutMismatchError: The frame belongs to another key or layout.
        FrameCorruptError: Its planes are not those that its pipeline makes.
        PipelineError: A stage or a calibration artefact that it needs is unknown.
    """
    planes = _empty(layout) if out is None else out
    decoding = Decoding(frame.head, layout, artefacts, key=key, token_ids=token_ids, out=planes)
    for group, coded in enumerate(by_group(frame)):
        decoding.decode(group, coded)
    return planes


def by_group(frame: Frame) -> list[dict[str, memoryview]]:
    """The held coded planes of every layer group, by name."""
    groups: list[dict[str, memoryview]] = [{} for _ in frame.head.header.groups]
    for _, group, name, view in frame.segments():
        groups[group][name] = view
    return groups


class Decoding:
    """One chunk that is decoded layer group by layer group, as they arrive.

    Args:
        head: Head of the chunk's frame.
        layout: The caller's layout.
        artefacts: Calibration artefacts by digest.
        key: The key that the caller asked for.
        token_ids: Token ids of the prompt up to the chunk's last one.
        out: Where to write, `[layers, tokens, kv_heads, head_dim]` a plane.

    Raises:
        LayoutMismatchError: The frame belongs to another key or layout.
        FrameCorruptError: Its planes are not those that its pipeline makes.
        PipelineError: A stage or a calibration artefact that it needs is unknown.
    """

    def __init__(
        self,
        head: Head,
        layout: Layout,
        artefacts: Mapping[str, bytes] | None = None,
        *,
        key: ChunkKey,
        token_ids: Sequence[int] = (),
        out: Planes,
    ) -> None:
        header = head.header
        _check_identity(header, layout, key)
        missing = [digest for digest in header.artefacts if digest not in (artefacts or {})]
        if missing:
            raise PipelineError(f"decoding needs the calibration artefact {missing[0]}, which is not here")
        self._pipeline = build_pipeline(_named(header.pipeline, header.artefacts), artefacts)
        self._layout = layout
        self._groups = header.groups
        self._known = known_planes(layout, header.first_position, token_ids)
        self._out = out
        _check_planes_made(header, self._pipeline, layout)

    def decode(self, group: int, coded: Mapping[str, memoryview]) -> None:
        """Decode a layer group, at the quality of the levels whose planes are given.

        Raises:
            FrameCorruptError: A plane is not as long as the pipeline makes it.
        """
        start, layers = sum(self._groups[:group]), self._groups[group]
        specs = known_specs(self._layout, layers)
        part = _tensors(coded, self._pipeline.infer(specs))
        context = of_group(self._known, start, layers)
        for name, decoded in self._pipeline.decode({**part, **context}, specs).items():
            self._out[name][start : start + layers].copy_(decoded)


def _numbered(spec: Sequence[StageSpec], artefacts: Sequence[str]) -> tuple[StageSpec, ...]:
    """A header names every artefact once; its stages say which by number."""
    return tuple(
        {**stage, "artefact": artefacts.index(stage["artefact"])} if "artefact" in stage else stage for stage in spec
    )


def _named(spec: Sequence[StageSpec], artefacts: Sequence[str]) -> list[StageSpec]:
    """Undo `_numbered`."""
    found: list[StageSpec] = []
    for stage in spec:
        number = stage.get("artefact")
        if number is None:
            found.append(stage)
        elif type(number) is int and 0 <= number < len(artefacts):
            found.append({**stage, "artefact": artefacts[number]})
        else:
            raise FrameCorruptError(f"stage {stage['stage']!r} names artefact {number!r} of {len(artefacts)}")
    return found


def _check_planes(planes: Planes, layout: Layout) -> None:
    if planes.keys() != layout.planes.keys():
        raise PipelineError(f"the layout has the planes {sorted(layout.planes)}, not {sorted(planes)}")
    for name, spec in layout.planes.items():
        plane = planes[name]
        if tuple(plane.shape) != spec.shape or plane.dtype != TORCH_DTYPES[spec.dtype]:
            raise PipelineError(
                f"plane {name!r} is {plane.dtype}{list(plane.shape)}, the layout says {spec.dtype}{list(spec.shape)}"
            )


def _check_identity(header: Header, layout: Layout, key: ChunkKey) -> None:
    if header.key != key or split_key(key)[0] != namespace_of(layout):
        raise LayoutMismatchError("the frame belongs to another key or layout")
    if header.tokens != layout.chunk_tokens or sum(header.groups) != layout.layers:
        raise LayoutMismatchError(
            f"the frame has {header.tokens} tokens and {sum(header.groups)} layers, "
            f"the layout {layout.chunk_tokens} and {layout.layers}"
        )


def _groups(layout: Layout, pipeline: Pipeline, group_layers: int) -> tuple[int, ...]:
    """Layers in each layer group; only the last group may be smaller."""
    layer_bytes = layout.chunk_bytes // layout.layers
    layers = group_layers or pipeline.group_layers or max(1, -(-GROUP_BYTES_MIN // layer_bytes))
    full, rest = divmod(layout.layers, min(layers, layout.layers))
    return (min(layers, layout.layers),) * full + ((rest,) if rest else ())


def _parts(chunk: Planes, groups: Sequence[int]) -> Iterator[tuple[int, Planes]]:
    """Every layer group's layers and planes, with their context."""
    start = 0
    for layers in groups:
        planes = {name: x[start : start + layers] for name, x in chunk.items() if not is_context(name)}
        yield layers, {**planes, **of_group(_context(chunk), start, layers)}
        start += layers


def _planes_by_level(pipeline: Pipeline, specs: Specs) -> tuple[tuple[str, ...], ...]:
    """Names of the coded planes of every level, in the order in which the pipeline makes them."""
    coded = {name: spec for name, spec in pipeline.infer(specs).items() if not is_context(name)}
    for name, spec in coded.items():
        if spec.dtype != "uint8" or len(spec.shape) != 1:
            raise PipelineError(f"plane {name!r} does not end as bytes; end the pipeline with the stage 'raw'")
    levels = max(spec.level or 0 for spec in coded.values()) + 1
    return tuple(tuple(name for name, spec in coded.items() if (spec.level or 0) == level) for level in range(levels))


def _coded_parts(frame: Frame, pipeline: Pipeline, layout: Layout) -> list[dict[str, torch.Tensor]]:
    """The held coded planes of every layer group, compared with what the pipeline makes of this layout."""
    header = frame.head.header
    _check_planes_made(header, pipeline, layout)
    return [
        _tensors(coded, pipeline.infer(known_specs(layout, layers)))
        for layers, coded in zip(header.groups, by_group(frame), strict=True)
    ]


def _check_planes_made(header: Header, pipeline: Pipeline, layout: Layout) -> None:
    if _planes_by_level(pipeline, known_specs(layout, header.groups[0])) != header.planes:
        raise FrameCorruptError("the frame's planes are not those that its pipeline makes")


def _tensors(coded: Mapping[str, memoryview], expected: Specs) -> dict[str, torch.Tensor]:
    """Coded planes of a layer group, compared with what the pipeline makes of this layout."""
    for name, view in coded.items():
        spec = expected[name]
        if len(view) > spec.size_bytes or (len(view) < spec.size_bytes and not spec.at_most):
            bound = "at most " if spec.at_most else ""
            raise FrameCorruptError(
                f"plane {name!r} has {len(view)} bytes, its pipeline makes {bound}{spec.size_bytes}"
            )
    return {name: _tensor(view) for name, view in coded.items()}


def _tensor(view: memoryview) -> torch.Tensor:
    if not len(view):
        return torch.empty(0, dtype=torch.uint8)
    # torch refuses to share memory that it might write to.
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)


def _empty(layout: Layout) -> dict[str, torch.Tensor]:
    return {name: torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype]) for name, spec in layout.planes.items()}


def _context(planes: Planes) -> Planes:
    return {name: x for name, x in planes.items() if is_context(name)}


def _decoded(
    lossy: Pipeline, parts: Sequence[tuple[Specs, Planes]], quantised: Sequence[Planes], levels: int
) -> Iterator[list[Planes]]:
    """Level by level, the decoded planes of every layer group.

    Coders behind the last lossy stage change nothing, so they are not undone for it.
    """
    made = [lossy.infer(specs) for specs, _ in parts]
    for level in range(levels):
        decoded: list[Planes] = []
        for (specs, exact), inferred, coded in zip(parts, made, quantised, strict=True):
            kept = {name: x for name, x in coded.items() if (inferred[name].level or 0) <= level}
            planes = lossy.decode({**kept, **_context(exact)}, specs)
            decoded.append({name: planes[name].to(exact[name].dtype) for name in base_planes(specs)})
        yield decoded


def _distortion(
    parts: Sequence[tuple[Specs, Planes]], levels: Iterable[Sequence[Planes]]
) -> dict[str, tuple[float, ...]]:
    """Relative squared error of every plane after each level: sum of (x - decoded)^2 over sum of x^2."""
    names = base_planes(parts[0][0])
    # Nothing is relative to zero: of a plane of zeros it is the mean squared error.
    unit = {
        name: sum(_squares(part[name].float()) for _, part in parts) or sum(part[name].numel() for _, part in parts)
        for name in names
    }
    errors: dict[str, list[float]] = {name: [] for name in names}
    for decoded in levels:
        for name in names:
            pairs = [(exact[name], found[name]) for (_, exact), found in zip(parts, decoded, strict=True)]
            relative = sum(_squares(exact.float() - found.float()) for exact, found in pairs) / unit[name]
            if not math.isfinite(relative):
                raise PipelineError(f"plane {name!r} has values too large for float32 arithmetic; use 'raw'")
            errors[name].append(float(f"{relative:.6g}"))
    return {name: tuple(values) for name, values in errors.items()}


def _squares(x: torch.Tensor) -> float:
    return float(x.double().square().sum())
