"""The vLLM connector where the server plans what is saved and loaded."""

import time
from functools import partial
from itertools import count
from threading import Barrier
from typing import Any

import pytest

from kvstore.client import Client
from kvstore.codecs import decode
from kvstore.controller.controller import Controller
from kvstore.keys import namespace_of
from kvstore.plan import Outcome, Plan
from kvstore.profile import parse_profiles
from kvstore.service import Service
from tests.conftest import Server
from tests.test_plan import measured
from tests.test_profiles import a_set, level, profile, quality
from tests.test_vllm_connector import connector, engine, prompt, serve
from tests.vllm_runner import Engine, Request

__all__ = ["connector"]
LOSSY = {"exact": False}


@pytest.fixture(autouse=True)
def expected_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose by what is expected: these prompts are small, and arms differ by less than what chance draws."""
    monkeypatch.setattr("kvstore.server.plan.Controller", partial(Controller, explores=False))


async def push(server: Server, started: Engine, found: Any) -> None:
    """Give the server the profiles of an engine's model."""
    layout = started.scheduler._scheduler._inquiries._layouts[0]
    async with Client(server.url) as client:
        await client.push_profiles(namespace_of(layout), found, {})


async def test_saves_and_loads_go_as_planned(connector: Any, server: Server) -> None:
    ids = prompt(1, 40)
    async with engine(connector, server.url) as first:
        await push(server, first, measured())
        counts = await serve(first, Request("a", ids))
        assert counts["saved_tokens"] == 40
    async with engine(connector, server.url, settings=LOSSY) as second:
        counts = await serve(second, Request("b", ids))
        # Exact chunks were asked for by nobody, and the plan keeps to the usual budget.
        assert counts["planned_loads"] == 1
        assert counts["loaded_tokens"] == counts["lossy_tokens"] == 32
        assert "saved_tokens" not in counts
    assert await server.metric('kvstore_decisions_total{action="put",operation="put",reason="fastest"}') >= 1
    assert await server.metric('kvstore_decisions_total{action="fetch",operation="get",reason="fastest"}') == 1
    assert await server.metric('kvstore_outcomes_total{result="learned"}') >= 2


async def test_a_request_names_its_budget(connector: Any, server: Server) -> None:
    ids = prompt(2, 40)
    async with engine(connector, server.url) as first:
        await push(server, first, measured())
        await serve(first, Request("a", ids))

        def size(levels: int) -> int:
            return sum(held.copy.head_bytes + sum(held.copy.level_bytes[:levels]) for held in held_chunks)

        async with Client(server.url) as client:
            layout = first.scheduler._scheduler._inquiries._layouts[0]
            held_chunks = [held async for _, held in client.scan(namespace_of(layout))][:4]
    for budget_nats, levels in ((0.5, 1), (0.01, 2), (0.001, 3)):
        async with engine(connector, server.url, settings=LOSSY) as second:
            wish = {"kvstore": {"budget_nats": budget_nats}}
            counts = await serve(second, Request("b", ids, kv_transfer_params=wish))
            assert counts["loaded_bytes"] == size(levels)
    async with engine(connector, server.url) as exact:
        counts = await serve(exact, Request("c", ids, kv_transfer_params={"kvstore": {"budget_nats": 0}}))
        assert counts["planned_tokens"] == 32
        assert exact.computed_tokens == 40
    # What cannot be a budget is not one; a level that is named is taken.
    async with engine(connector, server.url, settings=LOSSY, budget_nats=0.5) as third:
        counts = await serve(third, Request("d", ids, kv_transfer_params={"kvstore": {"budget_nats": "small"}}))
        assert counts["loaded_bytes"] == size(1)
        counts = await serve(third, Request("e", prompt(3, 40), kv_transfer_params={"kvstore": {"level": 2}}))
        assert "planned_loads" not in counts


async def test_no_compression_may_be_the_plan(connector: Any, server: Server) -> None:
    ids = prompt(4, 40)
    slow = [level(ratio=1.01, decode_s_per_gb=1e5, quality={"text-256": quality(kl_nats=0.0, standard_error=0.0)})]
    made = profile(name="slow", pipeline=[{"stage": "mean"}, {"stage": "raw"}], encode_s_per_gb=1e5, levels=slow)
    async with engine(connector, server.url) as first:
        await push(server, first, parse_profiles(a_set(profiles=[made])))
        await serve(first, Request("a", ids))
    async with engine(connector, server.url) as second:
        counts = await serve(second, Request("b", ids))
        assert counts["loaded_tokens"] == 32
        assert "lossy_tokens" not in counts


async def test_who_wants_no_plans_gets_none(connector: Any, server: Server) -> None:
    ids = prompt(5, 40)
    async with engine(connector, server.url, plan=False) as first:
        await push(server, first, measured())
        await serve(first, Request("a", ids))
        assert await server.metric('kvstore_requests_total{route="/v1/plan",status="200"}') == 0
    async with engine(connector, server.url, plan=False) as second:
        assert (await serve(second, Request("b", ids)))["loaded_tokens"] == 32


async def test_the_link_is_not_blamed_for_what_decoding_takes(
    connector: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, told = prompt(8, 40), list[Outcome]()
    first_three, numbers = Barrier(3), count()

    def decode_slowly(*args: Any, **options: Any) -> Any:
        if next(numbers) < first_three.parties:
            first_three.wait(60)
            time.sleep(0.2)
        return decode(*args, **options)

    async def listen(self: Service, plan: Plan, outcome: Outcome) -> None:
        told.append(outcome)

    async with engine(connector, server.url) as first:
        await push(server, first, measured())
        await serve(first, Request("a", ids))
    # One chunk at a time: the fourth is fetched when one of the first three has been decoded.
    monkeypatch.setattr("kvstore.connectors.vllm_worker._BATCH_GET_BYTES", 1)
    monkeypatch.setattr("kvstore.connectors.vllm_worker.decode", decode_slowly)
    monkeypatch.setattr(Service, "observe", listen)
    async with engine(connector, server.url, settings=LOSSY) as second:
        await serve(second, Request("b", ids))
    [outcome] = told
    assert outcome.wire_s is not None
    assert outcome.took_s - outcome.wire_s >= 0.2


async def test_chunks_behind_a_planned_load_know_what_they_stand_on(connector: Any, server: Server) -> None:
    ids = prompt(6, 64)
    async with engine(connector, server.url) as first:
        await push(server, first, measured())
        await serve(first, Request("a", ids[:32]))
    async with engine(connector, server.url, settings=LOSSY, store_derived=True) as second:
        await serve(second, Request("b", ids))
        layout = second.scheduler._scheduler._inquiries._layouts[0]
        behind = second.scheduler._scheduler._lossy._known
        assert {one.kl_nats for one in behind.values()} == {0.009}
    async with Client(server.url) as client:
        copies = [held.copy async for _, held in client.scan(namespace_of(layout))]
    assert sum(copy.inexact for copy in copies) == 4


async def test_a_server_that_dies_between_plan_and_load_costs_only_the_load(connector: Any, server: Server) -> None:
    ids = prompt(7, 40)
    async with engine(connector, server.url) as first:
        await push(server, first, measured())
        await serve(first, Request("a", ids))
    async with engine(connector, server.url, settings=LOSSY) as second:
        await server.stop()
        counts = await serve(second, Request("b", ids))
        assert second.computed_tokens == 40
        assert counts["match_failures"] == 1
