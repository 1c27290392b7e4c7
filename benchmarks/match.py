"""Latency of `match` over many keys that are all present, from the last byte of the request to that of the answer."""

import json
import time
from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.bare import BareHttp
from benchmarks.harness import Aim, Row, at_most, percentile
from benchmarks.wire_peers import NAMESPACE, benchmark_key
from kvstore.client import Client
from kvstore.frame import pack_frame
from kvstore.header import blob_header
from kvstore.keys import DIGEST_BYTES, ChunkKey, split_key
from kvstore.wire import DIGESTS_TYPE

VALUE_BYTES = 64
WARM_UPS = 5
LAST_DIGEST = "last digest held back"
AT_ONCE = "request sent at once"
WHOLE = "whole request"

_PUT_KEYS = 1000
_ANSWER_BYTES_MAX = 1 << 20
# The server has read everything else by then, so what follows is its answer to the last bytes and nothing more.
_HOLD_BACK_S = 0.01
_TARGETS_S = (0.010, 0.002)

Sample = Callable[[BareHttp, bytes, memoryview], tuple[float, float]]
"""Sends a request of a head and digests: when the clock starts, and when the last byte of the answer is there."""


async def put_keys(url: str, count: int) -> list[ChunkKey]:
    """Store that many tiny frames; their keys."""
    keys = [benchmark_key("match", number) for number in range(count)]
    frames = [pack_frame(blob_header(key), [key[-DIGEST_BYTES:] * (VALUE_BYTES // DIGEST_BYTES)]) for key in keys]
    async with Client(url, timeout_s=120.0) as client:
        for start in range(0, count, _PUT_KEYS):
            batch = slice(start, start + _PUT_KEYS)
            stored = await client.put(list(zip(keys[batch], frames[batch], strict=True)))
            assert all(result.error is None for result in stored), "every frame fits into the server's memory"
    return keys


def match_rows(url: str, keys: Sequence[ChunkKey], repetitions: int, advance: Callable[[], None]) -> list[Row]:
    """One row for each way to read "from the last request byte", repetitions interleaved."""
    digests = memoryview(b"".join([split_key(key)[1] for key in keys]))
    samples: dict[str, list[float]] = {case: [] for case in _SAMPLES}
    with BareHttp(url, _ANSWER_BYTES_MAX) as http:
        head = http.head("POST", f"/v1/match?namespace={NAMESPACE.hex()}", DIGESTS_TYPE, len(digests))
        _check(http, head, digests, len(keys))
        for repetition in range(-WARM_UPS, repetitions):
            for case, sample in _SAMPLES.items():
                start_s, end_s = sample(http, head, digests)
                if repetition >= 0:
                    samples[case].append(end_s - start_s)
            advance()
    return [_row(case, len(keys), taken) for case, taken in samples.items()]


def match_aims(rows: Sequence[Row]) -> list[Aim]:
    """Aims on the median, judged by the slower of the two ways to read "from the last request byte"."""
    median_s = max(float(row["median_s"]) for row in rows if row["case"] in (LAST_DIGEST, AT_ONCE))
    aim = f"match over {rows[0]['keys']:,} keys, all present: median s from last request byte to last answer byte"
    return [at_most(aim, target_s, median_s) for target_s in _TARGETS_S]


def _last_digest(http: BareHttp, head: bytes, digests: memoryview) -> tuple[float, float]:
    http.send(head, digests[:-DIGEST_BYTES])
    time.sleep(_HOLD_BACK_S)
    start_s = time.perf_counter()
    http.send(digests[-DIGEST_BYTES:])
    http.receive()
    return start_s, time.perf_counter()


def _at_once(http: BareHttp, head: bytes, digests: memoryview) -> tuple[float, float]:
    http.send(head, digests)
    start_s = time.perf_counter()
    http.receive()
    return start_s, time.perf_counter()


def _whole(http: BareHttp, head: bytes, digests: memoryview) -> tuple[float, float]:
    start_s = time.perf_counter()
    http.send(head, digests)
    http.receive()
    return start_s, time.perf_counter()


_SAMPLES: dict[str, Sample] = {LAST_DIGEST: _last_digest, AT_ONCE: _at_once, WHOLE: _whole}


def _check(http: BareHttp, head: bytes, digests: memoryview, count: int) -> None:
    http.send(head, digests)
    answer = http.receive()
    assert answer.status == 200, bytes(answer.body)
    assert json.loads(bytes(answer.body))["matched"] == count, "every key that was put is matched"


def _row(case: str, keys: int, samples: Sequence[float]) -> Row:
    return {
        "table": "match",
        "case": case,
        "keys": keys,
        "median_s": median(samples),
        "p10_s": percentile(samples, 10),
        "p90_s": percentile(samples, 90),
        "p99_s": percentile(samples, 99),
        "n": len(samples),
        "samples_s": list(samples),
    }
