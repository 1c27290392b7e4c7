"""The sets of profiles that benchmarks.service pushes, measured with the model before anything is served.

Bytes, losses and times of every pipeline come from prompts of one quarter of the calibration text; bases are calibrated
on another half of it. What kvstore ships (`default`) was measured before, on the reference model.
"""

import math
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import torch

import kvstore
from benchmarks.quality_methods import cachegen_bins
from kvstore.calibration.calibrate import calibrate_all
from kvstore.calibration.model import Model
from kvstore.calibration.settings import Settings
from kvstore.codecs import NAMED, Pipeline, Planes, build_pipeline
from kvstore.codecs.artefact import artefact_digest
from kvstore.codecs.recompositions import Spec, kivi, kvserve
from kvstore.keys import namespace_of
from kvstore.profile import Level, Measured, Profile, ProfileSet, Quality, parse_profiles, profiles_json
from kvstore.profile_sets import DEFAULT, read_set
from kvstore.profiler.prompts import (
    Prompt,
    bfloat16_layout,
    decode_chunks,
    encode_prompt,
    encode_prompt_levels,
    kl_nats,
    take_prompt,
)
from kvstore.profiler.text import deal, stretches, windows

STATIC = ("fp8", "cachegen", "ladder-packed")
"""Named pipelines that engines are configured with."""

_KVSERVE = ((12, 8), (16, 5), (16, 6), (24, 6), (24, 8))
_CACHEGEN = ((16, 12), (24, 16), (32, 24))
_KIVI = ((4, 64), (4, 32))
_CENTRED = ((16, 12), (14, 11), (16, 9))
_UNTURNED = ((16, 6), (12, 6), (12, 5))
_STEPS = (-376, -356, -340)
_ENCODE_REPEATS, _DECODE_REPEATS = 3, 5


class Depth(NamedTuple):
    """How much is measured.

    Args:
        buckets: Lengths of the prefixes, tokens.
        prompts: Of each.
        calibration_prompts: For every basis.
    """

    buckets: tuple[int, ...] = (256, 512, 1536)
    prompts: int = 8
    calibration_prompts: int = 32


class Chunks(NamedTuple):
    """What the chunks of a model are like.

    Args:
        model: Its name.
        namespace: Of its chunks, hexadecimal.
        chunk_bytes: Bytes of the exact cache of a chunk.
        chunk_tokens: Tokens of a chunk.
    """

    model: str
    namespace: str
    chunk_bytes: int
    chunk_tokens: int


@dataclass(frozen=True)
class Sets:
    """What is pushed, and what it was measured with.

    Args:
        adaptive: What kvstore's planner chooses from: the default set, KVServe's and calibrated ones.
        kvserve: What KVServe's controller chooses from.
        static: Of the named pipelines.
        artefacts: Calibration that profiles need.
        chunks: Of the model.
    """

    adaptive: ProfileSet
    kvserve: ProfileSet
    static: ProfileSet
    artefacts: Sequence[bytes]
    chunks: Chunks

    def __reduce__(self) -> tuple[Callable[..., "Sets"], tuple[Any, ...]]:
        """Sets travel between processes as their JSON."""
        found = [profiles_json(one) for one in (self.adaptive, self.kvserve, self.static)]
        return _unpacked, (*found, self.artefacts, self.chunks)


def _unpacked(adaptive: Any, kvserve: Any, static: Any, artefacts: Sequence[bytes], chunks: Chunks) -> Sets:
    return Sets(parse_profiles(adaptive), parse_profiles(kvserve), parse_profiles(static), artefacts, chunks)


