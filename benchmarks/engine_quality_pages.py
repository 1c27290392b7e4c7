"""How the results of the quality benchmark in a real engine are shown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row
from benchmarks.report_parts import Column, Page, RowTable, new_figure, plain, save_figure

_TEXT = """\
A real vLLM on the CPU and one kvstore server. Prompts of 1,000 tokens, half of them test text with a page of
records and a question about one at the end; 896 tokens of each (seven chunks) are stored and loaded. Every figure
is held against the same engine going on greedily from its own cached KV, 16 tokens. *raw* is computed in one
process and loaded in another one; the profiles are computed, stored and loaded by one engine whose own cache is
emptied in between, the finest level first; then the server drops a level. *ladder-tokens* is calibrated on other
text. Tokens loaded are those of the connector's own counter."""

_LEVELS_TEXT = """\
**Ratio** is bytes of K and V in bfloat16 by bytes of the frames received, both workloads together. **Identical**
outputs are those with all 16 tokens the same; **agreement** is the share of tokens before the first difference.
**Answers** are those to the question, right to the last digit. **KL** is KL(own cache || loaded) of the next-token
distributions in nats: of the first token, and the mean of every fourth one along the own cache's continuation.
*recomputed* is what the engine gave before it had anything cached."""

_RECOMPUTE_TEXT = """\
Where the same engine without anything loaded, computing the whole prompt, first leaves the continuation that its own
cache gives. **Margin** is by how many nats the own cache preferred its token to the other one."""

_CONVERSATION_TEXT = """\
Conversations of test text: an opening of 512 tokens, then 128 tokens of the user in each turn, with 16 tokens of
answer behind each. Before every turn the engine's own cache is emptied, and the server holds level 0 of
`ladder-repeats` only (*raw*: all bytes of the whole conversation). All variants see the same tokens. *one lossy
load*: the whole prefix was computed exactly, and is loaded once at level 0. *store_derived off* (the default): what
is computed behind a lossy prefix is not stored, so the opening alone comes back. *store_derived on*: it is stored,
so loss stands on loss. **KL** is the mean over every fourth token of the answers of all conversations, against an
engine that keeps its own cache, in nats."""

_COLOURS = {
    "raw": "#7f7f7f",
    "one lossy load": "#d4a03a",
    "store_derived off": "#1f5fa8",
    "store_derived on": "#b5483a",
}


def _plot(rows: Sequence[Row], path: Path) -> None:
    """KL of every variant by turn, and KL of every level by ratio."""
    figure = new_figure((12, 4.5))
    left, right = figure.subplots(1, 2)
    turns = [row for row in rows if row["table"] == "conversation"]
    for variant in dict.fromkeys(row["variant"] for row in turns):
        own = [row for row in turns if row["variant"] == variant and row["turn"] > 1]
        left.plot([r["turn"] for r in own], [r["kl_nats"] for r in own], "o-", color=_COLOURS[variant], label=variant)
    left.set_xlabel("turn")
    left.set_ylabel("KL, nats")
    left.set_ylim(bottom=0)
    left.legend(fontsize=8)
    levels = [row for row in rows if row["table"] == "levels" and row.get("level") is not None]
    for pipeline, workload in dict.fromkeys((row["pipeline"], row["workload"]) for row in levels):
        own = [row for row in levels if (row["pipeline"], row["workload"]) == (pipeline, workload)]
        right.plot([r["ratio"] for r in own], [r["kl_nats"] for r in own], "o-", label=f"{pipeline}, {workload}")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("ratio")
    right.set_ylabel("KL, nats")
    right.legend(fontsize=8, loc="lower right")
    for panel in (left, right):
        panel.grid(linewidth=0.3)
    save_figure(figure, path)


def _nats(value: Any) -> str:
    return "" if value is None else f"{value:.5f}"


def _share(value: float) -> str:
    return f"{value:.3f}"


ENGINE_QUALITY_PAGES: Mapping[str, Page] = {
    "engine_quality": Page(
        "Quality in vLLM: levels and conversations",
        _TEXT,
        {
            "levels": RowTable(
                "Levels",
                _LEVELS_TEXT,
                (
                    Column("workload", "workload"),
                    Column("pipeline", "pipeline"),
                    Column("level", "level", plain),
                    Column("loaded_tokens", "tokens loaded", plain),
                    Column("ratio", "ratio", plain),
                    Column("prompts", "prompts"),
                    Column("identical", "identical"),
                    Column("agreement", "agreement", _share),
                    Column("answers_right", "answers", plain),
                    Column("kl_first_nats", "KL first", _nats),
                    Column("kl_nats", "KL", _nats),
                ),
            ),
            "recompute": RowTable(
                "Recomputing against the own cache",
                _RECOMPUTE_TEXT,
                (
                    Column("workload", "workload"),
                    Column("prompt", "prompt"),
                    Column("position", "token"),
                    Column("margin_nats", "margin", _nats),
                ),
            ),
            "conversation": RowTable(
                "Conversations",
                _CONVERSATION_TEXT,
                (
                    Column("variant", "variant"),
                    Column("turn", "turn"),
                    Column("loaded_tokens", "tokens loaded", plain),
                    Column("kl_nats", "KL", _nats),
                    Column("kl_worst_nats", "worst", _nats),
                ),
            ),
        },
        _plot,
    )
}
