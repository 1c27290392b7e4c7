"""A Hugging Face causal LM and its KV cache in the engine-neutral layout."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as transformers_logging

from kvstore.errors import ConfigError
from kvstore.layout import Layout, PlaneSpec, Rope


class Model:
    """A causal LM, with its tokenizer and the identity of its cache. What goes in and comes out is on the CPU.

    Args:
        folder: Folder with `config.json`, safetensors weights and a tokenizer.
        dtype: What to compute in; `auto` is what the weights are in.
        device: What to compute on.

    Raises:
        ConfigError: The folder holds no model that can be loaded, or the device is not there.
    """

    def __init__(self, folder: Path, *, dtype: str = "auto", device: str = "cpu") -> None:
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is no model folder: it has no config.json")
        transformers_logging.disable_progress_bar()
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as exc:
            # What follows the first line are lists of all models that there are.
            reason = str(exc).strip().partition("\n")[0]
            raise ConfigError(f"cannot load the model in {folder}: {reason}") from exc
        try:
            self._model.eval().to(device)
        except (AssertionError, RuntimeError) as exc:
            raise ConfigError(f"cannot put the model on the device {device!r}: {exc}") from exc
        self._device = torch.device(device)
        self._folder = folder

    @property
    def positions(self) -> int:
        """Longest prompt that the model takes.

        Raises:
            ConfigError: Its configuration does not say.
        """
        found = getattr(self._model.config, "max_position_embeddings", None)
        if not isinstance(found, int):
            raise ConfigError("the model's configuration has no max_position_embeddings")
        return found

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        # Only the beginning of the text is used, so its length beyond the context is no mistake.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        return ids

    @property
    def config(self) -> Any:
        """The Hugging Face configuration."""
        return self._model.config

    @property
    def attentions(self) -> list[Any]:
        """The attention module of every layer.

        Raises:
            ConfigError: The model does not keep them where Llama, Mistral and Qwen do.
        """
        try:
            return [layer.self_attn for layer in self._model.model.layers]
        except AttributeError as exc:
            raise ConfigError(
                f"the attention of a {type(self._model).__name__} is not in model.layers[...].self_attn, "
                "where Llama, Mistral and Qwen have it; other models cannot be calibrated yet"
            ) from exc

    @property
    def identity(self) -> tuple[str, str]:
        """Name of the model, and SHA-256 over its configuration and weights."""
        return self._folder.resolve().name, weights_digest(self._folder)

    @property
    def embeddings(self) -> torch.Tensor:
        """Input embeddings, `[vocabulary, hidden]`."""
        weight: torch.Tensor = self._model.get_input_embeddings().weight.detach()
        return weight.cpu()

    def freeze(self) -> None:
        """Ask for no gradients of the weights, so that those of a cache are all there is."""
        self._model.requires_grad_(False)

    def log_probabilities(self, planes: Mapping[str, torch.Tensor], token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities behind a prefix, `[tokens, vocabulary]` float32; gradients flow into the planes."""
        ids = torch.tensor([token_ids], device=self._device)
        out = self._model(ids, past_key_values=cache_of(planes, self._device), use_cache=True)
        found: torch.Tensor = out.logits[0].float().log_softmax(-1).cpu()
        return found

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        """Logits of every position, `[tokens, vocabulary]` float32; `cache` grows by the tokens."""
        out = self._model(torch.tensor([token_ids], device=self._device), past_key_values=cache, use_cache=True)
        logits: torch.Tensor = out.logits[0].float().cpu()
        return logits

    def go_on(
        self, planes: Mapping[str, torch.Tensor], tail_ids: Sequence[int], continuation_ids: Sequence[int]
    ) -> tuple[list[int], torch.Tensor]:
        """Go on behind a prefix: freely, and along a given continuation.

        Args:
            planes: K and V of the prefix, `[layers, tokens, kv_heads, head_dim]` each.
            tail_ids: Tokens between the prefix and the continuation.
            continuation_ids: The given continuation.

        Returns:
            The greedy continuation of the same length, and the logits before every token of the given one,
            `[tokens, vocabulary]` float32.
        """
        cache = cache_of(planes, self._device)
        greedy = [int(self.forward(tail_ids, cache)[-1].argmax())]
        while len(greedy) < len(continuation_ids):
            greedy.append(int(self.forward(greedy[-1:], cache)[-1].argmax()))
        logits = self.forward([*tail_ids, *continuation_ids[:-1]], cache_of(planes, self._device))
        return greedy, logits[len(tail_ids) - 1 :].contiguous()

    def layout_of(self, token_ids: Sequence[int], chunk_tokens: int = 256) -> Layout:
        """Identity of this model's caches, found out from a short prompt."""
        cache = DynamicCache()
        self.forward(token_ids, cache)
        return self.layout(cache, chunk_tokens)

    def layout(self, cache: DynamicCache, chunk_tokens: int) -> Layout:
        """Identity of a cache of this model.

        Raises:
            ConfigError: The cache is not one plain K and V tensor a layer.
        """
        planes = planes_of(cache)
        specs = {
            name: PlaneSpec(str(plane.dtype).removeprefix("torch."), (plane.shape[0], chunk_tokens, *plane.shape[2:]))
            for name, plane in planes.items()
        }
        revision = weights_digest(self._folder)
        return Layout(self._folder.resolve().name, revision, specs, chunk_tokens, rope=rope_of(self._model.config))


def planes_of(cache: DynamicCache) -> dict[str, torch.Tensor]:
    """K and V of a cache, `[layers, tokens, kv_heads, head_dim]` each.

    Raises:
        ConfigError: A layer is no plain K and V, such as a sliding window.
    """
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        raise ConfigError(
            "the model keeps sliding windows or other state beside K and V; its prefixes cannot be stored"
        )
    keys = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers]).cpu()
    values = torch.stack([layer.values[0].transpose(0, 1) for layer in cache.layers]).cpu()
    return {"k": keys, "v": values}


def cache_of(planes: Mapping[str, torch.Tensor], device: torch.device | str = "cpu") -> DynamicCache:
    """A cache that holds these planes."""
    cache = DynamicCache()
    for layer in range(planes["k"].shape[0]):
        keys, values = (planes[name][layer].to(device).transpose(0, 1)[None].contiguous() for name in ("k", "v"))
        cache.update(keys, values, layer)
    return cache


def weights_digest(folder: Path) -> str:
    """SHA-256 over configuration and weights, so that a fine-tuned copy never shares a cache."""
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        with file.open("rb") as stream:
            digest.update(file.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def rope_of(config: Any) -> Rope | None:
    """Rotary embedding as far as the configuration tells it."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scaling = sorted(
        (name, float(value))
        for name, value in parameters.items()
        if name != "rope_theta" and isinstance(value, int | float) and not isinstance(value, bool)
    )
    return Rope(
        theta=float(parameters["rope_theta"]),
        rotary_dim=int(head_dim * parameters.get("partial_rotary_factor", 1.0)),
        kind=str(parameters.get("rope_type", "default")),
        scaling=tuple(scaling),
    )
