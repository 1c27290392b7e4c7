"""Router for prefill/decode disaggregation: one OpenAI-compatible address in front of two kinds of engine.

A request goes to a prefill engine first, cut down to one token; that engine's connector puts the prompt's KV cache into
kvstore. Then it goes as it is to a decode engine, whose connector fetches that cache; its answer is passed on as it
comes. The engines need not know each other, and nothing but the request passes between them: keys are made from the
token ids.

    python examples/pd_router.py --prefill http://127.0.0.1:8101 --decode http://127.0.0.1:8102 --port 8100
    curl http://127.0.0.1:8100/v1/completions -H 'Content-Type: application/json' \
        -d '{"model": "m", "prompt": "To be, or not", "max_tokens": 16}'

The header `Kvstore-Prefill` of an answer says what became of the first step. Where a prefill engine is down or fails,
the decode engine computes the prompt itself; a request that it refuses (status 4xx) is refused.
"""

import argparse
import asyncio
import json
import logging
import signal
from collections.abc import AsyncIterator, Sequence
from itertools import cycle
from typing import Any

import aiohttp
from aiohttp import web

ROUTES = ("/v1/completions", "/v1/chat/completions")
BODY_BYTES_MAX = 64 << 20

log = logging.getLogger("pd_router")


class Router:
    """Sends each request to the next prefill engine, then to the next decode engine.

    Args:
        prefill: URLs of engines that compute prompts, such as `vllm serve` with a connector that is a `kv_producer`.
        decode: URLs of engines that answer, with a `kv_consumer`.
        prefill_timeout_s: Longest time that a request waits for its prefill.
    """

    def __init__(self, prefill: Sequence[str], decode: Sequence[str], prefill_timeout_s: float = 60.0) -> None:
        self._engines = {"prefill": list(prefill), "decode": list(decode)}
        self._prefill, self._decode = cycle(prefill), cycle(decode)
        self._prefill_timeout = aiohttp.ClientTimeout(total=prefill_timeout_s)
        self._session: aiohttp.ClientSession

    def app(self) -> web.Application:
        """The application that routes."""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.cleanup_ctx.append(self._life)
        app.add_routes([web.post(path, self.complete) for path in ROUTES])
        app.add_routes([web.get("/v1/models", self.models), web.get("/health", self.health)])
        return app

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Prefill here, decode there."""
        try:
            body = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return _error(400, "the body must be a JSON object")
        refusal, prefilled = await self._run_prefill(request, body)
        return refusal or await self._run_decode(request, body, prefilled)

    async def models(self, request: web.Request) -> web.StreamResponse:
        """What the decode engine serves."""
        try:
            async with self._session.get(next(self._decode) + request.path, headers=_passed(request)) as answer:
                return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            return _error(502, f"the decode engine cannot be asked: {_name(exc)}")

    async def health(self, _: web.Request) -> web.Response:
        """200 while every engine is well; else 503, with those that are not."""
        kinds = [(kind, url) for kind, urls in self._engines.items() for url in urls]
        well = await asyncio.gather(*(self._is_well(url) for _, url in kinds))
        sick = [f"{kind} {url}" for (kind, url), ok in zip(kinds, well, strict=True) if not ok]
        return web.json_response({"down": sick}, status=503 if sick else 200)

    async def _run_prefill(self, request: web.Request, body: dict[str, Any]) -> tuple[web.Response | None, str]:
        """The answer of an engine that refuses the request, else None; and what is to be said of the prefill."""
        url = next(self._prefill)
        try:
            async with self._session.post(
                url + request.path, json=_one_token(body), headers=_passed(request), timeout=self._prefill_timeout
            ) as answer:
                text = await answer.read()
                if answer.status < 400:
                    return None, "ok"
                if answer.status < 500:
                    headers = {"Kvstore-Prefill": f"refused; {answer.status}"}
                    kind = answer.content_type
                    return web.Response(status=answer.status, body=text, content_type=kind, headers=headers), ""
                failure = f"failed; status {answer.status}"
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            failure = f"failed; {_name(exc)}"
        log.warning("prefill on %s %s; the decode engine computes the prompt", url, failure)
        return None, failure

    async def _run_decode(self, request: web.Request, body: dict[str, Any], prefilled: str) -> web.StreamResponse:
        url = next(self._decode)
        response: web.StreamResponse | None = None
        try:
            async with self._session.post(url + request.path, json=body, headers=_passed(request)) as answer:
                headers = {"Content-Type": answer.headers.get("Content-Type", ""), "Kvstore-Prefill": prefilled}
                response = web.StreamResponse(status=answer.status, headers=headers)
                await response.prepare(request)
                async for part in answer.content.iter_any():
                    await response.write(part)
                await response.write_eof()
                return response
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            log.warning("decode on %s failed: %s", url, _name(exc))
            if response is None:
                return _error(502, f"the decode engine cannot be asked: {_name(exc)}", prefilled)
            # The answer has begun, so there is no other way to say that it ends here.
            if request.transport is not None:
                request.transport.abort()
            return response

    async def _is_well(self, url: str) -> bool:
        try:
            async with self._session.get(url + "/health", timeout=aiohttp.ClientTimeout(total=5)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def _life(self, _: web.Application) -> AsyncIterator[None]:
        # Generating takes as long as it takes; who asks may hang up at any time.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, trust_env=False) as self._session:
            yield


def _one_token(body: dict[str, Any]) -> dict[str, Any]:
    """The request as a prefill engine gets it: the same prompt, one token, no stream."""
    more = ("stream_options", "min_tokens", "best_of", "max_completion_tokens")
    return {name: value for name, value in body.items() if name not in more} | {
        "max_tokens": 1,
        "n": 1,
        "stream": False,
    }


def _passed(request: web.Request) -> dict[str, str]:
    """Headers that go along: who asks, and how the request is named in logs."""
    return {name: request.headers[name] for name in ("Authorization", "X-Request-Id") if name in request.headers}


def _error(status: int, message: str, prefilled: str = "") -> web.Response:
    """An error as OpenAI's clients read it."""
    body = {"error": {"message": message, "type": "router_error", "code": status}}
    headers = {"Kvstore-Prefill": prefilled} if prefilled else {}
    return web.Response(status=status, text=json.dumps(body), content_type="application/json", headers=headers)


def _name(exc: BaseException) -> str:
    return type(exc).__name__


async def _serve(router: Router, host: str, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(router.app(), access_log=None, shutdown_timeout=5)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        print(f"listening on http://{host}:{runner.addresses[0][1]}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> None:
    """Route until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="Route requests to prefill engines, then to decode engines.")
    parser.add_argument("--prefill", nargs="+", required=True, metavar="URL", help="engines that compute prompts")
    parser.add_argument("--decode", nargs="+", required=True, metavar="URL", help="engines that answer")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100, help="0 takes a free one")
    parser.add_argument("--prefill-timeout-s", type=float, default=60.0, help="then the decode engine computes itself")
    flags = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    router = Router(flags.prefill, flags.decode, flags.prefill_timeout_s)
    asyncio.run(_serve(router, flags.host, flags.port))


if __name__ == "__main__":
    main()