class Gauge:
    """Measures pipelines on prompts of a text.

    Args:
        folder: The model.
        text: Calibration text; what is served comes from another one.
        depth: How much.
        seed: Of all that is drawn.
    """

    def __init__(self, folder: Path, text: Path, depth: Depth, seed: int) -> None:
        torch.set_num_threads(1)
        self._model = Model(folder, dtype="float32")
        self._model.freeze()
        self._text, self._depth, self._seed = text, depth, seed
        self.layout = bfloat16_layout(self._model)
        self._parts = deal(stretches([text], self._model, max(depth.buckets) // 2))
        found = windows(self._parts[2], depth.buckets, depth.prompts, seed)
        self._prompts = {
            bucket: [take_prompt(self._model, ids, tokens) for ids in found[bucket]]
            for bucket, tokens in zip(found, depth.buckets, strict=True)
        }

    def basis(self) -> bytes:
        """A basis over three layers, K and V together."""
        layers = min(3, self.layout.layers)
        settings = Settings(
            prompts=self._depth.calibration_prompts,
            prefix_tokens=tuple(bucket for bucket in self._depth.buckets if bucket <= 1024),
            group_layers=layers,
            joint=True,
            seed=self._seed,
        )
        ids = [token for part in self._parts[0] for token in part]
        return calibrate_all(self._model, ids, [self._text.name], [settings])[0]

    def found(self, specs: Mapping[str, Spec], artefacts: Mapping[str, bytes]) -> ProfileSet:
        """A set of pipelines, measured."""
        profiles = [self.profile(name, spec, artefacts) for name, spec in specs.items()]
        measured = Measured(
            model=self.layout.model,
            revision=self.layout.revision,
            texts=(self._text.name,),
            device="cpu",
            machine=platform.processor() or platform.machine(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            kvstore=kvstore.__version__,
            seed=self._seed,
        )
        return ProfileSet(measured, tuple(profiles))

    @torch.inference_mode()
    def profile(self, name: str, spec: Spec, artefacts: Mapping[str, bytes]) -> Profile:
        """A pipeline, measured on every prompt; its times on two of the longest."""
        used = {one: data for one, data in artefacts.items() if any(stage.get("artefact") == one for stage in spec)}
        pipeline = build_pipeline(spec, used)
        raw_bytes, coded_bytes = 0, Counter[int]()
        losses: dict[str, dict[int, list[Quality]]] = {}
        for bucket, prompts in self._prompts.items():
            of_bucket = losses[bucket] = defaultdict(list)
            for prompt in prompts:
                frames, decoded = encode_prompt_levels(prompt, self.layout, pipeline)
                raw_bytes += prompt.raw_bytes
                for level, planes in enumerate(decoded):
                    coded_bytes[level] += sum(frame.truncated(level).size_bytes for frame in frames)
                    of_bucket[level].append(self._loss(prompt, planes))
        longest = list(self._prompts.values())[-1][:2]
        encode_s = fmean(self._encode_s(prompt, pipeline) for prompt in longest)
        levels = [
            Level(
                raw_bytes / coded_bytes[level],
                fmean(self._decode_s(prompt, pipeline, used, level) for prompt in longest),
                {bucket: _mean(found[level]) for bucket, found in losses.items()},
            )
            for level in sorted(coded_bytes)
        ]
        return Profile(name, tuple(spec), tuple(used), encode_s, tuple(levels))

    def _encode_s(self, prompt: Prompt, pipeline: Pipeline) -> float:
        took_s = _median_s(lambda: encode_prompt(prompt, self.layout, pipeline), _ENCODE_REPEATS)
        return took_s * 1e9 / prompt.raw_bytes

    def _decode_s(self, prompt: Prompt, pipeline: Pipeline, artefacts: Mapping[str, bytes], level: int) -> float:
        frames = [frame.truncated(level) for frame in encode_prompt(prompt, self.layout, pipeline)]

        def decode() -> None:
            for _ in decode_chunks(frames, self.layout, artefacts, prompt.token_ids):
                pass

        decode()
        return _median_s(decode, _DECODE_REPEATS) * 1e9 / prompt.raw_bytes

    def _loss(self, prompt: Prompt, planes: Planes) -> Quality:
        following = prompt.token_ids[prompt.tokens :]
        log_p = self._model.log_probabilities({name: x.float() for name, x in planes.items()}, following)
        exact, next_ids = prompt.log_p, torch.tensor(following[1:])[:, None]
        change = float((exact[:-1].gather(1, next_ids) - log_p[:-1].gather(1, next_ids)).mean().exp()) - 1
        agreement = float((exact.argmax(-1) == log_p.argmax(-1)).float().mean())
        return Quality(kl_nats(exact, log_p), 0.0, change, agreement, 1)


def measure_sets(folder: Path, text: Path, depth: Depth, seed: int, *, few: bool = False) -> Sets:
    """Calibrate, and measure everything that is pushed or that engines are configured with.

    Args:
        folder: The model.
        text: Calibration text.
        depth: How much.
        seed: Of all that is drawn.
        few: Whether one pipeline of each kind is enough.
    """
    gauge = Gauge(folder, text, depth, seed)
    basis = gauge.basis()
    digest = artefact_digest(basis)
    count = 1 if few else None
    theirs: dict[str, Spec] = {f"kvserve-{k}-{v}": kvserve(k, v) for k, v in _KVSERVE[:count]}
    theirs |= {f"cachegen-{k}-{v}": cachegen_bins(k, v) for k, v in _CACHEGEN[:count]}
    theirs |= {f"kivi-{bits}-{group}": kivi(bits, group) for bits, group in _KIVI[:count]}
    kvserve_set = gauge.found(theirs, {})
    quick: dict[str, Spec] = {f"mean-absmax-{k}-{v}": _centred(k, v) for k, v in _CENTRED[:count]}
    quick |= {f"rope-minmax-{k}-{v}": _unturned(k, v) for k, v in _UNTURNED[:count]}
    small = {f"klt{step}": _klt(digest, step) for step in _STEPS[:count]}
    ours = gauge.found(quick | small, {digest: basis})
    static = gauge.found({name: NAMED[name] for name in STATIC[:count]}, {})
    shipped = read_set(Path(DEFAULT)).profiles
    adaptive = ProfileSet(ours.measured, (*shipped, *kvserve_set.profiles, *ours.profiles))
    layout = gauge.layout
    chunks = Chunks(layout.model, namespace_of(layout).hex(), layout.chunk_bytes, layout.chunk_tokens)
    return Sets(adaptive, kvserve_set, static, (basis,), chunks)


def _klt(artefact: str, step: int) -> Spec:
    """Calibrated basis and one level: `ladder-klt` without token importance, which engines do not tell."""
    return (
        {"stage": "rope"},
        {"stage": "mean", "artefact": artefact},
        {"stage": "klt", "artefact": artefact},
        {"stage": "nested", "levels": 1, "step": step},
        {"stage": "rans"},
        {"stage": "raw"},
    )


def _centred(k_bins: int, v_bins: int) -> Spec:
    """CacheGen's quantiser behind the removal of channel means: soon encoded, at less loss."""
    return ({"stage": "mean"}, *cachegen_bins(k_bins, v_bins))


def _unturned(k_levels: int, v_levels: int) -> Spec:
    """KVServe's quantiser on K without rotary embedding and means, and no Hadamard transform: soon encoded, too."""
    first, *rest = kvserve(k_levels, v_levels)
    assert first["stage"] == "hadamard", "this is what it leaves out"
    return ({"stage": "rope"}, {"stage": "mean", "coarse": True}, *rest)


def _mean(found: Sequence[Quality]) -> Quality:
    """Over prompts."""
    kls = [one.kl_nats for one in found]
    error = stdev(kls) / math.sqrt(len(kls)) if len(kls) > 1 else 0.0
    change, agreement = (fmean(getattr(one, name) for one in found) for name in ("perplexity_change", "agreement"))
    return Quality(fmean(kls), error, change, agreement, len(kls))


def _median_s(run: Callable[[], object], repeats: int) -> float:
    samples = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        run()
        samples.append(time.perf_counter() - began_s)
    return median(samples)
