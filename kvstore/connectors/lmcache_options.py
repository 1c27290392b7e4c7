"""Options of the LMCache connector: one table of names, types and remedies for both of its faces."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import torch

from kvstore.codecs import Pipeline, encode, named_pipeline
from kvstore.config import parse_size, parse_url
from kvstore.errors import ConfigError, PipelineError, RequestError
from kvstore.keys import ChunkKey, namespace_of
from kvstore.layout import attention_layout
from kvstore.plan import NATS_MAX, label

_LEVEL_MAX = 15
_THREADS_MAX = 64
_SHORTEST_S = 1e-6
_NUMBER_MAX = 1e9


class Role(StrEnum):
    """What this LMCache does with the store."""

    BOTH = "both"
    PRODUCER = "producer"
    """It only stores."""
    CONSUMER = "consumer"
    """It only loads."""


class SinglePlane(StrEnum):
    """What a chunk is of which LMCache only says `[layers, tokens, hidden]`."""

    OPAQUE = "opaque"
    """Unknown: stored without loss."""
    LATENT = "latent"
    """The latent vectors of MLA."""
    FUSED = "fused"
    """K beside V in every head, as current vLLM has it on GPUs; needs `head_dim`."""


@dataclass(frozen=True, kw_only=True)
class LMCacheOptions:
    """Options of `adapter_params` (L2 adapter) or `remote_storage_plugin.NAME.*` (remote connector).

    Args:
        url: The server, such as `http://127.0.0.1:8420`.
        token: Bearer token; by default what `KVSTORE_TOKEN` in the environment says.
        revision: Revision of the model's weights, or whatever else changes its KV cache; LMCache's keys only name the
            model.
        pipeline: How chunks are encoded, by the name of a pipeline.
        level: Highest quality level to load; None loads all that are held.
        head_dim: Dimensions of a head; 0 takes what LMCache says, else all heads as one.
        single_plane: What chunks of one plane hold, for lossy pipelines.
        role: Whether this LMCache stores, loads, or both.
        store_derived: Store with a lossy pipeline what may have been computed behind a lossy prefix.
        local_memory_bytes: Budget of a local tier of encoded chunks in front of the server; 0 runs without one.
        lookup_deadline_s: Longest time that a look-up waits for the server.
        deadline_s: Longest time that a load waits for it.
        store_timeout_s: Longest time that one request to store takes.
        flush_timeout_s: Time that stores under way get when LMCache closes.
        queue_bytes: Bytes of chunks that may be on their way to the server; what comes on top is not stored.
        threads: Threads that encode and decode.
        prefill_tokens_per_s: Tokens that the engine prefills in a second; what is expected to take longer to fetch is
            not found then. 0 where unknown: everything is fetched.
        plan: Load and store as the server plans it, where profiles were pushed for the namespace.
        budget_nats: Largest quality loss of planned loads; None for the server's default.
        workload: Kind of text, as in the buckets that quality was measured in.
        fail_open: Run without the store where it cannot be used at start; else LMCache does not start.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    revision: str = ""
    pipeline: str = "raw"
    level: int | None = None
    head_dim: int = 0
    single_plane: SinglePlane = SinglePlane.OPAQUE
    role: Role = Role.BOTH
    store_derived: bool = False
    local_memory_bytes: int = 0
    lookup_deadline_s: float = 0.5
    deadline_s: float = 5.0
    store_timeout_s: float = 30.0
    flush_timeout_s: float = 5.0
    queue_bytes: int = 512 << 20
    threads: int = 2
    prefill_tokens_per_s: float = 0.0
    plan: bool = False
    budget_nats: float | None = None
    workload: str = "text"
    fail_open: bool = True

    def __post_init__(self) -> None:
        try:
            parse_url(self.url)
        except ConfigError as exc:
            raise ConfigError(f"url: {exc}") from exc
        if self.level is not None and not 0 <= self.level <= _LEVEL_MAX:
            raise ConfigError(f"level: must be 0 to {_LEVEL_MAX}, not {self.level}; leave it out to load all levels")
        if not 0 <= self.head_dim <= 1 << 16:
            raise ConfigError(f"head_dim: must be 0 to 65536, not {self.head_dim}")
        if not 1 <= self.threads <= _THREADS_MAX:
            raise ConfigError(f"threads: must be 1 to {_THREADS_MAX}, not {self.threads}")
        if self.single_plane is SinglePlane.FUSED and not self.head_dim:
            raise ConfigError("single_plane: 'fused' needs head_dim, to tell K from V")
        if 0 < self.local_memory_bytes < 1 << 20:
            raise ConfigError(f"local_memory: must be 0 or at least 1MiB, not {self.local_memory_bytes} bytes")
        try:
            label(self.workload, "workload")
        except RequestError as exc:
            raise ConfigError(f"workload: {exc}") from exc
        if self.budget_nats is not None and self.budget_nats > NATS_MAX:
            raise ConfigError(f"budget_nats: must be at most {NATS_MAX:g}")
        self._check_pipeline()

    @property
    def lossless(self) -> bool:
        """Whether what is loaded equals what was stored, bit for bit."""
        return self.build_pipeline().lossless

    def build_pipeline(self) -> Pipeline:
        """The pipeline that `pipeline` names."""
        return named_pipeline(self.pipeline)

    def _check_pipeline(self) -> None:
        try:
            pipeline = self.build_pipeline()
            check_usable(pipeline)
        except PipelineError as exc:
            raise ConfigError(
                f"pipeline: {self.pipeline!r} cannot be used here, as LMCache tells neither positions nor token ids "
                f"of a chunk ({exc}); use raw, splitzip, zstd, ladder-packed or another one without them"
            ) from exc
        lossy = [f"pipeline: {self.pipeline!r} is"] * (not pipeline.lossless) + ["plan: profiles are"] * self.plan
        if lossy and self.role is Role.BOTH and not self.store_derived:
            raise ConfigError(
                f"{lossy[0]} lossy, and LMCache does not tell which chunks were computed behind "
                "what it loaded: errors would add up. Set role to producer here and to consumer where chunks are "
                "loaded, or accept it with store_derived: true"
            )


