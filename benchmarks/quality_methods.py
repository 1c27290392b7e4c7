"""The methods that benchmarks.quality compares, each at several settings, and the artefacts that they need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cache import documents, load_text
from kvstore.calibration.calibrate import calibrate
from kvstore.calibration.model import Model
from kvstore.calibration.settings import Settings
from kvstore.codecs import NAMED, Pipeline, build_pipeline
from kvstore.codecs.artefact import artefact_digest
from kvstore.codecs.named import kvtc, ladder, ladder_klt, ladder_repeats, ladder_tokens, ladder_weighted
from kvstore.codecs.recompositions import Spec, kivi, kvserve, turboquant
from kvstore.profiler.prompts import Prompt, kl_nats, take_prompt, text_windows

PROMPTS = 96

CALIBRATIONS: Mapping[str, Settings] = {
    "joint-3": Settings(prompts=PROMPTS, group_layers=3, joint=True),
    "joint-1": Settings(prompts=PROMPTS, group_layers=1, joint=True),
    "apart-3": Settings(prompts=PROMPTS, group_layers=3),
    "tokens-3": Settings(prompts=PROMPTS, group_layers=3, joint=True, window=2),
    "tokens-1": Settings(prompts=PROMPTS, group_layers=1, joint=True, window=2),
    "kvtc": Settings(prompts=PROMPTS, group_layers=1 << 16, metric="none"),
}
"""Artefacts by name. KVTC's basis spans all layers and knows no metric, as published."""

_KVSERVE = ((8, 3), (12, 4), (12, 5), (16, 5), (16, 6), (24, 6), (24, 8))
_KVSERVE_HYBRID = ((16, 6, 8, 3), (20, 6, 10, 4), (24, 8, 12, 4), (32, 8, 12, 5))
_KIVI = ((2, 64), (2, 32), (3, 64), (3, 32), (4, 64), (4, 32))
_BINS = ((6, 6), (8, 8), (12, 8), (16, 12), (24, 16), (32, 24))


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Args:
        name: What tables call it.
        settings: Pipelines by a label that says their setting.
    """

    name: str
    settings: Mapping[str, Pipeline]


def methods(artefacts: Mapping[str, bytes], low_heads: Sequence[int], *, first_only: bool = False) -> list[Method]:
    """Every method at its settings.

    Args:
        artefacts: By their name in `CALIBRATIONS`.
        low_heads: The half of the heads that matters least, for KVServe's hybrid.
        first_only: Whether one setting of each is enough.
    """
    found = _methods(artefacts, low_heads)
    if not first_only:
        return found
    return [Method(method.name, dict(list(method.settings.items())[:1])) for method in found]


def low_heads(folder: Path, text: Path, seed: int, prompts: int) -> list[int]:
    """The half of all heads, `layer * heads + head`, in which noise does least.

    KVServe scores heads by how they attend; what noise in K and V of a head does is kinder to it than any score.
    """
    model = Model(folder, dtype="float32")
    windows = text_windows(documents(load_text(text), 1024, model), prompts, 256, seed)
    cases = [take_prompt(model, window, 256) for window in windows]
    layers, _, heads, _ = cases[0].planes["k"].shape
    costs = {(layer, head): _noise_kl(model, cases, layer, head) for layer in range(layers) for head in range(heads)}
    ranked = sorted(costs, key=lambda at: costs[at])
    return sorted(layer * heads + head for layer, head in ranked[: len(ranked) // 2])


@torch.inference_mode()
def _noise_kl(model: Model, cases: Sequence[Prompt], layer: int, head: int) -> float:
    """KL that noise of a third of their spread in K and V of a head causes, nats."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for case in cases:
        noisy = {name: x.float().clone() for name, x in case.planes.items()}
        for x in noisy.values():
            mine = x[layer, :, head]
            noise = torch.randn(mine.shape, generator=generator)
            x[layer, :, head] = mine + noise * (mine - mine.mean(0)).square().mean().sqrt() / 3
        log_p = model.log_probabilities(noisy, case.token_ids[case.tokens :])
        total += kl_nats(case.log_p, log_p)
    return total


def _methods(artefacts: Mapping[str, bytes], low_heads: Sequence[int]) -> list[Method]:

    def calibrated(name: str, make: Callable[..., Spec], steps: Sequence[int]) -> dict[str, Pipeline]:
        data = artefacts[name]
        digest = artefact_digest(data)
        return {f"step {step}": build_pipeline(make(digest, step=step), {digest: data}) for step in steps}

    def plain(specs: Mapping[str, Spec]) -> dict[str, Pipeline]:
        return {label: build_pipeline(spec) for label, spec in specs.items()}

    hybrid = {f"{k}/{v}, low {a}/{b}": kvserve(k, v, a, b, low_heads) for k, v, a, b in _KVSERVE_HYBRID}
    return [
        Method("kvserve", plain({f"{k}/{v}": kvserve(k, v) for k, v in _KVSERVE} | hybrid)),
        Method("cachegen", plain({f"bins {k}/{v}": cachegen_bins(k, v) for k, v in _BINS})),
        Method("kivi", plain({f"{bits} bits, groups of {group}": kivi(bits, group) for bits, group in _KIVI})),
        Method("turboquant", plain({f"{bits} bits": turboquant(bits) for bits in range(1, 6)})),
        Method("kvtc", calibrated("kvtc", kvtc, (-270, -240, -210, -180, -150, -120, -90))),
        *[Method(name, plain({"default": NAMED[name]})) for name in ("fp8", "splitzip", "exponent-ans", "zstd")],
        Method("ladder-packed", plain({"default": NAMED["ladder-packed"]})),
        Method("ladder", plain({f"step {step}": ladder(step=step) for step in (24, 56)})),
        Method("ladder-repeats", plain({f"step {step}": ladder_repeats(step=step) for step in (24, 56)})),
        Method("ladder-weighted", calibrated("joint-1", ladder_weighted, (-300, -260))),
        Method("ladder-klt", calibrated("joint-3", ladder_klt, (-290, -250))),
        Method("ladder-klt, one layer", calibrated("joint-1", ladder_klt, (-290, -250))),
        Method("ladder-klt, K and V apart", calibrated("apart-3", ladder_klt, (-290, -250))),
        Method("ladder-tokens", calibrated("tokens-3", ladder_tokens, (-290, -240))),
        Method("ladder-tokens, one layer", calibrated("tokens-1", ladder_tokens, (-290, -240))),
    ]


def make_artefact(name: str, folder: Path, text: Path, prompts: int, prefix_tokens: tuple[int, ...]) -> bytes:
    """Calibrate for one of `CALIBRATIONS`."""
    torch.set_num_threads(1)
    model = Model(folder, dtype="float32")
    settings = CALIBRATIONS[name]
    layers = min(settings.group_layers, model.layout_of([0, 1]).layers)
    changed = {**{f: getattr(settings, f) for f in settings.__slots__}, "group_layers": layers}
    return calibrate(model, [text], Settings(**{**changed, "prompts": prompts, "prefix_tokens": prefix_tokens}))


def cachegen_bins(k_bins: int, v_bins: int) -> Spec:
    """CacheGen's quantiser at given bins with the coder of KVServe's published profiles, so that it can be swept."""
    return (
        {"stage": "absmax", "planes": ["k"], "bins": k_bins},
        {"stage": "absmax", "planes": ["v"], "bins": v_bins},
        {"stage": "ans", "tables": "layer"},
        {"stage": "raw"},
    )
