"""`kvstore calibrate`: means, metrics, probes, bases and sigmas of a model, from text, as one artefact."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

import kvstore
from kvstore.calibration.collect import Sample, fisher_gradients, require_output_projection, take_sample, token_table
from kvstore.calibration.model import Model
from kvstore.calibration.settings import Settings
from kvstore.calibration.statistics import Statistics
from kvstore.codecs.artefact import save_artefact
from kvstore.errors import ConfigError
from kvstore.files import read_text
from kvstore.layout import Layout

Progress = Callable[[float], None]


def calibrate(model: Model, texts: Sequence[Path], settings: Settings, progress: Progress = lambda _: None) -> bytes:
    """Calibrate a model on text.

    Args:
        model: Loaded in float32.
        texts: Text files of the kind that will be served.
        settings: How.
        progress: Told the share that is done, 0 to 1.

    Returns:
        The artefact's bytes.

    Raises:
        ConfigError: The text is too short, or the model is not one that can be calibrated.
    """
    settings.check()
    return calibrate_all(model, _token_ids(model, texts), [text.name for text in texts], [settings], progress)[0]


def calibrate_all(
    model: Model,
    token_ids: Sequence[int],
    texts: Sequence[str],
    settings: Sequence[Settings],
    progress: Progress = lambda _: None,
) -> list[bytes]:
    """Calibrate a model for several bases at once: prompts and gradients are what takes time, and they are shared.

    Args:
        model: Loaded in float32.
        token_ids: The text.
        texts: Its names, for the artefacts' cards.
        settings: Of each artefact; they differ in `group_layers`, `span`, `joint` and `window` only.
        progress: Told the share that is done, 0 to 1.

    Raises:
        ConfigError: The text is too short, or the model is not one that can be calibrated.
    """
    shared = settings[0]
    model.freeze()
    torch.manual_seed(shared.seed)
    for attention in model.attentions if shared.metric == "power" else ():
        require_output_projection(attention)
    windows = _windows(model, token_ids, shared)
    layout = model.layout_of(windows[0][0][:2])
    if layout.rope is None:
        raise ConfigError(
            "the model's configuration names no single rotary embedding (rope_parameters); "
            "models without one cannot be calibrated yet"
        )
    table = token_table(model, windows, shared.token_dims) if any(one.window for one in settings) else None
    statistics = {
        layers: Statistics(
            layout, layers, sorted({one.window for one in settings if one.group_layers == layers}), table
        )
        for layers in sorted({one.group_layers for one in settings})
    }
    samples: list[Sample] = []
    for number, (ids, prefix) in enumerate(windows):
        sample = take_sample(model, layout, ids, prefix)
        for moments in statistics.values():
            moments.add(sample)
        if shared.metric == "fisher":
            for gradients in fisher_gradients(model, layout, sample, shared.repeats):
                for moments in statistics.values():
                    moments.add_gradients(gradients)
        # Queries are all that is looked at again.
        samples.append(replace(sample, planes={}, bare={}))
        progress((number + 1) / len(windows))
    found = {one: statistics[one.group_layers].fit(model, samples, one) for one in settings}
    probes = _probes(samples, shared)
    tokens = sum(len(ids) for ids, _ in windows)
    artefacts = []
    for one in settings:
        tensors = found[one] | {"probes": probes}
        if one.window and table is not None:
            tensors["tokens"] = table
        artefacts.append(save_artefact(tensors, _card(layout, texts, one, tokens)))
    return artefacts


def _token_ids(model: Model, texts: Sequence[Path]) -> list[int]:
    return [token for text in texts for token in model.tokenize(read_text(text))]


def _windows(model: Model, ids: Sequence[int], settings: Settings) -> list[tuple[list[int], int]]:
    """Token ids of every prompt with its continuation, and the length of its prefix."""
    generator = torch.Generator().manual_seed(settings.seed)
    windows = []
    for number in range(settings.prompts):
        prefix = settings.prefix_tokens[number % len(settings.prefix_tokens)]
        length = prefix + settings.continuation_tokens
        if length > model.positions:
            raise ConfigError(
                f"a prompt of {prefix} tokens and the {settings.continuation_tokens} behind it are longer than "
                f"the model's context of {model.positions}: use fewer prefix tokens"
            )
        if length >= len(ids):
            raise ConfigError(f"the text has {len(ids)} tokens, a prompt needs {length}: give more text")
        start = int(torch.randint(0, len(ids) - length, (1,), generator=generator))
        windows.append((list(ids[start : start + length]), prefix))
    return windows


def _probes(samples: Sequence[Sample], settings: Settings) -> torch.Tensor:
    """`[layers, heads, probes, head_dim]` float16: queries drawn from all prompts."""
    queries = torch.cat([sample.queries for sample in samples], 1)
    layers, tokens = queries.shape[:2]
    drawn = [queries[i, torch.randint(0, tokens, (settings.probes,))].transpose(0, 1) for i in range(layers)]
    return torch.stack(drawn).half()


def _card(layout: Layout, texts: Sequence[str], settings: Settings, tokens: int) -> dict[str, object]:
    return {
        "model": layout.model,
        "revision": layout.revision,
        "texts": list(texts),
        "tokens": tokens,
        "prompts": settings.prompts,
        "prefix_tokens": list(settings.prefix_tokens),
        "continuation_tokens": settings.continuation_tokens,
        "group_layers": settings.group_layers,
        "span": settings.span,
        "joint": settings.joint,
        "window": settings.window,
        "metric": settings.metric,
        "seed": settings.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kvstore": kvstore.__version__,
    }
