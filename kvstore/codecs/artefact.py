"""Calibration artefacts: means, metrics, bases and probes of one model, as safetensors with a card.

An artefact is bytes with a digest. Frames name the digest, stages are bound to the tensors when a pipeline is built.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from kvstore.errors import PipelineError

VERSION = 1
ARTEFACT_BYTES_MAX = 1 << 32
_CARD = "kvstore_artefact"
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int16, torch.int32, torch.int64})


@dataclass(frozen=True, eq=False)
class Artefact:
    """What calibration found out about one model.

    Args:
        digest: SHA-256 of the safetensors bytes, hexadecimal.
        card: Model, text, tokens, date, layer groups and more, as JSON.
        tensors: By name; docs/codecs.md lists them.
    """

    digest: str
    card: Mapping[str, object]
    tensors: Mapping[str, torch.Tensor]
    _floats: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def group_layers(self) -> int:
        """Layers in each layer group that the bases were made for."""
        value = self.card.get("group_layers")
        return value if isinstance(value, int) else 1

    def tensor(self, stage: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of a given shape; -1 allows any length of an axis.

        Raises:
            PipelineError: It is not there, or has another shape.
        """
        found = self.tensors.get(name)
        if found is None:
            raise PipelineError(f"stage {stage!r}: artefact {self.digest} has no tensor {name!r}")
        fits = len(found.shape) == len(shape) and all(
            want in (-1, got) for want, got in zip(shape, found.shape, strict=True)
        )
        if not fits:
            raise PipelineError(
                f"stage {stage!r}: tensor {name!r} of artefact {self.digest} is {list(found.shape)}, "
                f"the planes need {list(shape)}"
            )
        return found

    def matrix(self, stage: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """`tensor` in float32, converted once."""
        found = self.tensor(stage, name, shape)
        if found.dtype != torch.float32:
            found = self._floats.setdefault(name, found.float())
        return found

    def of_layers(self, stage: str, name: str, layers: torch.Tensor) -> torch.Tensor:
        """The rows of a `[layers, ...]` tensor that belong to the given layers.

        Raises:
            PipelineError: It is not there, or has fewer layers.
        """
        found = self.tensors.get(name)
        if found is None or int(layers.max()) >= len(found):
            raise PipelineError(
                f"stage {stage!r}: artefact {self.digest} has no {name!r} for layer {int(layers.max())}"
            )
        return found.index_select(0, layers)


def save_artefact(tensors: Mapping[str, torch.Tensor], card: Mapping[str, object]) -> bytes:
    """Bytes of an artefact; its digest is their SHA-256."""
    text = json.dumps({"version": VERSION, **card}, sort_keys=True)
    data: bytes = save_safetensors({name: x.contiguous() for name, x in tensors.items()}, metadata={_CARD: text})
    return data


@lru_cache(maxsize=8)
def artefact_digest(data: bytes) -> str:
    """SHA-256 of an artefact's bytes, hexadecimal."""
    # Kept because every chunk that is decoded names its artefact, which may be hundreds of megabytes.
    return hashlib.sha256(data).hexdigest()


def load_artefact(data: bytes, digest: str | None = None) -> Artefact:
    """Artefact from its bytes.

    Args:
        data: Safetensors.
        digest: What frames call it; it is compared.

    Raises:
        PipelineError: The bytes have another digest, or are no artefact of a version that this build reads.
    """
    found = artefact_digest(data)
    if digest is not None and found != digest:
        raise PipelineError(f"the bytes given for the calibration artefact {digest} have the digest {found}")
    return _parsed(found, data)


@lru_cache(maxsize=8)
def _parsed(digest: str, data: bytes) -> Artefact:
    if len(data) > ARTEFACT_BYTES_MAX:
        raise PipelineError(f"calibration artefact {digest} is larger than {ARTEFACT_BYTES_MAX} bytes")
    try:
        # The header of safetensors is JSON behind its own length, which `load` has checked against the bytes.
        tensors = load_safetensors(data)
        size = struct.unpack_from("<Q", data)[0]
        card = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_CARD])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError, struct.error) as exc:
        raise PipelineError(f"calibration artefact {digest} cannot be read: {exc}") from exc
    if not isinstance(card, dict) or card.get("version") != VERSION:
        raise PipelineError(f"calibration artefact {digest} is not of version {VERSION}")
    for name, x in tensors.items():
        if x.dtype not in _DTYPES:
            raise PipelineError(f"tensor {name!r} of calibration artefact {digest} is of {x.dtype}")
        if x.is_floating_point() and not torch.isfinite(x).all():
            raise PipelineError(f"tensor {name!r} of calibration artefact {digest} has values that are not finite")
    return Artefact(digest, card, tensors)
