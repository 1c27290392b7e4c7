"""Published methods as pipelines of our stages: what each quantises and codes, in our container.

Functions make a method at other settings than its default; `RECOMPOSITIONS` holds the defaults.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from kvstore.errors import PipelineError
from kvstore.header import StageSpec

Spec = tuple[StageSpec, ...]

_RAW: StageSpec = {"stage": "raw"}
_CACHEGEN_LEVELS = {1: (16, 0.63, 12, 16, 0.15, 12), 2: (32, 0.32, 16, 32, 0.15, 16)}
"""CacheGen's levels: bins of the first layers, their share and bins of the rest, for K and then for V."""
_PACKED_BITS = (1, 2, 4)


def _stage(name: str, **options: object) -> StageSpec:
    """A stage; options that are empty, zero or false are defaults and are left out."""
    return {"stage": name, **{key: value for key, value in options.items() if value}}


def kvserve(
    k_levels: int = 12, v_levels: int = 8, low_k: int = 0, low_v: int = 0, low_heads: Sequence[int] = ()
) -> Spec:
    """KVServe (arXiv 2605.13734): Hadamard, min-max of K by channel and of V by token, ANS.

    Tables by layer are kinder to it than those of nvCOMP, which knows nothing of layers.

    Args:
        k_levels: Levels of K in the heads of the high class.
        v_levels: Levels of V in them.
        low_k: Levels of K in the heads of the low class, 0 where all heads are alike.
        low_v: Levels of V in them.
        low_heads: Heads of the low class, `layer * heads + head`.
    """
    low = list(low_heads)
    return (
        _stage("hadamard"),
        _stage("minmax", planes=["k"], levels=k_levels, per="channel", low_levels=low_k, low_heads=low),
        _stage("minmax", planes=["v"], levels=v_levels, per="token", low_levels=low_v, low_heads=low),
        _stage("ans", tables="layer"),
        _RAW,
    )


def cachegen(layers: int = 32, level: int = 1) -> Spec:
    """CacheGen (arXiv 2310.07240) as its published code quantises: bins by layer, an entropy coder by channel.

    Args:
        layers: Layers of the model.
        level: Quality: 1, or 2, which is the finer one.

    Raises:
        PipelineError: There is no such level.
    """
    if level not in _CACHEGEN_LEVELS:
        raise PipelineError(f"CacheGen has the levels {sorted(_CACHEGEN_LEVELS)}, not {level!r}")
    k_first, k_share, k_rest, v_first, v_share, v_rest = _CACHEGEN_LEVELS[level]
    k_layers, v_layers = max(1, int(k_share * layers)), max(2, int(v_share * layers))
    return (
        _stage("absmax", planes=["k"], bins=k_rest, first_bins=k_first, first_layers=k_layers),
        _stage("absmax", planes=["v"], bins=v_rest, first_bins=v_first, first_layers=v_layers),
        _stage("ans", tables="channel"),
        _RAW,
    )


def kivi(bits: int = 2, group: int = 32) -> Spec:
    """KIVI (arXiv 2402.02750): K by channel in groups of tokens, V by token in groups of dimensions, packed.

    Args:
        bits: Bits of a code.
        group: Elements that share a step and a least value.
    """
    return (
        _stage("minmax", planes=["k"], levels=1 << bits, per="channel", group=group),
        _stage("minmax", planes=["v"], levels=1 << bits, per="token", group=group),
        _stage("pack"),
        _RAW,
    )


def turboquant(bits: int = 4) -> Spec:
    """TurboQuant (arXiv 2504.19874), the codec for the mean squared error: rotation, norm, Lloyd-Max codebook.

    Codes of 3 and 5 bits do not fill bytes and are entropy coded, which takes a little less than their bits.

    Args:
        bits: Bits of a code, 1 to 5.
    """
    coder = _stage("pack") if bits in _PACKED_BITS else _stage("ans", tables="plane")
    return (_stage("hadamard"), _stage("codebook", bits=bits), coder, _RAW)


def splitzip() -> Spec:
    """SplitZip: bfloat16 without loss, a nibble for the 16 most frequent exponents."""
    return (_stage("exponent"), _stage("pack"), _RAW)


def exponent_ans() -> Spec:
    """The same with the nibbles entropy coded, as DFloat11 (arXiv 2504.11651) codes exponents."""
    return (_stage("exponent"), _stage("ans", tables="layer"), _RAW)


def fp8() -> Spec:
    """Eight-bit floats with one scale a head."""
    return (_stage("fp8"), _RAW)


def zstd(level: int = 3) -> Spec:
    """Zstandard on transposed bytes, without loss, for planes of any dtype."""
    return (_stage("zstd", level=level, shuffle=True), _RAW)


RECOMPOSITIONS: Mapping[str, Spec] = MappingProxyType(
    {
        "kvserve": kvserve(),
        "cachegen": cachegen(),
        "kivi": kivi(),
        "turboquant": turboquant(),
        "splitzip": splitzip(),
        "exponent-ans": exponent_ans(),
        "fp8": fp8(),
        "zstd": zstd(),
    }
)
"""Methods by name, at their defaults (CacheGen: for a model of 32 layers)."""
