"""A vLLM engine as a process: builds an `LLM` from the JSON in its first line, then answers one JSON line with another.

Commands: `{"prompt": [token ids], "params": {...}}` generates one token and says how long that took from handing the
request over, `{"reset": true}` empties the engine's own cache, `{"metrics": true}` gives its counters. Nothing but
answers goes to standard output.
"""

import gc
import json
import os
import sys
import time
from typing import Any


def answer_lines() -> None:
    """Answer commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # Engines print; what they print must not come between the answers.
    os.dup2(2, 1)
    llm = _build(json.loads(sys.stdin.readline()))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(_answer(llm, json.loads(line))), file=answers)


def _build(settings: dict[str, Any]) -> Any:
    import vllm
    from vllm.config import KVTransferConfig

    transfer = settings.pop("kv_transfer", None)
    config = None if transfer is None else KVTransferConfig(**transfer)
    llm = vllm.LLM(kv_transfer_config=config, disable_log_stats=False, **settings)
    gc.collect()
    gc.freeze()
    return llm


def _answer(llm: Any, command: dict[str, Any]) -> Any:
    if command.get("metrics"):
        found: dict[str, float] = {}
        for metric in llm.get_metrics():
            value = getattr(metric, "value", None)
            if value is not None:
                found[metric.name] = found.get(metric.name, 0) + value
        return found
    if command.get("reset"):
        return {"reset": llm.reset_prefix_cache()}
    from vllm import SamplingParams

    extra = {"kv_transfer_params": command["params"]} if command.get("params") else None
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, extra_args=extra)
    prompt = {"prompt_token_ids": command["prompt"]}
    if command.get("salt"):
        prompt["cache_salt"] = command["salt"]
    start_s = time.perf_counter()
    [output] = llm.generate([prompt], params, use_tqdm=False)
    took_s = time.perf_counter() - start_s
    return {"ttft_s": took_s, "token": output.outputs[0].token_ids[0], "cached": output.num_cached_tokens}


if __name__ == "__main__":
    answer_lines()
