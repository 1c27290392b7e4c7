"""Every stage there is: a new one is a file of its own and a line here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kvstore.codecs.absmax import AbsMax
from kvstore.codecs.anchor import Anchor
from kvstore.codecs.ans import Ans
from kvstore.codecs.codebook import Codebook
from kvstore.codecs.exponent import Exponent
from kvstore.codecs.fp8 import Fp8
from kvstore.codecs.hadamard import Hadamard
from kvstore.codecs.importance import Importance
from kvstore.codecs.keep import Keep
from kvstore.codecs.klt import Klt
from kvstore.codecs.mean import Mean
from kvstore.codecs.minmax import MinMax
from kvstore.codecs.nested import Nested
from kvstore.codecs.pack import Pack
from kvstore.codecs.predict import Predict
from kvstore.codecs.rans import Rans
from kvstore.codecs.raw import Raw
from kvstore.codecs.repeats import Repeats
from kvstore.codecs.rope import UndoRope
from kvstore.codecs.step import Step
from kvstore.codecs.weigh import Weigh
from kvstore.codecs.zstd import Zstd

STAGES: Mapping[str, type[Any]] = MappingProxyType(
    {
        stage.name: stage
        for stage in (
            Importance,
            UndoRope,
            Mean,
            Predict,
            Repeats,
            Weigh,
            Hadamard,
            Klt,
            Step,
            Nested,
            Rans,
            Pack,
            Keep,
            Anchor,
            MinMax,
            AbsMax,
            Codebook,
            Fp8,
            Exponent,
            Ans,
            Zstd,
            Raw,
        )
    }
)
"""Every stage by the name that pipelines call it."""
