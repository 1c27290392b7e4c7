"""Predictions from token ids on the device: a plain matrix product, which the product of a basis adds as means."""

from collections.abc import Sequence

import torch

from kvstore.codecs.predict import Predict
from kvstore.codecs.stage import Planes
from kvstore.layout import Layout


def predictions(stage: Predict, layout: Layout, known: Sequence[Planes], device: torch.device) -> torch.Tensor:
    """What the stage adds to every vector.

    Args:
        stage: Bound to its artefact.
        layout: The caller's layout.
        known: Context of every chunk, with `.token`.
        device: Where to compute.

    Returns:
        `[chunks, planes, layers, tokens, heads * dim]` float16.

    Raises:
        PipelineError: Token ids are missing, or beyond the artefact's.
    """
    spec = next(iter(layout.planes.values()))
    width = spec.shape[2] * spec.shape[3]
    # [rows, planes * layers * width]
    matrix = torch.cat([m for name in layout.planes for m in stage.matrices(name, range(layout.layers), width)], 1)
    inputs = torch.cat([stage.inputs(planes, layout.chunk_tokens, len(matrix)) for planes in known])
    found = inputs.to(device) @ matrix.to(device)
    shape = (len(known), layout.chunk_tokens, len(layout.planes), layout.layers, width)
    return found.view(shape).permute(0, 2, 3, 1, 4).half().contiguous()
