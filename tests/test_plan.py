"""Plans over HTTP: asked for, followed, reported on, remembered."""

import asyncio
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.backend import Ack, Miss, Reason
from kvstore.cli import main
from kvstore.client import Client
from kvstore.codecs import build_pipeline, named_pipeline
from kvstore.controller.controller import Controller
from kvstore.controller.decisions import read_log
from kvstore.errors import PipelineError
from kvstore.keys import chunk_keys, namespace_of
from kvstore.plan import Action, Context, Outcome, Plan
from kvstore.planned import PlannedPrefixes, Wish
from kvstore.prefix import put_prefix
from kvstore.profile import ProfileSet, parse_profiles
from kvstore.service import Service
from tests.conftest import Answer, Server, Start
from tests.test_prefix import IDS, LAYOUT, PLANES
from tests.test_profiles import a_set, artefact, level, profile, quality

LADDER, RAW = named_pipeline("ladder-packed"), named_pipeline("raw")
NAMESPACE = namespace_of(LAYOUT)
KEYS = chunk_keys(LAYOUT, IDS)
CONTEXT = Context(LAYOUT.chunk_bytes, LAYOUT.chunk_tokens, prefill_s=100.0)


@pytest.fixture(autouse=True)
def expected_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose by what is expected: prompts are small here, and arms differ by less than what chance draws."""
    monkeypatch.setattr("kvstore.server.plan.Controller", partial(Controller, explores=False))


def measured(**change: Any) -> ProfileSet:
    """A set of one profile, the ladder, whose finest level is within the usual budget, and the middle one just so."""
    levels = [
        level(ratio=ratio, decode_s_per_gb=0.001, quality={"text-256": quality(kl_nats=kl, standard_error=0.0)})
        for ratio, kl in ((8, 0.1), (4, 0.009), (2, 0.001))
    ]
    made = profile(name="ladder", pipeline=[dict(stage) for stage in LADDER.spec], levels=levels, encode_s_per_gb=0.001)
    return parse_profiles(a_set(profiles=[made | change]))


def question(op: str = "get", **change: Any) -> dict[str, Any]:
    asked = {"digests": "".join(key[16:].hex() for key in KEYS)} if op == "get" else {"chunks": 5}
    context = {"chunk_bytes": LAYOUT.chunk_bytes, "chunk_tokens": LAYOUT.chunk_tokens}
    return {"op": op, "namespace": NAMESPACE.hex(), "context": context} | asked | change


async def ask(server: Server, **change: Any) -> Answer:
    return await server.ask("POST", "/v1/plan", json=question(**change))


@pytest.fixture
async def filled(start: Start) -> Server:
    """A server with a prompt, and the profile that made it."""
    server = await start()
    await fill(server)
    return server


async def fill(server: Server, **change: Any) -> None:
    async with Client(server.url) as client:
        await client.push_profiles(NAMESPACE, measured(**change), {})
        await put_prefix(client, LAYOUT, IDS, PLANES, LADDER, ack=Ack.DISK)


async def test_a_plan_says_the_level_and_why(filled: Server) -> None:
    answer = (await ask(filled, explain=True)).json
    assert (answer["action"], answer["arm"], answer["level"], answer["reason"]) == ("fetch", "ladder/1", 1, "fastest")
    assert answer["match"]["matched"] == 5
    assert answer["terms"]["stages_s"].keys() == {"read", "wire", "copy", "decode"}
    assert answer["expected_s"] == answer["terms"]["total_s"] > 0
    report = answer["explanation"]
    assert report["refused"] == ["ladder/0"]
    assert {one["arm"] for one in report["arms"]} == {"ladder/1", "recompute"}
    assert await filled.metric('kvstore_decisions_total{action="fetch",operation="get",reason="fastest"}') == 1
    finer = question(context={**question()["context"], "budget_nats": 0.005})
    assert (await filled.ask("POST", "/v1/plan", json=finer)).json["level"] is None
    none = question(context={**question()["context"], "budget_nats": 0})
    assert (await filled.ask("POST", "/v1/plan", json=none)).json["action"] == "recompute"


async def test_a_namespace_without_profiles_is_left_to_what_is_configured(server: Server) -> None:
    assert (await ask(server)).json["action"] == "recompute"
    async with Client(server.url) as client:
        await put_prefix(client, LAYOUT, IDS, PLANES, LADDER)
        assert (await ask(server)).json["action"] == "static"
        assert (await ask(server, op="put")).json["action"] == "static"
        await client.push_profiles(NAMESPACE, measured(), {})
        assert (await ask(server)).json["action"] == "fetch"
    assert (await server.ask("DELETE", f"/v1/profiles/{NAMESPACE.hex()}")).status == 204
    assert (await ask(server)).json["action"] == "static"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"op": "sing"}, "op"),
        ({"op": None}, "op"),
        ({"namespace": "xy"}, "namespace"),
        ({"namespace": None}, "namespace"),
        ({"digests": "ab"}, "digests"),
        ({"digests": None}, "digests"),
        ({"digests": "AB" * 32}, "digests"),
        ({"wait_ms": -1}, "wait_ms"),
        ({"client": "x" * 65}, "client"),
        ({"context": None}, "context"),
        ({"context": {"chunk_bytes": 1, "chunk_tokens": 0}}, "chunk_tokens"),
        ({"context": {"chunk_bytes": 1, "chunk_tokens": 1, "prefill_s": math.nan}}, "prefill_s"),
        ({"op": "put", "chunks": 0}, "chunks"),
        ({"op": "put", "chunks": 1 << 40}, "chunks"),
        ({"surprise": 1}, "surprise"),
    ],
)
async def test_a_bad_plan_is_refused_by_the_name_of_its_field(
    server: Server, change: dict[str, Any], named: str
) -> None:
    answer = await server.refused("POST", "/v1/plan", 400, json=question(**change))
    assert named in answer.json["detail"]


async def test_bodies_that_are_no_plan_are_refused(server: Server) -> None:
    is_json = {"Content-Type": "application/json"}
    for path in ("/v1/plan", "/v1/observe"):
        for body in (b"", b"{", b"[]", b"7", b"[" * 4000):
            await server.refused("POST", path, 400, "bad-request", data=body, headers=is_json)
        await server.refused("POST", path, 415, "bad-media-type", data=b"{}", headers={"Content-Type": "text/plain"})
    long = json.dumps({"decision": "0" * 5000}).encode()
    await server.refused("POST", "/v1/observe", 413, "body-too-large", data=long, headers=is_json)


async def test_outcomes_are_learned_once_and_others_counted(filled: Server) -> None:
    async def said(**outcome: Any) -> str:
        answer = await filled.ask("POST", "/v1/observe", json=outcome)
        assert answer.status == 200, answer.body
        return str(answer.json["result"])

    decision = (await ask(filled)).json["decision"]
    await asyncio.sleep(0.02)
    assert await said(decision=decision, took_s=0.01, size_bytes=1000, wire_s=0.005) == "learned"
    assert await said(decision=decision, took_s=0.01) == "unknown"
    assert await said(decision="f" * 16, took_s=0.01) == "unknown"
    again = (await ask(filled)).json["decision"]
    assert await said(decision=again, took_s=1000.0) == "implausible"
    for result, count in (("learned", 1), ("unknown", 2), ("implausible", 1)):
        assert await filled.metric(f'kvstore_outcomes_total{{result="{result}"}}') == count
    for bad, named in (({"took_s": 0}, "took_s"), ({"decision": 7}, "decision"), ({"wire_s": -1}, "wire_s")):
        answer = await filled.refused("POST", "/v1/observe", 400, json={"decision": decision, "took_s": 1.0} | bad)
        assert named in answer.json["detail"]


async def test_what_was_learned_survives_a_restart_and_a_bad_file_keeps_nobody_from_starting(
    start: Start, tmp_path: Path
) -> None:
    server = await start()
    await fill(server)
    async with Client(server.url) as client:
        service = Service(client, name="me")
        for _ in range(3):
            plan, _ = await service.plan_get(KEYS, CONTEXT)
            await asyncio.sleep(0.01)
            await service.observe(plan, Outcome(0.01, 1000, 0.005))
    before = (await ask(server, client="me", explain=True)).json
    await server.stop()
    file = tmp_path / "data" / "controller.json"
    assert len(json.loads(file.read_bytes())) == 1
    server = await start()
    async with Client(server.url) as client:
        # Back into the tier that it was learned of.
        await client.get(KEYS)
    # The estimate of the link is gone, what the model got wrong is not.
    after = (await ask(server, client="me", explain=True)).json
    factors = [
        next(one["mean_s"] / one["terms"]["total_s"] for one in answer["explanation"]["arms"] if "/" in one["arm"])
        for answer in (before, after)
    ]
    assert factors[0] != pytest.approx(1.0)
    assert factors[1] == pytest.approx(factors[0])
    await server.stop()
    file.write_text('[{"context": 7}]')
    server = await start()
    assert (await ask(server)).status == 200


async def test_what_was_learned_is_written_now_and_then(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.server.plan._KEPT_S", 0.01)
    server = await start()
    await fill(server)
    async with Client(server.url) as client:
        service = Service(client)
        plan, _ = await service.plan_get(KEYS, CONTEXT)
        await service.observe(plan, Outcome(0.001))
    file = tmp_path / "data" / "controller.json"
    for _ in range(500):
        await asyncio.sleep(0.01)
        if file.exists() and len(json.loads(file.read_bytes())) == 1:
            break
    else:
        pytest.fail("nothing was written")


async def test_decisions_are_logged_with_their_outcomes(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "log" / "decisions.jsonl"
    server = await start(decision_log=log)
    await fill(server)
    async with Client(server.url) as client:
        service = Service(client)
        plan, _ = await service.plan_get(KEYS, CONTEXT)
        await asyncio.sleep(0.01)
        await service.observe(plan, Outcome(0.01))
        await service.plan_put(NAMESPACE, 5, CONTEXT)
    await server.stop()
    # A kill in the middle of a line costs that line.
    with log.open("a") as stream:
        stream.write('{"kind":"deci')
    server = await start(decision_log=log)
    await ask(server)
    await server.stop()
    found = read_log(log)
    assert [(one.arm, one.took_s) for one in found] == [("ladder/1", 0.01), ("ladder", None), ("ladder/1", None)]


async def test_a_log_is_explained_and_replayed(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "decisions.jsonl"
    server = await start(decision_log=log)
    await fill(server)
    async with Client(server.url) as client:
        service = Service(client)
        for deadline_s in (None, 50.0):
            plan, _ = await service.plan_get(KEYS, CONTEXT._replace(deadline_s=deadline_s))
            await asyncio.sleep(0.01)
            await service.observe(plan, Outcome(0.01))
    await server.stop()
    assert plan.decision is not None
    assert main(["decisions", "explain", plan.decision, "--log", str(log)]) == 0
    shown = capsys.readouterr().out
    assert "ladder/2 (quality): it took 10 ms" in shown
    assert "Beyond the budget: ladder/0" in " ".join(shown.split())
    assert main(["decisions", "explain", plan.decision, "--log", str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["arms"][0]["terms"]["stages_s"].keys() == {"read", "wire", "copy", "decode"}
    assert main(["decisions", "replay", str(log)]) == 0
    assert "best-static" in capsys.readouterr().out
    assert main(["decisions", "replay", str(log), "--policy", "static:ladder/1", "--policy", "model", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["decisions"], report["outcomes"]) == (2, 2)
    assert [row["policy"] for row in report["policies"]] == ["static:ladder/1", "model"]
    assert report["policies"][0]["same"] == 0.5
    for wrong, says in (
        (["explain", "0" * 16, "--log", str(log)], "no decision"),
        (["explain", plan.decision, "--log", str(tmp_path / "none")], "cannot read"),
        (["replay", str(tmp_path / "none")], "cannot read"),
        (["replay", str(log), "--policy", "luck"], "no policy 'luck'"),
    ):
        assert main(["decisions", *wrong]) == 2
        assert says in capsys.readouterr().err


async def test_a_log_that_is_long_begins_anew(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "decisions.jsonl"
    server = await start(decision_log=log, decision_log_bytes=1 << 16)
    await fill(server)
    while not (old := tmp_path / "decisions.jsonl.1").exists():
        await ask(server)
    assert old.stat().st_size < 70_000
    assert log.stat().st_size < 1 << 16


async def test_a_prefix_is_put_and_got_as_planned(start: Start) -> None:
    server = await start()
    async with Client(server.url) as client:
        await client.push_profiles(NAMESPACE, measured(), {})
        prefixes = PlannedPrefixes(client, LAYOUT)
        plan, put = await prefixes.put(IDS, PLANES)
        assert (plan.arm, put.tokens, put.held_tokens) == ("ladder", 40, 0)
        got = await prefixes.get(IDS, Wish(prefill_s=100.0))
        assert got.prefix is not None
        assert (got.plan.arm, got.prefix.tokens, got.prefix.levels) == ("ladder/1", 40, [2] * 5)
        fine = await prefixes.get(IDS, Wish(prefill_s=100.0, deadline_s=50.0))
        assert fine.prefix is not None
        assert (fine.plan.arm, fine.prefix.levels) == ("ladder/2", [3] * 5)
        computed = await prefixes.get(IDS, Wish(prefill_s=1e-9))
        assert (computed.plan.action, computed.prefix, len(computed.match.held)) == (Action.RECOMPUTE, None, 5)
        await prefixes.service.observe(computed.plan, Outcome(1e-9))
    assert await server.metric('kvstore_outcomes_total{result="learned"}') == 4


async def test_no_compression_is_a_plan_too(start: Start) -> None:
    server = await start()
    async with Client(server.url) as client:
        await client.push_profiles(NAMESPACE, measured(), {})
        prefixes = PlannedPrefixes(client, LAYOUT, pipeline=LADDER)
        plan, _ = await prefixes.put(IDS, PLANES, Wish(budget_nats=0.0))
        assert plan.arm == "exact"
        got = await prefixes.get(IDS, Wish(budget_nats=0.0, prefill_s=100.0))
        assert got.prefix is not None
        assert got.plan.arm == "exact"
        assert torch.equal(got.prefix.planes["k"], PLANES["k"][:, :40])


async def test_without_profiles_prefixes_go_as_configured(start: Start) -> None:
    server = await start()
    async with Client(server.url) as client:
        prefixes = PlannedPrefixes(client, LAYOUT, pipeline=LADDER, level=0)
        assert (await prefixes.put(IDS, PLANES))[0] == Plan(Action.STATIC)
        got = await prefixes.get(IDS)
        assert got.prefix is not None
        assert (got.plan.action, got.prefix.levels) == (Action.STATIC, [1] * 5)
        assert (await prefixes.get(IDS[:5])).prefix is None


async def test_a_server_that_knows_no_plans_makes_no_difference(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.server.plan.PlanRoutes.routes", lambda _: [])
    server = await start()
    async with Client(server.url) as client:
        prefixes = PlannedPrefixes(client, LAYOUT, pipeline=LADDER)
        await prefixes.put(IDS, PLANES)
        got = await prefixes.get(IDS)
        assert got.prefix is not None
        assert (got.plan.action, got.prefix.tokens) == (Action.STATIC, 40)
    # It was asked once.
    assert await server.metric('kvstore_requests_total{route="unknown",status="404"}') == 1


async def test_calibration_comes_with_the_plan(start: Start) -> None:
    server = await start()
    weighted = build_pipeline([{"stage": "raw"}])
    assert weighted.lossless
    digest, data = artefact()
    async with Client(server.url) as client:
        await client.push_profiles(NAMESPACE, measured(artefacts=[digest]), {digest: data})
        service = Service(client)
        plan = await service.plan_put(NAMESPACE, 5, CONTEXT)
        assert plan.artefacts == (digest,)
        assert await service.artefacts(NAMESPACE, plan.artefacts) == {digest: data}
        await put_prefix(client, LAYOUT, IDS, PLANES, LADDER)
        assert (await service.plan_get(KEYS, CONTEXT))[0].artefacts == (digest,)
        with pytest.raises(PipelineError, match="no calibration artefact"):
            await service.artefacts(NAMESPACE, ["0" * 64])


async def test_a_deadline_cuts_the_stream_and_keeps_coarse_levels(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await start()
    async with Client(server.url) as client:
        await client.push_profiles(NAMESPACE, measured(), {})
        await put_prefix(client, LAYOUT, IDS, PLANES, LADDER)
        prefixes = PlannedPrefixes(client, LAYOUT)
        # A moment after the plan nothing of the deadline is left.
        monkeypatch.setattr("kvstore.planned._stop_s", lambda *_: 0.0)
        got = await prefixes.get(IDS, Wish(prefill_s=100.0, deadline_s=50.0))
        assert got.prefix is not None
        assert (got.prefix.tokens, got.prefix.miss) == (0, Miss(Reason.DEADLINE))
    # What was cut short was not reported.
    assert await server.metric('kvstore_outcomes_total{result="learned"}') == 0


async def test_gets_tell_how_fast_tiers_are(start: Start) -> None:
    server = await start(decision_log=None)
    await fill(server)
    before = (await ask(server)).json["terms"]["fixed_s"]["tier"]
    async with Client(server.url) as client:
        await client.get(KEYS)
    await asyncio.sleep(0)
    # So few bytes tell of the time to the first one.
    assert (await ask(server)).json["terms"]["fixed_s"]["tier"] > before


async def test_a_level_that_is_missing_is_told_to_those_who_place(start: Start) -> None:
    server = await start()
    await fill(server)
    async with Client(server.url) as client:
        await client.trim(KEYS, level=0)
    answer = (await ask(server)).json
    assert answer["action"] == "recompute"
    assert await server.metric('kvstore_fetched_levels_total{level="1",tier="none"}') == 5


async def test_tenants_are_planned_for_apart(start: Start) -> None:
    tokens = {"one": "a" * 32, "two": "b" * 32}
    server = await start(tenants=tokens, tenant_secret="c" * 32)
    async with Client(server.url, token=tokens["one"]) as one, Client(server.url, token=tokens["two"]) as two:
        await one.push_profiles(NAMESPACE, measured(), {})
        for client in (one, two):
            await put_prefix(client, LAYOUT, IDS, PLANES, LADDER)
        plan, _ = await Service(one).plan_get(KEYS, CONTEXT)
        assert plan.action is Action.FETCH
        assert (await Service(two).plan_get(KEYS, CONTEXT))[0].action is Action.STATIC
        await Service(two).observe(plan, Outcome(0.001))
        assert await server.metric('kvstore_outcomes_total{result="unknown"}') == 1
        await Service(one).observe(plan, Outcome(0.001))
        assert await server.metric('kvstore_outcomes_total{result="learned"}') == 1
