"""Every kernel against its reference, under triton's interpreter or on a GPU, and compiled for two GPUs."""

import dataclasses
import inspect
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from kvstore.codecs import NAMED, Context, build_pipeline, decode, encode
from kvstore.codecs.kernels import decode as kernels_decode
from kvstore.codecs.kernels import decoding, dequantise
from kvstore.codecs.kernels import encode as encoding
from kvstore.codecs.kernels.decode import check_supported, decode_into_pages
from kvstore.codecs.kernels.paged import PagedCache
from kvstore.codecs.named import ladder_klt, ladder_tokens, ladder_weighted
from kvstore.codecs.rans import Rans
from kvstore.codecs.ref import absmax, codebook, fp8, hadamard, minmax, pack, rope, step
from kvstore.codecs.stage import TORCH_DTYPES
from kvstore.errors import FrameCorruptError, PipelineError
from kvstore.frame import Frame, pack_frame
from kvstore.keys import chunk_keys
from kvstore.layout import Layout, PlaneSpec, Rope, attention_layout
from tests.codec_cases import artefacts_of, make_tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_TOKENS = 4
ROPE = Rope(10000.0, 32)
GROUPED = attention_layout("m", "r", layers=3, kv_heads=2, head_dim=32, chunk_tokens=3, rope=ROPE)
FLOAT32 = dataclasses.replace(
    GROUPED, planes={name: dataclasses.replace(spec, dtype="float32") for name, spec in GROUPED.planes.items()}
)
PARTIAL = dataclasses.replace(GROUPED, rope=Rope(10000.0, 16))
NEIGHBOURS = dataclasses.replace(GROUPED, rope=Rope(10000.0, 32, interleaved=True))
FEW_NEIGHBOURS = dataclasses.replace(GROUPED, rope=Rope(10000.0, 16, interleaved=True))
ONE_LAYER = attention_layout("m", "r", layers=1, kv_heads=1, head_dim=64, chunk_tokens=3, rope=Rope(10000.0, 64))
MLA = Layout("m", "r", {"latent": PlaneSpec("bfloat16", (2, 5, 1, 64))}, chunk_tokens=5)
Stages = Sequence[Mapping[str, Any]]


def ladder(*, mean: Mapping[str, Any] | None = None, rope: bool = True, **options: Any) -> Stages:
    """`ladder` with options of `nested` and `rans`."""
    coder = {name: options.pop(name) for name in ("packed_from",) if name in options}
    packed = [{"stage": "pack"}] if coder else []
    grid = {"stage": "nested", **options}
    head = [{"stage": "rope"}] if rope else []
    means = {"stage": "mean", **(mean or {})}
    return [*head, means, {"stage": "hadamard"}, grid, {"stage": "rans", **coder}, *packed, {"stage": "raw"}]


def stepped(levels: int = 3, *, rope: bool = True) -> Stages:
    """`ladder-packed` with rotary embedding undone."""
    head = [{"stage": "rope"}] if rope else []
    grid = {"stage": "step", "levels": levels}
    return [*head, {"stage": "mean"}, {"stage": "hadamard"}, grid, {"stage": "pack"}, {"stage": "raw"}]


class Case(NamedTuple):
    """Chunks and the cache that they are decoded into; `lanes` are what the coder takes in turns."""

    stages: Stages
    layout: Layout = GROUPED
    pages: str = "nhd"
    dtype: torch.dtype = torch.float32
    lanes: tuple[int, ...] = (64,)
    group_layers: int = 0
    basis: Mapping[str, Any] | None = None
    chunks: int = 1


def calibrated(make: Any, **basis: Any) -> Case:
    """A calibrated pipeline with a basis of some kind."""
    artefacts = artefacts_for(GROUPED, basis)
    return Case(make(next(iter(artefacts)), levels=2, step=-200), basis=basis, lanes=(256,))


