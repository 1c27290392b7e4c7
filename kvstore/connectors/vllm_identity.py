"""Which model an engine of vLLM serves, as the layout of its chunks; and what of it kvstore cannot serve.

It reads the engine's configuration by attributes, so that it can be tested without one.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvstore.connectors.paged import DTYPE_NAMES
from kvstore.connectors.vllm_options import Options
from kvstore.errors import ConfigError
from kvstore.layout import Layout, PlaneSpec, attention_layout

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NUMBERS = re.compile(r"\.(\d+)\.")


def read_layouts(config: Any, cache: Any, options: Options) -> list[Layout]:
    """Layout of every worker's shard, by tensor-parallel rank.

    Args:
        config: The engine's `VllmConfig`.
        cache: Its `KVCacheConfig`.
        options: The connector's options.

    Raises:
        ConfigError: The model keeps something else than K and V of all tokens, or is cut in another way.
    """
    check_servable(config, cache)
    from kvstore.calibration.model import rope_of  # transformers is heavy, and every engine has it

    group = cache.kv_cache_groups[0]
    spec, layers = group.kv_cache_spec, len(group.layer_names)
    dtype, ranks = DTYPE_NAMES[spec.dtype], config.parallel_config.tensor_parallel_size
    model, revision = _model_name(config.model_config), _revision(config.model_config, options)
    if is_latent(spec):
        plane = PlaneSpec(dtype, (layers, options.chunk_tokens, 1, spec.head_size))
        return [Layout(model, revision, {"latent": plane}, options.chunk_tokens, rank, ranks) for rank in range(ranks)]
    return [
        attention_layout(
            model,
            revision,
            layers=layers,
            kv_heads=spec.num_kv_heads,
            head_dim=spec.head_size,
            dtype=dtype,
            chunk_tokens=options.chunk_tokens,
            shard_rank=rank,
            shard_size=ranks,
            rope=rope_of(config.model_config.hf_text_config),
        )
        for rank in range(ranks)
    ]


def layer_order(names: Sequence[str]) -> list[str]:
    """Names of attention layers by their number in the model.

    Raises:
        ConfigError: The numbers do not tell them apart.
    """
    numbers = {name: [int(found) for found in _NUMBERS.findall(f".{name}.")] for name in names}
    if any(len(found) != 1 for found in numbers.values()) or len({x[0] for x in numbers.values()}) != len(names):
        raise ConfigError(f"the layers {', '.join(names)[:200]} are not numbered once each, so they have no order")
    return sorted(names, key=lambda name: numbers[name][0])


def is_latent(spec: Any) -> bool:
    """Whether a layer's cache is one latent plane (MLA)."""
    return type(spec).__name__ == "MLAAttentionSpec"


def check_servable(config: Any, cache: Any) -> None:
    """Refuse what is not K and V of every token on every worker.

    Raises:
        ConfigError: With the reason.
    """
    parallel, groups = config.parallel_config, cache.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups}))
        raise ConfigError(f"the model keeps {len(groups)} kinds of cache ({kinds}); only plain attention can be stored")
    spec = groups[0].kv_cache_spec
    name = type(spec).__name__
    if name not in ("FullAttentionSpec", "MLAAttentionSpec"):
        raise ConfigError(f"the model's cache is a {name}; only plain attention and MLA can be stored")
    for attribute in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, attribute, None) is not None:
            raise ConfigError(f"the model's attention has a {attribute}; its prefixes cannot be stored")
    if getattr(spec, "non_causal", False):
        raise ConfigError("the model's attention is not causal, so its KV depends on later tokens")
    if spec.dtype not in DTYPE_NAMES:
        raise ConfigError(f"the KV cache is in {spec.dtype}: set kv_cache_dtype to auto, fp8 caches cannot be stored")
    for attribute in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, attribute, 1) > 1:
            raise ConfigError(f"{attribute} is {getattr(parallel, attribute)}; only tensor and data parallelism work")
    speculative = getattr(config, "speculative_config", None)
    if speculative is not None and getattr(speculative, "method", "") not in ("ngram", "suffix"):
        raise ConfigError("a draft model keeps a cache of its own, which cannot be stored; use ngram speculation")


def _model_name(model: Any) -> str:
    folder = Path(model.model)
    return folder.resolve().name if folder.is_dir() else str(model.model)


def _revision(model: Any, options: Options) -> str:
    """Identity of the weights, and of whatever the engine does to them."""
    changes = {
        "quantization": getattr(model, "quantization", None),
        "hf_overrides": getattr(model, "hf_overrides", None) or None,
    }
    changed = {name: str(value) for name, value in changes.items() if value is not None}
    return _weights(model, options) + (f" {json.dumps(changed, sort_keys=True)}" if changed else "")


def _weights(model: Any, options: Options) -> str:
    if options.revision is not None:
        return options.revision
    folder = Path(model.model)
    if folder.is_dir():
        from kvstore.calibration.model import weights_digest

        return weights_digest(folder)
    if _COMMIT.fullmatch(str(model.revision)):
        return str(model.revision)
    commit = _cached_commit(model)
    if commit is None:
        raise ConfigError(f"which weights {model.model} has cannot be told: set option 'revision' to their commit")
    return commit


def _cached_commit(model: Any) -> str | None:
    """Commit of a model in the Hugging Face cache, from where its configuration lies."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.model, "config.json", revision=model.revision)
    commit = Path(found).parent.name if isinstance(found, str) else ""
    return commit if _COMMIT.fullmatch(commit) else None
