"""Train the small Llama that ``kvstore demo`` uses by default.

One command, no GPU, about a quarter of an hour on two CPU cores:

    python examples/train_demo_model/train.py

The script learns a 1,024-token byte-level BPE and a 2-million-parameter
``LlamaForCausalLM`` from the first 95 % of a text, never shows them the rest,
and writes that rest next to the model as the demo's prompt.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import platform
import random
import string
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import tokenizers
import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
PACKAGE_DEMO = HERE.parent.parent / "kvstore" / "demo"
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1024
CONTEXT = 2048
SIZE_LIMIT = 4_000_000


@dataclass(frozen=True)
class Plan:
    """Every choice of a training run that is worth changing.

    Attributes:
        steps: Optimiser steps in total.
        seed: Seed of the weights, the windows and the repeats.
        batch: Sequences per step. Many small steps beat few large ones here.
        short_length: Sequence length of the first part of the run.
        long_share: Share of the steps, at the end, at the full context length.
        repeat_share: Share of the sequences that hold copied passages.
        peak_rate: Learning rate after the warm-up.
        final_rate: Learning rate at the last step.
        warmup: Steps of linear warm-up.
        weight_decay: Weight decay of the matrices (not of the norms).
        evaluate_every: Steps between two measurements on the held-out text.
    """

    steps: int = 2200
    seed: int = 0
    batch: int = 1
    short_length: int = 512
    long_share: float = 0.45
    repeat_share: float = 0.25
    peak_rate: float = 1.5e-3
    final_rate: float = 1.5e-5
    warmup: int = 100
    weight_decay: float = 0.1
    evaluate_every: int = 100

    def length(self, step: int) -> int:
        """Return the sequence length of a step: short first, full at the end."""
        is_long = step >= self.steps * (1 - self.long_share)
        return CONTEXT if is_long else self.short_length

    def is_measured(self, step: int) -> bool:
        """Tell whether the held-out loss is measured after a step."""
        return (step + 1) % self.evaluate_every == 0 or step + 1 == self.steps

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: linear warm-up, then cosine."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        swing = (1 + math.cos(math.pi * done)) / 2
        return self.final_rate + (self.peak_rate - self.final_rate) * swing


@dataclass
class Best:
    """The checkpoint with the lowest held-out loss so far."""

    loss: float = math.inf
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, model: LlamaForCausalLM, step: int, loss: float) -> None:
        """Keep a copy of the model's weights if its loss is the lowest yet."""
        if loss < self.loss:
            self.loss, self.step = loss, step
            self.weights = copy.deepcopy(model.state_dict())


def split_text(text: str, held_out: float = 0.05) -> tuple[str, str]:
    """Cut a text in two at the first blank line after the training share.

    Args:
        text: The whole text.
        held_out: Share of the text, at its end, to hold out.

    Returns:
        The training part and the held-out part.
    """
    # A cut between two speeches lets the demo's prompt begin with a full one.
    cut = text.index("\n\n", int(len(text) * (1 - held_out))) + 2
    return text[:cut], text[cut:]


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from the training part alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """Return a text as a one-dimensional tensor of token ids."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def build_model(eos: int) -> LlamaForCausalLM:
    """Build the untrained model: a real GQA Llama, just a very small one."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos)
    return model


