"""The Python client: a prefill node puts a prompt's KV cache, a decode node waits for it and fetches what time allows.

    kvstore serve &
    python examples/python_client.py [http://127.0.0.1:8420]

Both nodes are tasks of this process here; what they share is the server, the layout and the token ids.
"""

import asyncio
import sys
import time

import torch

from kvstore.client import Client
from kvstore.codecs import named_pipeline
from kvstore.fetch import fetch_run
from kvstore.keys import chunk_keys
from kvstore.layout import attention_layout
from kvstore.prefix import get_prefix, put_prefix

# What must be equal for two engines to share a cache; it becomes part of every key, so another run finds nothing old.
LAYOUT = attention_layout("my-model", f"weights of {time.time_ns()}", layers=4, kv_heads=2, head_dim=64)
TOKEN_IDS = list(range(1100))


async def prefill(url: str) -> None:
    """Compute the cache (here: noise) and put it in three quality levels."""
    planes = {name: torch.randn(4, len(TOKEN_IDS), 2, 64).bfloat16() for name in ("k", "v")}
    await asyncio.sleep(0.2)
    async with Client(url) as client:
        put = await put_prefix(client, LAYOUT, TOKEN_IDS, planes, named_pipeline("ladder-packed"))
    print(f"prefill node: put {put.tokens} tokens in {put.size_bytes} bytes")


async def decode(url: str) -> None:
    """Ask before anything is there; the put answers the question."""
    async with Client(url) as client:
        prefix = await get_prefix(client, LAYOUT, TOKEN_IDS, level=1, wait_s=30)
        print(f"decode node: {prefix.tokens} tokens at level 1 in {prefix.size_bytes} bytes")
        # Frames as they are stored, coarse levels of all chunks first: at a deadline every chunk is as good as it got.
        keys = chunk_keys(LAYOUT, TOKEN_IDS)
        fetched = await fetch_run(client, keys, deadline_s=2.0)
        print(f"decode node: {len(fetched.frames)} chunks with {[frame.levels for frame in fetched.frames]} levels")
        assert fetched.cut is None, f"the deadline was too near: {fetched.cut}"
        # Only full chunks are stored.
        print(f"decode node: computes {len(TOKEN_IDS) - prefix.tokens} tokens itself")


async def main(url: str) -> None:
    """Run both nodes."""
    await asyncio.gather(decode(url), prefill(url))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8420"))
