"""What a configuration costs and gives, measured: cheaply by its codec alone, and in full with the model behind it."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any, NamedTuple, TypeVar

import torch

from kvstore.calibration.collect import Sample, fisher_gradients, take_sample
from kvstore.calibration.model import Model
from kvstore.codecs import Pipeline, Planes, build_pipeline
from kvstore.codecs.artefact import artefact_digest
from kvstore.codecs.ref.rope import rotary_planes, rotate, unrotate
from kvstore.errors import ConfigError, PipelineError
from kvstore.layout import Layout
from kvstore.profiler.decoders import Decoder, decoder_for
from kvstore.profiler.prompts import (
    CONTINUATION_TOKENS,
    Prompt,
    bfloat16_layout,
    encode_prompt,
    encode_prompt_levels,
    kl_nats,
    take_prompt,
)
from kvstore.profiler.space import Configuration, Space

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
Result = TypeVar("Result")

_CONTINUATIONS = 4
"""Sampled continuations behind the weights of `weighted_error`."""


class _Repeats(NamedTuple):
    """How often something is timed, behind one time that does not count."""

    encode: int
    decode: int


_REPEATS = {False: _Repeats(1, 3), True: _Repeats(3, 5)}
"""By whether it shall be thorough. Nothing is chosen by the time that encoding takes."""


class InfeasibleError(Exception):
    """A configuration that this machine or model cannot run; the search goes on without it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What the codec alone tells of a configuration; one number a level, coarsest first.

    Args:
        ratio: Bytes of the exact cache in those of the frames, levels up to this one.
        encode_s_per_gb: Seconds to encode a GB of exact cache, all levels.
        decode_s_per_gb: Seconds to decode it from the levels up to this one.
        weighted_error: Squared error of K and V by the squared gradients of sampled continuations, halved: nats a
            token, as far as the error is small and its parts do not add up.
        attention_error: Relative squared error of the attention outputs, mean over layers.
    """

    ratio: tuple[float, ...]
    encode_s_per_gb: float
    decode_s_per_gb: tuple[float, ...]
    weighted_error: tuple[float, ...]
    attention_error: tuple[float, ...]

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Trial":
        """From the JSON of its `asdict`."""
        lists = {name: tuple(value) for name, value in record.items() if isinstance(value, list)}
        return cls(encode_s_per_gb=record["encode_s_per_gb"], **lists)


@dataclass(frozen=True, slots=True)
class Loss:
    """Quality loss of one level on the prompts of one bucket.

    Args:
        kl_nats: KL(exact || compressed) of the next-token distributions, mean over prompts and the tokens behind them.
        standard_error: Of it, over prompts.
        perplexity_change: Relative.
        agreement: Share of tokens whose most likely successor is the same.
    """

    kl_nats: float
    standard_error: float
    perplexity_change: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the model tells of a configuration; one entry a level, coarsest first.

    Args:
        ratio: Bytes of the exact caches of all prompts in those of their frames.
        losses: By bucket.
    """

    ratio: tuple[float, ...]
    losses: tuple[Mapping[str, Loss], ...]

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Outcome":
        """From the JSON of its `asdict`."""
        losses = ({bucket: Loss(**loss) for bucket, loss in level.items()} for level in record["losses"])
        return cls(tuple(record["ratio"]), tuple(losses))

    def kl_nats(self, level: int) -> float:
        """Quality loss over all buckets, each with the same weight."""
        return fmean(loss.kl_nats for loss in self.losses[level].values())

    def standard_error(self, level: int) -> float:
        """Of `kl_nats`."""
        errors = [loss.standard_error for loss in self.losses[level].values()]
        return math.sqrt(sum(error**2 for error in errors)) / len(errors)


@dataclass(frozen=True)
class Task:
    """What a `Bench` is made of; it travels to processes.

    Args:
        model: Folder of the model.
        device: What the model computes and decoding is timed on.
        artefacts: Folder with an artefact for every basis, named as the basis.
        space: The strategies.
        prompts: Token ids of every bucket's prompts with their continuations.
        trials: Of them, how many of the first bucket `Bench.try_codec` looks at.
        threads: Threads that a process computes with.
    """

    model: Path
    device: str
    artefacts: Path
    space: Space
    prompts: Mapping[str, Sequence[tuple[int, ...]]]
    trials: int = 2
    threads: int = 1


@dataclass(frozen=True, eq=False)
class Case:
    """A prompt on which the codec alone is tried.

    Args:
        prompt: The prompt.
        weights: Mean squared gradients of a continuation's log-likelihood by K (without rotary embedding) and V.
        queries: Queries of the continuation, rotary embedding included, `[layers, tokens, heads, head_dim]`.
        outputs: What attention to the exact cache gives them.
    """

    prompt: Prompt
    weights: dict[str, torch.Tensor]
    queries: torch.Tensor
    outputs: torch.Tensor