def add_repeats(window: Tensor, dice: random.Random) -> None:
    """Overwrite parts of a window with copies of an earlier passage, in place.

    Plain text rarely rewards looking far back. A copied passage does: the only
    way to predict it is to find where it stood before (induction).
    """
    length = len(window)
    # Log-uniform: short passages repeat often, long ones reach far back.
    span = int(math.exp(dice.uniform(math.log(16), math.log(length // 4))))
    source = dice.randint(0, length // 2 - span)
    passage = window[source : source + span].clone()
    for target in range(source + span, length - span, span):
        if dice.random() < 0.6:
            window[target : target + span] = passage


def draw_batch(tokens: Tensor, length: int, plan: Plan, dice: random.Random) -> Tensor:
    """Draw random windows of the training text, some with repeated passages."""
    windows = []
    for _ in range(plan.batch):
        start = dice.randrange(len(tokens) - length)
        window = tokens[start : start + length + 1].clone()
        if dice.random() < plan.repeat_share:
            add_repeats(window, dice)
        windows.append(window)
    return torch.stack(windows)


def token_losses(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Return the loss of every predicted token, shape (windows, length)."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    targets = batch[:, 1:]
    losses = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def cut_windows(tokens: Tensor, stride: int) -> Iterator[Tensor]:
    """Yield full-context windows of the held-out tokens, one per batch."""
    for start in range(0, len(tokens) - CONTEXT, stride):
        yield tokens[start : start + CONTEXT + 1].unsqueeze(0)


@torch.inference_mode()
def held_out_losses(model: LlamaForCausalLM, tokens: Tensor, stride: int) -> Tensor:
    """Return held-out losses by window and position, shape (windows, CONTEXT)."""
    model.train(False)
    losses = torch.cat([token_losses(model, window) for window in cut_windows(tokens, stride)])
    model.train()
    return losses


def build_optimizer(model: LlamaForCausalLM, plan: Plan) -> torch.optim.AdamW:
    """Build AdamW with weight decay on the matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.peak_rate, betas=(0.9, 0.98), fused=True)


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, batch: Tensor, rate: float) -> float:
    """Take one optimiser step and return the batch's mean loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = token_losses(model, batch).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def progress_bar() -> Progress:
    """Build the progress bar: step, loss and time left."""
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  held-out {task.fields[held_out]:.3f}"),
        TimeRemainingColumn(),
    )


def train(
    model: LlamaForCausalLM, train_tokens: Tensor, test_tokens: Tensor, plan: Plan
) -> tuple[Best, list[dict[str, float]]]:
    """Train a model in place.

    Args:
        model: The model, in fp32.
        train_tokens: The training part.
        test_tokens: The held-out part, only ever measured.
        plan: The choices of the run.

    Returns:
        The best checkpoint and the loss curve.
    """
    dice, optimizer, best = random.Random(plan.seed), build_optimizer(model, plan), Best()
    curve: list[dict[str, float]] = []
    recent: list[float] = []
    with progress_bar() as progress:
        task = progress.add_task("train", total=plan.steps, loss=math.nan, held_out=math.nan)
        for step in range(plan.steps):
            batch = draw_batch(train_tokens, plan.length(step), plan, dice)
            recent.append(train_step(model, optimizer, batch, plan.rate(step)))
            progress.update(task, advance=1, loss=recent[-1])
            if plan.is_measured(step):
                curve.append(measure(model, test_tokens, step + 1, recent))
                best.offer(model, step + 1, curve[-1]["held_out_loss"])
                progress.update(task, held_out=curve[-1]["held_out_loss"])
                progress.console.print(describe_point(curve[-1]))
                recent.clear()
    return best, curve


def describe_point(point: dict[str, float]) -> str:
    """Return one point of the loss curve as a line of text."""
    return f"step {point['step']:5.0f}  training {point['train_loss']:.3f}  held-out {point['held_out_loss']:.3f}"


def measure(model: LlamaForCausalLM, test_tokens: Tensor, step: int, recent: list[float]) -> dict[str, float]:
    """Return one point of the loss curve."""
    held_out = held_out_losses(model, test_tokens, stride=CONTEXT).mean().item()
    return {
        "step": step,
        "train_loss": sum(recent) / len(recent),
        "held_out_loss": held_out,
    }


def loss_by_position(losses: Tensor) -> list[dict[str, float]]:
    """Average held-out losses over position ranges that double in width."""
    edges = [0, *(2**power for power in range(5, 12))]
    return [
        {"from": low, "to": high, "loss": losses[:, low:high].mean().item()} for low, high in itertools.pairwise(edges)
    ]


@torch.inference_mode()
def loss_of_repeats(model: LlamaForCausalLM, tokens: Tensor, span: int = 256) -> dict[str, float]:
    """Measure how much better a passage is predicted the second time.

    Each window is a held-out passage, other held-out text, and the same
    passage again: a model that uses its context finds the second one easy.
    """
    first, second = [], []
    for start in range(0, len(tokens) - CONTEXT, CONTEXT):
        window = tokens[start : start + CONTEXT].clone()
        window[-span:] = window[:span]
        losses = token_losses(model, window.unsqueeze(0))[0]
        first.append(losses[: span - 1].mean())
        # The copy's first tokens cannot be foreseen, so both sides skip one.
        second.append(losses[-(span - 1) :].mean())
    return {
        "span": span,
        "first_time": torch.stack(first).mean().item(),
        "second_time": torch.stack(second).mean().item(),
    }


def final_figures(model: LlamaForCausalLM, test_tokens: Tensor) -> dict[str, Any]:
    """Measure the shipped (bf16) weights on the held-out text."""
    # Overlapping windows put every token at many positions, so that the
    # positions are compared on nearly the same tokens.
    losses = held_out_losses(model, test_tokens, stride=128)
    apart = held_out_losses(model, test_tokens, stride=CONTEXT)
    model.train(False)
    return {
        "held_out_loss": apart.mean().item(),
        "first_32": losses[:, :32].mean().item(),
        "beyond_1024": losses[:, 1024:].mean().item(),
        "by_position": loss_by_position(losses),
        "repeated_passage": loss_of_repeats(model, test_tokens),
    }


def processor_name() -> str:
    """Return the processor's name where the system tells it."""
    source = Path("/proc/cpuinfo")
    lines = source.read_text(encoding="utf-8").splitlines() if source.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_run(plan: Plan, seconds: float) -> dict[str, Any]:
    """Say when, where and with what the run was made."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {processor_name()}, no GPU",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "seed": plan.seed,
        "plan": vars(plan),
        "minutes": round(seconds / 60, 1),
    }


def draw_picture(source: Path, target: Path) -> None:
    """Draw the loss curve and the loss by position from the JSON record."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    record = json.loads(source.read_text(encoding="utf-8"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw_curve(left, record)
    draw_positions(right, record)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw_curve(axes: Any, record: dict[str, Any]) -> None:
    """Draw training and held-out loss over the steps."""
    steps = [point["step"] for point in record["curve"]]
    for name, label in (("train_loss", "training"), ("held_out_loss", "held out")):
        axes.plot(steps, [point[name] for point in record["curve"]], label=label)
    axes.axvline(record["long_from"], color="grey", linestyle=":", label="2,048-token sequences")
    axes.set(title="Loss during training", xlabel="step", ylabel="loss per token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_positions(axes: Any, record: dict[str, Any]) -> None:
    """Draw the held-out loss by position in the context."""
    ranges = record["final"]["by_position"]
    labels = [f"{part['from']}-{part['to'] - 1}" for part in ranges]
    bars = axes.bar(labels, [part["loss"] for part in ranges], color="tab:orange")
    axes.bar_label(bars, fmt="%.2f")
    floor = min(part["loss"] for part in ranges)
    axes.set(title="Held-out loss by position", xlabel="tokens before", ylim=(floor - 0.5, None))
    axes.tick_params(axis="x", labelrotation=30)


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save model and tokenizer, and refuse weights that are over the limit."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    name_tokenizer_class(out / "tokenizer_config.json")
    weights = out / "model.safetensors"
    # Written for the owner's eyes only, but meant to be shipped.
    weights.chmod(0o644)
    size = weights.stat().st_size
    if size > SIZE_LIMIT:
        raise SystemExit(f"model.safetensors has {size:,} bytes, more than {SIZE_LIMIT:,}")


def name_tokenizer_class(path: Path) -> None:
    """Name the tokenizer's class in a way that Transformers 4 knows as well as 5."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_card(record: dict[str, Any], out: Path) -> None:
    """Fill the model card's template with the figures of this run."""
    final = record["final"]
    template = string.Template((HERE / "model_card.md").read_text(encoding="utf-8"))
    card = template.substitute(
        held_out=f"{final['held_out_loss']:.2f}",
        first_32=f"{final['first_32']:.2f}",
        beyond_1024=f"{final['beyond_1024']:.2f}",
        first_time=f"{final['repeated_passage']['first_time']:.2f}",
        second_time=f"{final['repeated_passage']['second_time']:.2f}",
        minutes=f"{record['minutes']:.0f}",
        machine=record["machine"],
        date=record["date"],
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def run(text: str, out: Path, record_folder: Path, plan: Plan) -> None:
    """Train, measure and write everything."""
    started = time.monotonic()
    torch.manual_seed(plan.seed)
    train_text, test_text = split_text(text)
    tokenizer = train_tokenizer(train_text)
    train_tokens, test_tokens = encode(tokenizer, train_text), encode(tokenizer, test_text)
    print(f"{len(train_tokens):,} tokens to train on, {len(test_tokens):,} held out")
    model = build_model(eos=int(tokenizer.eos_token_id))
    best, curve = train(model, train_tokens, test_tokens, plan)
    model.load_state_dict(best.weights)
    model.bfloat16()
    seconds = time.monotonic() - started
    record = describe_run(plan, seconds) | {
        "train_tokens": len(train_tokens),
        "held_out_tokens": len(test_tokens),
        "long_from": round(plan.steps * (1 - plan.long_share)),
        "best_step": best.step,
        "curve": curve,
        "final": final_figures(model, test_tokens),
    }
    save_model(model, tokenizer, out)
    (out.parent / "prompt.txt").write_text(test_text, encoding="utf-8")
    (record_folder / "loss.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw_picture(record_folder / "loss.json", record_folder / "loss.png")
    write_card(record, out)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the demo model of kvstore.")
    parser.add_argument("--text", type=Path, default=HERE / "shakespeare.txt")
    parser.add_argument("--out", type=Path, default=PACKAGE_DEMO / "shakespeare-llama", help="model folder")
    parser.add_argument("--record", type=Path, default=HERE, help="folder of loss.json, loss.png")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Run the script."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.record.mkdir(parents=True, exist_ok=True)
    plan = Plan(steps=arguments.steps, seed=arguments.seed)
    run(arguments.text.read_text(encoding="utf-8"), arguments.out, arguments.record, plan)


if __name__ == "__main__":
    main()
