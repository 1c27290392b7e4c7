"""Random calls on an S3 tier under faults, and an account of what the bucket may hold after each of them.

Run as a program it is a client that is there to be killed: it writes what it asks and what it was answered to a file.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvstore.backend import Ack, Miss, Outcome, Reason
from kvstore.backends.s3 import S3Backend, S3Settings
from kvstore.errors import BackendUnavailableError
from kvstore.frame import Frame
from kvstore.testing import make_frame, make_key
from tests.frames import frame_bytes

LEVELS = 3
State = tuple[int, int] | None
"""Seed and number of levels of the frame under a key; None where there is none."""
Event = tuple[str, int, str, int, int, str]
"""Begin or end, number of the key, operation, seed, levels, and how it ended."""


@lru_cache(maxsize=4096)
def frame_of(number: int, seed: int) -> Frame:
    sizes = random.Random(number).choices((100, 3000, 40_000, 150_000), k=LEVELS)
    return make_frame(make_key(number), sizes, seed=seed)


class Account:
    """What may lie under each key, given what was asked and answered so far."""

    def __init__(self) -> None:
        self.may: dict[int, set[State]] = {}
        self.wrong: list[str] = []
        self.acknowledged = 0

    def note(self, event: Event) -> None:
        """Take in that an operation begins, or how it ended; one that never ends may have happened or not."""
        moment, number, operation, seed, levels, answer = event
        may = self.may.setdefault(number, {None})
        done = {_after(state, operation, seed, levels) for state in may}
        if moment == "begin":
            may |= done
        elif answer == "done" or (answer in (Outcome.WRITTEN, Outcome.EXTENDED)):
            self.may[number] = {(seed, levels)} if operation == "put" else done
        elif answer == Outcome.EXISTS:
            self.may[number] = {state for state in may if state and state[0] == seed and state[1] >= levels}
        elif answer == Outcome.OTHER:
            self.may[number] = {state for state in may if state and state[0] != seed}
        if moment == "end" and answer != "failed":
            self.acknowledged += operation == "put"
            if not self.may[number]:
                self.wrong.append(f"{event}: before it there could only be {may}")

    def check(self, number: int, levels_max: int, answer: Frame | Miss) -> None:
        """Check what a get answered."""
        may = self.may.get(number, {None})
        if isinstance(answer, Miss):
            if answer.reason in (Reason.ABSENT, Reason.EVICTED):
                if None not in may:
                    self.wrong.append(f"chunk {number} is {answer.reason}, not one of {may}")
            elif answer.reason not in (Reason.DEADLINE, Reason.BREAKER):
                self.wrong.append(f"chunk {number} is {answer.reason}")
            return
        expected = {
            frame_bytes(frame_of(number, state[0]).truncated(min(state[1], levels_max) - 1)) for state in may if state
        }
        if frame_bytes(answer) not in expected:
            self.wrong.append(f"chunk {number} has {answer.levels} levels of something, not one of {may}")

    def certain(self) -> list[int]:
        """Keys under which there must be something."""
        return [number for number, may in self.may.items() if None not in may]


@dataclass
class Report:
    """What a storm was like."""

    calls: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    late: list[str] = field(default_factory=list)


def _after(state: State, operation: str, seed: int, levels: int) -> State:
    """What lies under a key once an operation was done."""
    if operation == "delete":
        return None
    if operation == "trim":
        return state and (state[0], min(state[1], levels))
    if state is None:
        return seed, levels
    return (seed, max(levels, state[1])) if state[0] == seed else state


async def storm(
    backend: S3Backend,
    account: Account,
    until: Callable[[], bool],
    *,
    numbers: Sequence[int],
    deadline_s: float,
    workers: int = 6,
    seed: int = 0,
    log: Callable[[Event], None] = lambda event: None,
) -> Report:
    """Random calls until it is time to end; every worker has keys of its own, so that each knows what it may find."""
    report = Report()

    async def timed(operation: str, call: Any) -> Any:
        began = time.monotonic()
        try:
            return await call
        finally:
            took_s = time.monotonic() - began
            report.slowest_s = max(report.slowest_s, took_s)
            if took_s > deadline_s + 1:
                report.late.append(f"{operation} took {took_s:.2f} s")

    def note(event: Event) -> None:
        log(event)
        account.note(event)

    async def change(operation: str, number: int, seed: int, levels: int) -> None:
        note(("begin", number, operation, seed, levels, ""))
        key = make_key(number)
        answer = "done"
        try:
            if operation == "put":
                frame = frame_of(number, seed).truncated(levels - 1)
                [stored] = await timed("put", backend.put([(key, frame)], ack=Ack.REMOTE))
                answer = stored.outcome.value
                assert (stored.ack is Ack.REMOTE) == (stored.outcome is not Outcome.FAILED)
                assert (stored.error is None) == (stored.outcome is not Outcome.FAILED)
            elif operation == "trim":
                await timed("trim", backend.trim([key], level=levels - 1))
            else:
                await timed("delete", backend.delete([key]))
        except BackendUnavailableError:
            answer = "failed"
        report.calls[f"{operation} {answer}"] += 1
        note(("end", number, operation, seed, levels, answer))

    async def read(mine: list[int], rng: random.Random) -> None:
        asked = rng.sample(mine, 3)
        levels = rng.randint(1, LEVELS)
        level = None if levels == LEVELS else levels - 1
        for number, answer in zip(
            asked, await timed("get", backend.get([make_key(n) for n in asked], level=level)), strict=True
        ):
            account.check(number, levels, answer)
            report.calls[f"get {answer.reason if isinstance(answer, Miss) else 'frame'}"] += 1

    async def work(worker: int) -> None:
        rng = random.Random(1000 * seed + worker)
        mine = list(numbers[worker::workers])
        while not until():
            if not backend.state.up:
                # Otherwise nearly all calls would be those that are refused at once.
                await asyncio.sleep(0.02)
            operation = rng.choices(("put", "get", "trim", "delete", "match"), (6, 5, 2, 4, 1))[0]
            if operation == "get":
                await read(mine, rng)
            elif operation == "match":
                await timed("match", backend.match([make_key(number) for number in mine]))
            else:
                await change(operation, rng.choice(mine), rng.randint(0, 1), rng.randint(1, LEVELS))

    await asyncio.gather(*(work(worker) for worker in range(workers)))
    return report


async def verify(backend: S3Backend, account: Account) -> int:
    """Read every chunk in whole, waiting for the tier to be in order, and the number of those that must be there."""
    while backend.state != (True, ""):
        await asyncio.sleep(0.01)
    for number in account.may:
        answer: Frame | Miss = Miss(Reason.BREAKER)
        while isinstance(answer, Miss) and answer.reason in (Reason.BREAKER, Reason.DEADLINE):
            [answer] = await backend.get([make_key(number)])
        account.check(number, LEVELS, answer)
        held = (await backend.match([make_key(number)])).held
        if bool(held) != isinstance(answer, Frame):
            account.wrong.append(f"chunk {number}: match and get disagree")
    return len(account.certain())


def settings_from(text: str) -> S3Settings:
    return S3Settings(**json.loads(text))


def read_log(file: Path) -> Account:
    """The account that a killed client left behind; its last line may be cut."""
    account = Account()
    for line in file.read_text().split("\n")[:-1]:
        account.note(tuple(json.loads(line)))
    return account


def main() -> None:
    settings, file = settings_from(sys.argv[1]), Path(sys.argv[2])
    numbers, seed = int(sys.argv[3]), int(sys.argv[4])

    async def run(log: Callable[[Event], None]) -> None:
        backend = await S3Backend.open(settings)
        # The keys of a client before this one hold what its account says, so each client takes others.
        keys = range(numbers, numbers + 60)
        await storm(backend, Account(), lambda: False, numbers=keys, deadline_s=settings.deadline_s, seed=seed, log=log)

    with file.open("a", buffering=1) as out:
        asyncio.run(run(lambda event: print(json.dumps(event), file=out)))


if __name__ == "__main__":
    main()