class Bench:
    """Measures configurations on one model.

    Raises:
        ConfigError: The model or the device cannot be used.
    """

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        self._task = task
        self._model = Model(task.model, dtype="float32", device=task.device)
        self._model.freeze()
        self.layout = bfloat16_layout(self._model)
        self._artefacts: dict[str, tuple[str, bytes]] = {}
        self._decoder: Decoder = decoder_for(task.device, self.layout)

    def try_codec(self, configuration: Configuration, *, thorough: bool = False) -> Trial:
        """Encode and decode a few prompts, without the model.

        Args:
            configuration: What to try.
            thorough: Whether the times are to be published, and not only to choose by.

        Raises:
            InfeasibleError: It cannot be run here.
        """
        return _or_infeasible(lambda: self._try(configuration, _REPEATS[thorough]))

    def run_model(self, configuration: Configuration) -> Outcome:
        """Encode every prompt once, and let the model go on behind each of its levels.

        Raises:
            InfeasibleError: It cannot be run here.
        """
        return _or_infeasible(lambda: self._run(configuration))

    def pipeline(self, configuration: Configuration) -> tuple[Pipeline, dict[str, bytes]]:
        """The pipeline of a configuration, and the artefacts that it needs, by digest.

        Raises:
            ConfigError: There is no artefact for its basis.
        """
        basis = configuration.basis
        if basis is None:
            return build_pipeline(self._task.space.pipeline(configuration)), {}
        if basis.name not in self._artefacts:
            try:
                data = (self._task.artefacts / basis.name).read_bytes()
            except OSError as exc:
                raise ConfigError(f"cannot read the calibration artefact {basis.name}: {exc}") from exc
            self._artefacts[basis.name] = (artefact_digest(data), data)
        digest, data = self._artefacts[basis.name]
        return build_pipeline(self._task.space.pipeline(configuration, digest), {digest: data}), {digest: data}

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """Every bucket's prompts, with their exact caches."""
        return {
            name: [take_prompt(self._model, ids, len(ids) - CONTINUATION_TOKENS) for ids in windows]
            for name, windows in self._task.prompts.items()
        }

    @cached_property
    def cases(self) -> list[Case]:
        """The prompts that the codec alone is tried on."""
        windows = next(iter(self._task.prompts.values()))[: self._task.trials]
        return [self._case(ids) for ids in windows]

    def _case(self, ids: Sequence[int]) -> Case:
        prefix = len(ids) - CONTINUATION_TOKENS
        sample = take_sample(self._model, self.layout, ids, len(ids))
        cut = Sample(
            {name: x[:, :prefix] for name, x in sample.planes.items()},
            {name: x[:, :prefix] for name, x in sample.bare.items()},
            sample.queries[:, :prefix],
            sample.token_ids,
        )
        gradients = list(fisher_gradients(self._model, self.layout, cut, _CONTINUATIONS))
        weights = {name: torch.stack([one[name].square() for one in gradients]).mean(0) for name in cut.planes}
        queries = sample.queries[:, prefix:]
        if self.layout.rope is not None:
            queries = rotate(queries, *rotary_planes(self.layout.rope, torch.arange(prefix, len(ids))))
        prompt = take_prompt(self._model, ids, prefix)
        exact = {name: x.float() for name, x in prompt.planes.items()}
        return Case(prompt, weights, queries, attention_outputs(queries, exact))

    def _try(self, configuration: Configuration, repeats: _Repeats) -> Trial:
        pipeline, artefacts = self.pipeline(configuration)
        cases = self.cases
        with torch.inference_mode():
            tried = [self._try_case(case, pipeline, artefacts, repeats) for case in cases]
        levels = range(configuration.levels)
        return Trial(
            tuple(1 / fmean(1 / one.ratio[level] for one in tried) for level in levels),
            fmean(one.encode_s_per_gb for one in tried),
            tuple(fmean(one.decode_s_per_gb[level] for one in tried) for level in levels),
            tuple(fmean(one.weighted_error[level] for one in tried) for level in levels),
            tuple(fmean(one.attention_error[level] for one in tried) for level in levels),
        )

    def _try_case(self, case: Case, pipeline: Pipeline, artefacts: dict[str, bytes], repeats: _Repeats) -> Trial:
        prompt = case.prompt
        exact = {name: x.float() for name, x in prompt.planes.items()}
        frames, decoded = encode_prompt_levels(prompt, self.layout, pipeline)
        raw_gb = prompt.raw_bytes / 1e9
        encode_s = _median_s(lambda: encode_prompt(prompt, self.layout, pipeline), repeats.encode)
        ratio, decode_s, weighted, attention = [], [], [], []
        for level, found in enumerate(decoded):
            cut = [frame.truncated(level) for frame in frames]
            ratio.append(prompt.raw_bytes / sum(frame.size_bytes for frame in cut))
            ready = self._decoder.ready(cut, artefacts, prompt.token_ids)
            ready()
            decode_s.append(_median_s(ready, repeats.decode) / raw_gb)
            planes = {name: x.float() for name, x in found.items()}
            weighted.append(weighted_error(exact, planes, case.weights, self.layout) / CONTINUATION_TOKENS)
            attention.append(attention_error(case.outputs, attention_outputs(case.queries, planes)))
        return Trial(tuple(ratio), encode_s / raw_gb, tuple(decode_s), tuple(weighted), tuple(attention))

    @torch.inference_mode()
    def _run(self, configuration: Configuration) -> Outcome:
        pipeline, _ = self.pipeline(configuration)
        raw_bytes, frame_bytes = 0, [0] * configuration.levels
        losses: list[dict[str, Loss]] = [{} for _ in frame_bytes]
        for bucket, prompts in self.prompts.items():
            found: list[list[Loss]] = [[] for _ in frame_bytes]
            for prompt in prompts:
                raw_bytes += prompt.raw_bytes
                frames, decoded = encode_prompt_levels(prompt, self.layout, pipeline)
                for level, planes in enumerate(decoded):
                    frame_bytes[level] += sum(frame.truncated(level).size_bytes for frame in frames)
                    found[level].append(self._loss(prompt, planes))
            for level, held in enumerate(found):
                losses[level][bucket] = _mean(held)
        return Outcome(tuple(raw_bytes / one for one in frame_bytes), tuple(losses))

    def _loss(self, prompt: Prompt, planes: Planes) -> Loss:
        following = prompt.token_ids[prompt.tokens :]
        log_p = self._model.log_probabilities({name: x.float() for name, x in planes.items()}, following)
        exact, next_ids = prompt.log_p, torch.tensor(following[1:])[:, None]
        # The distribution behind the last token belongs to no token of the continuation.
        change = (exact[:-1].gather(1, next_ids) - log_p[:-1].gather(1, next_ids)).mean()
        return Loss(
            kl_nats(exact, log_p),
            0.0,
            float(change.exp()) - 1,
            float((exact.argmax(-1) == log_p.argmax(-1)).float().mean()),
        )


