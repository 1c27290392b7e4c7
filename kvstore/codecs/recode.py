"""Exact re-coding: the same numbers of a frame under other entropy coders, for a tier that wants fewer bytes or speed.

Nothing lossy happens: the coders at the end of the frame's pipeline are undone, those of another pipeline are applied,
and all stages in front of them must be the same. Key, position, levels, layer groups, artefacts and distortion stay;
the id is another one, so a store takes the result for another frame. Only whole frames can be re-coded: a head names
the checksums of all levels, also of those that are not there.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from kvstore.codecs.ans import Ans
from kvstore.codecs.coding import _check_identity, _coded_parts, _named, _numbered, _planes_by_level
from kvstore.codecs.context import known_planes, known_specs, of_group
from kvstore.codecs.exponent import Exponent
from kvstore.codecs.pack import Pack
from kvstore.codecs.pipeline import Pipeline, build_pipeline
from kvstore.codecs.rans import Rans
from kvstore.codecs.raw import Raw
from kvstore.codecs.stage import Planes
from kvstore.codecs.zstd import Zstd
from kvstore.errors import FrameError, PipelineError
from kvstore.frame import Frame, pack_frame
from kvstore.layout import Layout

CODERS = (Rans, Pack, Ans, Exponent, Zstd, Raw)
"""Stages whose decoding gives back every bit, and which need nothing but the planes for encoding them again."""


def recode(frame: Frame, pipeline: Pipeline, layout: Layout) -> Frame:
    """The same numbers as a pipeline with other coders would have written them.

    `recode(recode(frame, other, layout), own, layout)` has the id of the frame, if it was made by `own` in this build.

    Args:
        frame: A verified frame with all of its levels.
        pipeline: The frame's own but for the coders at its end.
        layout: The frame's layout.

    Returns:
        The frame itself where its pipeline is this one already.

    Raises:
        PipelineError: The pipelines differ in more than their coders, levels of the frame are missing, or the layout
            does not fit the pipeline.
        LayoutMismatchError: The frame belongs to another layout.
        FrameCorruptError: Its planes are not those that its pipeline makes.
    """
    _check_identity(frame.head.header, layout, frame.key)
    header = frame.head.header
    if _named(header.pipeline, header.artefacts) == list(pipeline.spec):
        return frame
    if not frame.whole:
        raise PipelineError(f"re-coding needs all {header.levels} levels of a frame, {frame.levels} are here")
    shared, before, after = _split(frame, pipeline)
    names = _planes_by_level(pipeline, known_specs(layout, header.groups[0]))
    if len(names) != header.levels:
        raise PipelineError(f"the frame has {header.levels} levels, the pipeline makes {len(names)}")
    known = known_planes(layout, header.first_position)
    coded: list[Planes] = []
    start = 0
    for layers, part in zip(
        header.groups, _coded_parts(frame, Pipeline(shared.stages + before.stages), layout), strict=True
    ):
        specs = known_specs(layout, layers)
        context = shared.announce(specs, of_group(known, start, layers))
        between = shared.infer(specs)
        numbers = before.decode({**part, **context}, between)
        coded.append(after.encode({**numbers, **context}, between))
        start += layers
    new = replace(header, planes=names, pipeline=_numbered(pipeline.spec, header.artefacts))
    return pack_frame(
        new, [part[name].contiguous().numpy().data for level in names for part in coded for name in level]
    )


def recoder(by_tier: Mapping[str, Pipeline], layout: Layout) -> Callable[[Frame, str], Frame]:
    """What a stack asks before it puts a frame into a tier.

    Args:
        by_tier: The pipeline with whose coders frames shall lie in a tier, by the tier's name.
        layout: The layout of the frames; others are left alone.

    Returns:
        A function of a frame and the name of a tier. It gives back the frame itself where there is nothing to re-code
        or it cannot be done exactly: another layout, other stages, levels that are missing.
    """

    def recoded(frame: Frame, tier: str) -> Frame:
        pipeline = by_tier.get(tier)
        if pipeline is None:
            return frame
        try:
            return recode(frame, pipeline, layout)
        except (PipelineError, FrameError):
            return frame

    return recoded


def _split(frame: Frame, pipeline: Pipeline) -> tuple[Pipeline, Pipeline, Pipeline]:
    """The stages that frame and pipeline share, and the coders behind them: the frame's and the pipeline's."""
    header = frame.head.header
    own = [dict(stage) for stage in _named(header.pipeline, header.artefacts)]
    other = [dict(stage) for stage in pipeline.spec]
    same = next(
        (n for n, (one, two) in enumerate(zip(own, other, strict=False)) if one != two), min(len(own), len(other))
    )
    names = {coder.name for coder in CODERS}
    for stage in [*own[same:], *other[same:]]:
        if stage["stage"] not in names:
            raise PipelineError(
                f"re-coding changes coders alone: the pipelines differ from stage {same + 1} on, where "
                f"{stage['stage']!r} is none"
            )
    return Pipeline(pipeline.stages[:same]), build_pipeline(own[same:]), Pipeline(pipeline.stages[same:])