def capped(make: Any) -> Any:
    """The same pipeline with half of the coefficients of its basis."""

    def make_capped(artefact: str, **settings: Any) -> Any:
        return tuple(
            {**stage, "rank": 20} if stage["stage"] == "klt" else stage for stage in make(artefact, **settings)
        )

    return make_capped


def artefacts_for(layout: Layout, basis: Mapping[str, Any]) -> dict[str, bytes]:
    card = {"group_layers": basis.get("group_layers", 1), "joint": basis.get("joint", False)}
    return artefacts_of(make_tensors(layout, **basis), **card)


CASES = {
    "packed": Case(NAMED["ladder-packed"], dtype=torch.bfloat16, chunks=2),
    "packed hnd": Case(NAMED["ladder-packed"], pages="hnd", dtype=torch.float16),
    "packed blocks first": Case(stepped(), pages="blocks_first", dtype=torch.bfloat16),
    "packed joined": Case(stepped(), FLOAT32, pages="joined"),
    "packed apart": Case(stepped(), NEIGHBOURS, pages="nhd_pair", dtype=torch.bfloat16),
    "packed partial": Case(stepped(5), PARTIAL, pages="hnd_pair", group_layers=2),
    "packed mla": Case(NAMED["ladder-packed"], MLA, pages="mla", dtype=torch.bfloat16),
    "rans": Case(ladder(), chunks=2, group_layers=2),
    "rans one layer": Case(ladder(mean={"coarse": True}), ONE_LAYER, dtype=torch.bfloat16, pages="hnd", lanes=(16,)),
    "rans lanes differ": Case(ladder(mean={"coarse": True}), PARTIAL, lanes=(32, 128, 64), dtype=torch.float16),
    "rans wide": Case(ladder(step=-100, levels=2), FEW_NEIGHBOURS, pages="joined"),
    "rans packed": Case(ladder(step=-60, packed_from=1), NEIGHBOURS),
    "rans packed later": Case(ladder(packed_from=2), dtype=torch.bfloat16),
    "rans mla": Case(ladder(rope=False), MLA, pages="mla", lanes=(32,)),
    "rans few lanes": Case(ladder(levels=2), ONE_LAYER, lanes=(8,)),
    "rans few lanes packed": Case(ladder(levels=2, step=-40, packed_from=1), ONE_LAYER, lanes=(8,)),
    "rans five levels": Case(ladder(levels=5, step=120), ONE_LAYER, lanes=(64,)),
    "weighted": calibrated(ladder_weighted),
    "klt by head": calibrated(ladder_klt, by_head=True),
    "klt over heads": calibrated(ladder_klt),
    "klt over layers": calibrated(ladder_klt, group_layers=2),
    "klt joint": calibrated(ladder_klt, joint=True),
    "klt predicted": calibrated(ladder_tokens, joint=True, window=2),
    "klt predicted over layers": calibrated(ladder_tokens, group_layers=2, window=1),
    "klt joint over layers": calibrated(ladder_klt, group_layers=2, joint=True),
    "klt capped": calibrated(capped(ladder_klt)),
    "klt capped over layers": calibrated(capped(ladder_klt), group_layers=2),
}


AT_EVERY_LEVEL = ("packed", "packed partial", "rans", "rans packed", "rans few lanes", "klt over layers")


class Chunks(NamedTuple):
    """A case with everything made."""

    frames: list[Frame]
    layout: Layout
    artefacts: dict[str, bytes]
    keys: list[bytes]
    cache: PagedCache
    slots: torch.Tensor

    @property
    def token_ids(self) -> list[range]:
        return [range((number + 1) * self.layout.chunk_tokens) for number in range(len(self.frames))]

    def decode(self, level: int | None = None) -> None:
        decode_into_pages(
            self.frames,
            self.layout,
            self.artefacts,
            self.cache,
            self.slots,
            keys=self.keys,  # type: ignore[arg-type]
            token_ids=self.token_ids,
            level=level,
        )

    def clear(self) -> None:
        """Every element that no kernel writes stays NaN."""
        for views in self.cache.planes.values():
            for view in views:
                view.fill_(torch.nan)