def attention_outputs(queries: torch.Tensor, planes: Planes) -> torch.Tensor:
    """Attention of queries behind a prefix to it alone, `[layers, queries, heads, head_dim]` float32.

    Args:
        queries: `[layers, queries, heads, head_dim]`, rotary embedding included.
        planes: K and V, `[layers, tokens, kv_heads, head_dim]` float32.
    """
    layers, count, heads, dim = queries.shape
    kv_heads = planes["k"].shape[2]
    grouped = queries.view(layers, count, kv_heads, heads // kv_heads, dim)
    weights = (torch.einsum("lqhgd,lthd->lhgqt", grouped, planes["k"]) * dim**-0.5).softmax(-1)
    return torch.einsum("lhgqt,lthd->lqhgd", weights, planes["v"]).reshape(layers, count, heads, dim)


def attention_error(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Squared error relative to the squared exact outputs of each layer, mean over layers."""
    error = (exact - found).double().square().sum((1, 2, 3))
    return float((error / exact.double().square().sum((1, 2, 3)).clamp_min(1e-30)).mean())


def weighted_error(exact: Planes, found: Planes, weights: Planes, layout: Layout) -> float:
    """Half the squared error of K (without rotary embedding) and V, each element by its weight."""
    error = {name: x - found[name] for name, x in exact.items()}
    if layout.rope is not None:
        error["k"] = unrotate(error["k"], *rotary_planes(layout.rope, torch.arange(error["k"].shape[1])))
    return float(sum((weights[name] * x.square()).double().sum() for name, x in error.items()) / 2)


def _mean(losses: Sequence[Loss]) -> Loss:
    """Over prompts."""
    kls = [loss.kl_nats for loss in losses]
    return Loss(
        fmean(kls),
        math.sqrt(variance(kls) / len(kls)) if len(kls) > 1 else 0.0,
        fmean(loss.perplexity_change for loss in losses),
        fmean(loss.agreement for loss in losses),
    )


def _median_s(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of what ran at least once before."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return median(samples)


def _or_infeasible(run: Callable[[], Result]) -> Result:
    """Run, and tell what this configuration cannot from what is wrong with everything.

    Raises:
        InfeasibleError: Memory ran out, or the values cannot be encoded.
    """
    try:
        return run()
    except (MemoryError, PipelineError) as exc:
        raise InfeasibleError(str(exc) or "out of memory") from exc
    except RuntimeError as exc:
        if not any(text in str(exc) for text in _OUT_OF_MEMORY):
            raise
        raise InfeasibleError(f"out of memory: {str(exc).partition(chr(10))[0]}") from exc