def parse_options(given: Mapping[str, object], environ: Mapping[str, str] | None = None) -> LMCacheOptions:
    """Options from what LMCache hands over.

    Args:
        given: Values by option name.
        environ: Environment; the process's own by default.

    Raises:
        ConfigError: An option is missing, unknown or out of range; the message names it and the remedy.
    """
    environ = os.environ if environ is None else environ
    by_name = {_public_name(option.name): option.name for option in fields(LMCacheOptions)}
    unknown = [name for name in given if name not in by_name]
    if unknown:
        raise ConfigError(f"{unknown[0]}: there is no such option; known: {', '.join(sorted(by_name))}")
    if "url" not in given:
        raise ConfigError("url: is missing; name the server, such as http://127.0.0.1:8420")
    options: dict[str, Any] = {by_name[name]: _convert(name, value) for name, value in given.items()}
    options.setdefault("token", environ.get("KVSTORE_TOKEN"))
    return LMCacheOptions(**options)


def fails_open(given: Mapping[str, object]) -> bool:
    """What `fail_open` says where other options may be wrong; one that cannot be understood is the default."""
    try:
        return bool(_boolean(given.get("fail_open", True)))
    except ConfigError:
        return True


def _public_name(name: str) -> str:
    return "local_memory" if name == "local_memory_bytes" else name


def _convert(name: str, value: object) -> object:
    try:
        if name in ("store_derived", "fail_open", "plan"):
            return _boolean(value)
        if name in ("local_memory", "queue_bytes"):
            return parse_size(value)
        if name == "budget_nats":
            return None if value is None else _number(value, "0 or a positive number of nats", at_least=0)
        if name == "prefill_tokens_per_s":
            return _number(value, "0 or a positive number of tokens", at_least=0)
        if name.endswith("_s"):
            return _number(value, "a positive number of seconds", at_least=_SHORTEST_S)
        if name in ("head_dim", "threads"):
            return _integer(value)
        if name == "level":
            return None if value is None else _integer(value)
        if name == "role":
            return _choice(Role, value)
        if name == "single_plane":
            return _choice(SinglePlane, value)
    except ConfigError as exc:
        raise ConfigError(f"{name}: {exc}") from exc
    if not isinstance(value, str):
        raise ConfigError(f"{name}: {value!r} is not a text")
    return value


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() not in ("true", "false"):
        raise ConfigError(f"{value!r} is neither true nor false")
    return str(value).lower() == "true"


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"{value!r} is not a whole number")
    try:
        return int(value)
    except ValueError as exc:
        raise ConfigError(f"{value!r} is not a whole number") from exc


def _number(value: object, what: str, *, at_least: float) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if at_least <= number < _NUMBER_MAX:
            return number
    raise ConfigError(f"{value!r} must be {what}")


def _choice(choices: type[StrEnum], value: object) -> StrEnum:
    try:
        return choices(str(value))
    except ValueError as exc:
        raise ConfigError(f"must be one of {', '.join(choices)}, not {value!r}") from exc


def check_usable(pipeline: Pipeline) -> None:
    """Encode a small chunk of which as little is known as of LMCache's; also loads what stages compile.

    Raises:
        PipelineError: The pipeline needs to know more.
    """
    layout = attention_layout("trial", "", layers=1, kv_heads=1, head_dim=64, chunk_tokens=16)
    planes = {name: torch.ones(spec.shape, dtype=torch.bfloat16) for name, spec in layout.planes.items()}
    encode(planes, layout, pipeline, key=ChunkKey(namespace_of(layout) + bytes(32)))