def cache_of(layout: Layout, pages: str, dtype: torch.dtype, blocks: int) -> PagedCache:
    _, _, heads, dim = next(iter(layout.planes.values())).shape
    shape = {
        "nhd": (2, blocks, BLOCK_TOKENS, heads, dim),
        "nhd_pair": (blocks, BLOCK_TOKENS, heads, dim),
        "hnd": (2, blocks, heads, BLOCK_TOKENS, dim),
        "hnd_pair": (blocks, heads, BLOCK_TOKENS, dim),
        "blocks_first": (blocks, 2, BLOCK_TOKENS, heads, dim),
        "joined": (blocks, heads, BLOCK_TOKENS, 2 * dim),
        "mla": (blocks, BLOCK_TOKENS, dim),
    }[pages]
    sets = [[torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(layout.layers)] for _ in "kv"]
    make = getattr(PagedCache, pages)
    cache: PagedCache = make(*sets) if pages.endswith("_pair") else make(sets[0])
    return cache


def chunks_of(case: Case, monkeypatch: pytest.MonkeyPatch) -> Chunks:
    """Encode with as many lanes as the case wants: such small chunks would have one."""
    if DEVICE == "cpu":
        # Programs run one after the other here.
        monkeypatch.setattr(decoding, "_LANES", 256)
    turns = itertools.cycle(case.lanes)
    monkeypatch.setattr(Rans, "_lanes_for", lambda *_: next(turns))
    layout = case.layout
    artefacts = {} if case.basis is None else artefacts_for(layout, case.basis)
    pipeline = build_pipeline(case.stages, artefacts)
    tokens = layout.chunk_tokens
    keys = list(chunk_keys(layout, range(tokens * case.chunks)))
    generator = torch.Generator().manual_seed(0)
    frames = []
    for number, key in enumerate(keys):
        planes = {}
        for name, spec in layout.planes.items():
            x = torch.randn(spec.shape, generator=generator)
            x[..., 0] += 5
            planes[name] = x.to(TORCH_DTYPES[spec.dtype])
        context = Context(number * tokens, case.group_layers, token_ids=range((number + 1) * tokens))
        frames.append(encode(planes, layout, pipeline, key=key, context=context))
    blocks = tokens * case.chunks // BLOCK_TOKENS + 2
    slots = torch.randperm(blocks * BLOCK_TOKENS, generator=generator)[: case.chunks * tokens].view(-1, tokens)
    slots[0, 1] = -1
    return Chunks(frames, layout, artefacts, list(keys), cache_of(layout, case.pages, case.dtype, blocks), slots)


