"""Look-up pages: records in the prefix, questions about them behind it."""

import random

from kvstore.calibration.model import Model

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def lookup_window(model: Model, prefix: int, continuation: int, rng: random.Random) -> list[int]:
    """Token ids of a page of `prefix` tokens and of questions and answers behind it."""
    head = "Records:\n"
    records: list[tuple[str, str]] = []
    while len(model.tokenize(head + _lines(records))) < prefix:
        records.append((_word(rng), _word(rng) if rng.random() < 0.5 else str(rng.randint(100, 9999))))
    page = model.tokenize(head + _lines(records))[:prefix]
    # The last record may be cut off, so nobody asks for it.
    asked = rng.sample(records[:-1], len(records) - 1)
    text = "".join(f"Question: What is the code of {name}?\nAnswer: {value}\n" for name, value in asked * 9)
    return page + model.tokenize("\n" + text)[:continuation]


def lookup_prompt(
    model: Model, before: list[int], tokens: int, rng: random.Random, *, records: int = 20
) -> tuple[list[int], list[int]]:
    """Token ids of text, a page of records behind it and one question, `tokens` in all, and of the answer."""
    page = [(_word(rng), str(rng.randint(100, 9999))) for _ in range(records)]
    # The last ones lie in the tail of the prompt that is never loaded.
    name, value = rng.choice(page[: records // 2])
    asked = f"\n\nRecords:\n{_lines(page)}\nQuestion: What is the code of {name}?\nAnswer:"
    ids = model.tokenize(asked)
    return before[: tokens - len(ids)] + ids, model.tokenize(f" {value}")


def _lines(records: list[tuple[str, str]]) -> str:
    return "\n".join(f"The code of {name} is {value}." for name, value in records)


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(_LETTERS, k=rng.randint(3, 8)))
