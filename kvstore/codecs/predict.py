"""Canonicalise: subtract what the token ids alone say about K and V."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from kvstore.codecs.artefact import Artefact
from kvstore.codecs.ref.predict import HISTORY, features
from kvstore.codecs.stage import Planes, Specs, require_finite, require_floats
from kvstore.errors import PipelineError


@dataclass(frozen=True, slots=True)
class Predict:
    """Subtracts a calibrated linear prediction of every vector from its token and the ones just before it.

    Whoever asks for a chunk knows its token ids (the key is a hash over them), so they cost no byte; early layers are
    nearly a function of them. Needs the token ids in the context, for encoding as for decoding.

    Args:
        artefact: Digest of the calibration artefact with `tokens` (`[vocabulary, r]`) and, for every layer,
            `k.predict.LAYER` (`[window * r + 1, kv_heads * head_dim]`).
    """

    artefact: str = ""
    data: Artefact | None = field(default=None, compare=False, repr=False)
    name: ClassVar[str] = "predict"
    lossless: ClassVar[bool] = False

    def infer(self, specs: Specs) -> Specs:
        out = dict(specs)
        for name in require_floats(self.name, specs):
            self.matrices(name, (0,), specs[name].shape[2] * specs[name].shape[3])
            out[name] = replace(specs[name], dtype="float32")
        return out

    def encode(self, planes: Planes, specs: Specs) -> Planes:
        out = dict(planes)
        for name, predicted in self._predict(planes, specs).items():
            require_finite(self.name, name, planes[name])
            out[name] = planes[name].float() - predicted
        return out

    def decode(self, planes: Planes, like: Specs) -> Planes:
        out = {name: planes[name] for name in like}
        for name, predicted in self._predict(planes, like).items():
            out[name] = planes[name] + predicted
        return out

    def matrices(self, name: str, layers: Sequence[int], width: int) -> list[torch.Tensor]:
        """`[window * r + 1, width]` float32 for every layer.

        Raises:
            PipelineError: One is missing, or of another shape.
        """
        found = [self._data().matrix(self.name, f"{name}.predict.{layer}", (-1, width)) for layer in layers]
        if len({len(matrix) for matrix in found}) > 1:
            raise PipelineError(f"stage 'predict': artefact {self.artefact} has matrices of different windows")
        return found

    def inputs(self, context: Planes, tokens: int, rows: int) -> torch.Tensor:
        """Features of a chunk's tokens for matrices of `rows` rows, `[tokens, rows]` float32.

        Raises:
            PipelineError: The context has no token ids, or one that the artefact does not know.
        """
        ids = context.get(".token")
        if ids is None:
            raise PipelineError("stage 'predict' needs the token ids of the chunk: give them with the context")
        table = self._data().matrix(self.name, "tokens", (-1, -1))
        if int(ids.max()) >= len(table):
            raise PipelineError(f"stage 'predict': token {int(ids.max())} is beyond the artefact's {len(table)}")
        return features(table, ids, tokens, self._window(rows, table.shape[1]))

    def _predict(self, planes: Planes, specs: Specs) -> dict[str, torch.Tensor]:
        """`[layers, tokens, kv_heads, head_dim]` float32 for every plane."""
        found: dict[str, torch.Tensor] = {}
        inputs = torch.empty(0, 0)
        for name in require_floats(self.name, specs):
            shape = specs[name].shape
            matrices = self.matrices(name, planes[".layer"].tolist(), shape[2] * shape[3])
            if inputs.shape[1] != len(matrices[0]):
                inputs = self.inputs(planes, shape[1], len(matrices[0]))
            found[name] = torch.stack([inputs @ matrix for matrix in matrices]).view(shape)
        return found

    def _window(self, rows: int, dims: int) -> int:
        """Tokens that a matrix looks at."""
        window = (rows - 1) // max(dims, 1)
        if rows != window * dims + 1 or not 1 <= window <= HISTORY + 1:
            raise PipelineError(
                f"stage 'predict': artefact {self.artefact} has matrices of {rows} rows for tokens of {dims} dimensions"
            )
        return window

    def _data(self) -> Artefact:
        if self.data is None:
            raise PipelineError("stage 'predict' needs a calibration artefact: make one with 'kvstore calibrate'")
        return self.data