def check_level(chunks: Chunks, level: int, dtype: torch.dtype) -> None:
    """Values are float16 on their way, so errors are compared with the largest value of a vector.

    The interpreter cuts bfloat16 off where a GPU rounds, hence a whole unit in the last place.
    """
    unit = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    written = 0
    for frame, key, ids, row in zip(chunks.frames, chunks.keys, chunks.token_ids, chunks.slots, strict=True):
        out = {name: torch.empty(spec.shape) for name, spec in chunks.layout.planes.items()}
        cut = frame.truncated(level)
        decode(cut, chunks.layout, chunks.artefacts, key=key, token_ids=ids, out=out)  # type: ignore[arg-type]
        for name, exact in out.items():
            for layer, view in enumerate(chunks.cache.planes[name]):
                used = row >= 0
                found = (
                    view[(row[used] // BLOCK_TOKENS).to(DEVICE), (row[used] % BLOCK_TOKENS).to(DEVICE)].float().cpu()
                )
                wanted = exact[layer, used]
                bound = 2**-9 * wanted.abs().amax(-1, keepdim=True) + unit * wanted.abs() + 1e-6
                assert bool(((found - wanted).abs() <= bound).all()), (name, layer, (found - wanted).abs().max())
                written += found.numel()
    values = sum(int((~view.isnan()).sum()) for views in chunks.cache.planes.values() for view in views)
    assert values == written, "only the slots are written"


@pytest.mark.parametrize("name", CASES)
def test_kernels_decode_what_the_reference_decodes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_of(CASES[name], monkeypatch)
    assert check_supported(chunks.frames, chunks.layout, chunks.artefacts)
    finest = chunks.frames[0].levels - 1
    for level in range(0 if name in AT_EVERY_LEVEL else finest, finest + 1):
        chunks.clear()
        chunks.decode(level)
        check_level(chunks, level, CASES[name].dtype)


def damaged(frame: Frame, plane: str, change: Any) -> Frame:
    """The frame with the bytes of a plane of its first group changed, under checksums that fit."""
    parts = []
    for _, group, name, view in frame.segments():
        part = bytearray(view)
        parts.append(change(part) if group == 0 and name == plane else part)
    return pack_frame(frame.head.header, parts)


def flip_last(part: bytearray) -> bytearray:
    part[-1] ^= 0x5A
    return part


def flip_state(part: bytearray) -> bytearray:
    part[5] ^= 0x21
    return part


def no_header(part: bytearray) -> bytearray:
    part[:4] = b"\xff" * 4
    return part


@pytest.mark.parametrize(
    ("name", "plane", "change"),
    [
        ("rans", "k.0", flip_last),
        ("rans", "v.1", flip_state),
        ("rans", "v.2", no_header),
        ("rans few lanes", "v.1", flip_last),
        ("rans few lanes", "k.0", flip_state),
        ("klt over heads", "k.0", flip_last),
        ("klt over heads", "v.1", flip_state),
    ],
)
def test_damaged_streams_are_refused_by_name(
    name: str, plane: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = chunks_of(CASES[name]._replace(chunks=1), monkeypatch)
    chunks.frames[0] = damaged(chunks.frames[0], plane, change)
    with pytest.raises(FrameCorruptError, match=f"'rans': plane '{plane}'"):
        chunks.decode()


def test_predictions_need_the_token_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_of(CASES["klt predicted"], monkeypatch)
    arguments = (chunks.frames, chunks.layout, chunks.artefacts, chunks.cache, chunks.slots)
    with pytest.raises(PipelineError, match="'predict' needs the token ids"):
        decode_into_pages(*arguments, keys=chunks.keys)  # type: ignore[arg-type]
    with pytest.raises(PipelineError, match="1 chunks need as many lists of token ids"):
        decode_into_pages(*arguments, keys=chunks.keys, token_ids=[[1], [2]])  # type: ignore[arg-type]


def test_slots_outside_of_the_cache_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_of(CASES["packed"], monkeypatch)
    chunks.slots[0, 0] = chunks.cache.slots
    with pytest.raises(PipelineError, match="outside of a paged cache"):
        chunks.decode()
    with pytest.raises(PipelineError, match="slots are"):
        chunks._replace(slots=chunks.slots.int()).decode()


def test_caches_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_of(CASES["packed"], monkeypatch)
    with pytest.raises(PipelineError, match="the paged cache has"):
        chunks._replace(cache=cache_of(ONE_LAYER, "nhd", torch.float32, 4)).decode()
    with pytest.raises(PipelineError, match="is not one that kernels write"):
        PagedCache.mla([torch.zeros(1, 4, 64, dtype=torch.int8)])
    with pytest.raises(PipelineError, match="does not hold K and V"):
        PagedCache.nhd([torch.zeros(3, 1, 4, 2, 32)])
    with pytest.raises(PipelineError, match="must have one shape"):
        PagedCache.mla([torch.zeros(1, 4, 64), torch.zeros(2, 4, 64)])


@pytest.mark.parametrize("name", ["raw", "kivi", "kvserve", "fp8"])
def test_pipelines_without_kernels_are_refused_with_the_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_of(Case(NAMED[name]), monkeypatch)
    assert not check_supported(chunks.frames, chunks.layout, chunks.artefacts)
    with pytest.raises(PipelineError, match=r"kvstore\.codecs\.decode"):
        chunks.decode()


def test_many_chunks_are_decoded_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_of(CASES["packed"]._replace(chunks=3), monkeypatch)
    monkeypatch.setattr(kernels_decode, "CHUNK_BYTES_MAX", 2 * GROUPED.chunk_bytes)
    chunks.decode()
    check_level(chunks, 2, CASES["packed"].dtype)


def test_a_batch_is_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = chunks_of(CASES["packed"], monkeypatch)
    chunks.frames[1] = chunks.frames[1].truncated(0)
    with pytest.raises(PipelineError, match="different numbers of levels"):
        chunks.decode()
    chunks.decode(0)
    other = chunks_of(CASES["rans"], monkeypatch)
    chunks.frames[1] = other.frames[1]
    with pytest.raises(PipelineError, match="one pipeline"):
        chunks.decode()


# Encode, and the other methods' codes.


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(DEVICE) * 3


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_steps_are_quantised_as_the_reference_does(levels: int) -> None:
    x = values(2, 5, 3, 32)
    x[0, 0, 0] = 0
    scale, index = encoding.quantise_step(x, levels)
    exact = step.scale_of(x.cpu(), levels)
    assert torch.equal(scale.cpu(), exact)
    assert torch.equal(index.cpu(), step.quantise(x.cpu(), exact, levels))


def test_nested_indices_are_those_of_float64_away_from_ties() -> None:
    x, limit = values(2, 5, 3, 32), torch.arange(32, dtype=torch.int32, device=DEVICE).expand(2, 5, 3, 32)
    width = values(2, 5, 3, 1).abs() + 0.01
    exact = (x.double() / width.double()).clamp(-limit, limit).round().int()
    assert torch.equal(encoding.quantise_nested(x, width, limit), exact)


@pytest.mark.parametrize("rotary", [None, Rope(10000.0, 32), Rope(10000.0, 16, interleaved=True)])
def test_vectors_are_canonicalised_and_rotated(rotary: Rope | None) -> None:
    x, mean = values(2, 5, 3, 32).bfloat16(), values(2, 1, 3, 32)
    planes = None if rotary is None else rope.rotary_planes(rotary, torch.arange(7, 12))
    found = encoding.canonicalise(x, planes, mean)
    turned = x.float().cpu() if planes is None else rope.unrotate(x.float().cpu(), *planes)
    assert torch.allclose(found.cpu(), turned - mean.cpu(), atol=1e-5)
    matrix = hadamard.rotation(32, 0).to(DEVICE)
    assert torch.allclose(encoding.transform(found, matrix), found @ matrix, atol=1e-4)


@pytest.mark.parametrize("elements", [1, 5, 99, 700])
def test_trits_are_packed(elements: int) -> None:
    digits = (torch.arange(elements) ** 2 % 3).to(torch.uint8)
    assert torch.equal(encoding.pack_trits(digits.to(DEVICE)).cpu(), pack.pack(digits, 3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_cannot_be_encoded_are_refused(value: float) -> None:
    x = values(1, 2, 1, 32)
    x[0, 1, 0, 3] = value
    unit = torch.ones(1, 2, 1, 1, device=DEVICE)
    limit = torch.ones(1, 2, 1, 32, dtype=torch.int32, device=DEVICE)
    for call in (
        lambda: encoding.canonicalise(x),
        lambda: encoding.transform(x, hadamard.rotation(32, 0).to(DEVICE)),
        lambda: encoding.quantise_step(x, 3),
        lambda: encoding.quantise_nested(x, unit, limit),
    ):
        with pytest.raises(PipelineError, match="NaN, infinite"):
            call()


def test_codes_of_other_methods_give_their_values() -> None:
    q = torch.randint(0, 15, (2, 5, 3, 32), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    by_channel, by_token = values(2, 1, 3, 32).abs().bfloat16().cpu(), values(2, 5, 1, 1).abs().bfloat16().cpu()
    centre = torch.tensor([5.0, 7.0]).view(2, 1, 1, 1)
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).view(1, 2, 2, 64)
    norm = codebook.norm_of(values(2, 5, 3, 32).cpu())
    pairs: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = [
        (dequantise.reconstruct_minmax, minmax.reconstruct, (q, by_channel, by_token)),
        (dequantise.reconstruct_absmax, absmax.reconstruct, (q, by_token, centre)),
        (dequantise.reconstruct_codebook, codebook.reconstruct, (q, norm, 3)),
        (dequantise.reconstruct_fp8, fp8.reconstruct, (codes, 1.5)),
        (dequantise.reconstruct_fp8, fp8.reconstruct, (codes, torch.rand(1, 1, 2, 1))),
    ]
    results = []
    for kernel, reference, arguments in pairs:
        assert list(inspect.signature(kernel).parameters) == list(inspect.signature(reference).parameters)
        there = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
        results.append((kernel(*there).cpu(), reference(*arguments)))
    for found, exact in results:
        assert torch.allclose(found, exact, rtol=1e-6, atol=1e-6, equal_nan=True)


# Compiling.

_POINTERS = {"int16": "i16", "int32": "i32", "int64": "i64", "uint8": "u8", "int8": "i8"}
_POINTERS |= {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_COMPILE = """
import importlib, json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
seen = set()
for line in sys.stdin:
    module, name, signature, constants, options = json.loads(line)
    function = getattr(importlib.import_module(module), name)
    order = list(signature)
    known = {(order.index(key),): getattr(tl, value) if isinstance(value, str) else value
             for key, value in constants.items()}
    # The first of each kernel for Ampere as well.
    for capability in (90,) if name in seen else (80, 90):
        seen.add(name)
        source = ASTSource(function, signature, known)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"] and "ld.local" not in made.asm["ptx"], name
        print(name, capability, made.metadata.shared)
"""


def signature_line(kernel: Any, arguments: Mapping[str, Any], options: Mapping[str, int]) -> str:
    """What it takes to compile a kernel for these arguments elsewhere."""
    signature, constants = {}, {}
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        value = arguments[name]
        if "constexpr" in str(parameter.annotation) or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(str(value), value)
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _POINTERS[str(value.dtype).removeprefix("torch.")]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    return json.dumps([kernel.fn.__module__, kernel.fn.__name__, signature, constants, dict(options)])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes down what kernels would be started with, and starts none."""
    lines: list[str] = []
    for module in (decoding, encoding, dequantise):
        monkeypatch.setattr(
            module,
            "run",
            lambda kernel, _, arguments, **options: lines.append(signature_line(kernel, arguments, options)),
        )
    return lines


def test_every_kernel_compiles(launched: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("packed joined", "rans lanes differ", "rans packed", "rans few lanes packed", "klt joint"):
        chunks = chunks_of(CASES[name]._replace(dtype=torch.bfloat16), monkeypatch)
        with suppress(FrameCorruptError):
            chunks.decode()
    with suppress(AssertionError):
        test_codes_of_other_methods_give_their_values()
    x = values(1, 2, 1, 32)
    encoding.canonicalise(x, rope.rotary_planes(ROPE, torch.arange(2)))
    encoding.transform(x, hadamard.rotation(32, 0))
    encoding.quantise_step(x, 3)
    encoding.quantise_nested(x, x[..., :1], x.int())
    encoding.pack_trits(x.to(torch.uint8))
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        input="\n".join(dict.fromkeys(launched)),
        env=clean | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} >= {
        "rans_tile_kernel", "step_tile_kernel", "lanes_kernel", "digits_kernel", "product_kernel", "step_kernel",
    }  # fmt: skip
