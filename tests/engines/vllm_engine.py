"""A vLLM engine as a process: builds an `LLM` from the JSON in its first line, then answers one JSON line with another.

Commands: `{"prompts": [[token ids], ...], "tokens": n}` generates greedily, `{"metrics": true}` gives the counters,
`{"reset": true}` empties the engine's own cache. Nothing but answers goes to standard output.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # Engines print; what they print must not come between the answers.
    os.dup2(2, 1)
    llm = None
    for line in sys.stdin:
        command = json.loads(line)
        if llm is None:
            llm = _build(command)
            print(json.dumps({"ready": True}), file=answers)
        else:
            print(json.dumps(_answer(llm, command)), file=answers)


def _build(settings: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    transfer = settings.pop("kv_transfer", None)
    config = None if transfer is None else KVTransferConfig(**transfer)
    return LLM(kv_transfer_config=config, disable_log_stats=False, **settings)


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

    params = SamplingParams(temperature=0, max_tokens=command["tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in command["prompts"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        {
            "tokens": list(one.outputs[0].token_ids),
            "cached": one.num_cached_tokens,
            "finish": one.outputs[0].finish_reason,
        }
        for one in outputs
    ]


if __name__ == "__main__":
    main()
