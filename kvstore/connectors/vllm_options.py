"""Options of the vLLM connector: what `kv_connector_extra_config` may say, checked at start."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from kvstore.codecs import Pipeline, named_pipeline
from kvstore.codecs.artefact import artefact_digest
from kvstore.config import parse_size, parse_url
from kvstore.connectors.paged import check_chunk_tokens
from kvstore.errors import ConfigError, PipelineError, RequestError
from kvstore.plan import NATS_MAX, label

_LEVEL_MAX = 15


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the connector, by the names that `kv_connector_extra_config` uses.

    Args:
        url: The server, such as `http://127.0.0.1:8420`.
        token: Bearer token, where the server asks for one.
        pipeline: How chunks are encoded; `raw` keeps every bit.
        artefact: File of `kvstore calibrate`, for pipelines that need one.
        level: Highest quality level to fetch; all that are held by default.
        chunk_tokens: Tokens of a chunk; a multiple of the engine's block.
        store_derived: Whether chunks that were computed behind a lossily loaded prefix are stored, marked as such.
        local_memory: Budget of a cache of fetched chunks in this worker's memory; 0 is none.
        deadline_s: Time that a load may take; what has not come by then is computed.
        match_s: Time that a request may wait for the answer what is stored.
        wait_s: Time that a request with `do_remote_prefill` waits for the chunks that a prefill engine is about to put.
        queue_bytes: Memory for chunks that wait to be encoded and sent; what does not fit is not stored.
        flush_s: Time that unsent chunks get at shutdown.
        plan: Whether loads and saves go as the server plans them, where profiles were pushed for the model.
        budget_nats: Largest quality loss of planned loads; the server's default by default.
        workload: Kind of text, as in the buckets that quality was measured in.
        guard: Whether a fetch that is expected to take longer than computing is left out.
        revision: Identity of the weights; by default a digest of them, or the commit of a Hugging Face model.
        fail_open: Whether the engine runs without the cache where this cannot work; else it does not start.
        untested_version: Whether to run with versions of the engine that were not tested.
    """

    url: str
    token: str | None = field(default=None, repr=False)
    pipeline: str = "raw"
    artefact: Path | None = None
    level: int | None = None
    chunk_tokens: int = 256
    store_derived: bool = False
    local_memory: int = 0
    deadline_s: float = 10.0
    match_s: float = 1.0
    wait_s: float = 5.0
    queue_bytes: int = 512 << 20
    flush_s: float = 2.0
    plan: bool = True
    budget_nats: float | None = None
    workload: str = "text"
    guard: bool = True
    revision: str | None = None
    fail_open: bool = True
    untested_version: bool = False

    def codec(self) -> tuple[Pipeline, dict[str, bytes]]:
        """The pipeline, and the artefacts by digest.

        Raises:
            ConfigError: There is no such pipeline, or its artefact is missing or damaged.
        """
        artefacts: dict[str, bytes] = {}
        if self.artefact is not None:
            try:
                data = self.artefact.read_bytes()
            except OSError as exc:
                raise ConfigError(f"artefact: cannot read {self.artefact}: {exc}") from exc
            artefacts = {artefact_digest(data): data}
        try:
            return named_pipeline(self.pipeline, artefacts), artefacts
        except PipelineError as exc:
            raise ConfigError(f"pipeline: {exc}; an artefact is named by the option 'artefact'") from exc


def is_fail_open(extra: Mapping[str, Any]) -> bool:
    """What `fail_open` says, whatever else is wrong; only a plain false stops the engine."""
    return extra.get("fail_open", True) is not False


def read_options(extra: Mapping[str, Any], *, block_tokens: int) -> Options:
    """Options from `kv_connector_extra_config`.

    Args:
        extra: Options by name.
        block_tokens: Tokens of the engine's block.

    Raises:
        ConfigError: An option is unknown, missing or out of range; the message names it and the remedy.
    """
    known = [setting.name for setting in fields(Options)]
    unknown = sorted(extra.keys() - set(known))
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} in kv_connector_extra_config; known: {', '.join(known)}")
    if "url" not in extra:
        raise ConfigError("option 'url' is missing: set it to the server's address, such as http://127.0.0.1:8420")
    options = Options(**{name: _convert(name, value) for name, value in extra.items()})
    if options.chunk_tokens < 1:
        raise ConfigError(f"option 'chunk_tokens' must be at least {block_tokens}, not {options.chunk_tokens}")
    check_chunk_tokens(options.chunk_tokens, block_tokens)
    options.codec()
    return options


def _convert(name: str, value: object) -> Any:
    try:
        return _CONVERTERS[name](value)
    except (ConfigError, TypeError, ValueError) as exc:
        raise ConfigError(f"option {name!r} cannot be {value!r}: {exc}") from exc


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError("it must be a text")
    return value


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError("it must be true or false")
    return value


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError("it must be a whole number")
    return value


def _level(value: object) -> int | None:
    if value is not None and not 0 <= _whole(value) <= _LEVEL_MAX:
        raise ConfigError(f"it must be 0 to {_LEVEL_MAX}, or null for all levels")
    return None if value is None else _whole(value)


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise ConfigError("it must be a positive number of seconds")
    return float(value)


def _nats(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= NATS_MAX:
        raise ConfigError(f"it must be a number of nats from 0 to {NATS_MAX:g}")
    return float(value)


def _workload(value: object) -> str:
    try:
        return label(value, "it")
    except RequestError as exc:
        raise ConfigError(str(exc)) from exc


def _queue(value: object) -> int:
    size_bytes = parse_size(value)
    if size_bytes < 1 << 20:
        raise ConfigError("it must be at least 1MiB")
    return size_bytes


def _optional(convert: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value is None else convert(value)


_CONVERTERS: Mapping[str, Callable[[object], Any]] = {
    "url": parse_url,
    "token": _optional(_text),
    "pipeline": _text,
    "artefact": _optional(lambda value: Path(_text(value))),
    "level": _level,
    "chunk_tokens": _whole,
    "store_derived": _boolean,
    "local_memory": parse_size,
    "deadline_s": _seconds,
    "match_s": _seconds,
    "wait_s": _seconds,
    "queue_bytes": _queue,
    "flush_s": _seconds,
    "plan": _boolean,
    "budget_nats": _optional(_nats),
    "workload": _workload,
    "guard": _boolean,
    "revision": _optional(_text),
    "fail_open": _boolean,
    "untested_version": _boolean,
}
