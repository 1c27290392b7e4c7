"""A small engine that calls the connector as vLLM does, and knows for every block what must be in it.

Its "KV" of a token is a function of all tokens up to it, so a block that was loaded from the wrong place, too late or
not at all is found as soon as a request goes on behind it.
"""

import hashlib
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from tests.vllm_stub import RECORD, cache_config, config, pack

BLOCK = 4
LAYERS, HEADS, DIM = 2, 2, 8


@dataclass
class Request:
    """A request as far as the connector reads it."""

    request_id: str
    prompt_token_ids: list[int]
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: tuple[Any, ...] = ()
    prompt_embeds: Any = None
    pooling_params: Any = None
    resumable: bool = False
    skip_reading_prefix_cache: bool = False
    kv_transfer_params: dict[str, Any] | None = None
    num_computed_tokens: int = 0
    status: str = "waiting"
    blocks: list[int] = field(default_factory=list)
    loaded_tokens: int = 0

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt_token_ids

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def block_hashes(self) -> list[bytes]:
        ids, ends = self.prompt_token_ids, range(BLOCK, len(self.prompt_token_ids) + 1, BLOCK)
        return [hashlib.sha256(f"{self.tag}{ids[:end]}".encode()).digest() for end in ends]

    @property
    def tag(self) -> str:
        """What its KV depends on beside the token ids."""
        return repr((self.cache_salt, self.lora_request))


def kv_of(token_ids: Sequence[int], start: int, end: int, tag: str = "") -> torch.Tensor:
    """What the model computes for tokens: `[tokens, layers, 2, heads, dim]` bfloat16, from each one's whole prefix."""
    rows = []
    for position in range(start, end):
        digest = hashlib.sha256((tag + repr(list(token_ids[: position + 1]))).encode()).digest()
        seed = int.from_bytes(digest[:6], "little")
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.randn((LAYERS, 2, HEADS, DIM), generator=generator).bfloat16())
    return torch.stack(rows)


class Engine:
    """One scheduler and one worker.

    Args:
        module: The connector's module.
        extra: `kv_connector_extra_config`.
        blocks: Blocks of the cache; block 0 is never used, as in the engine.
        step_tokens: Tokens that one step computes.
        role: `kv_both`, `kv_producer` or `kv_consumer`.
        caching: Whether blocks of ended requests are found again.
        exact: Whether blocks must hold exactly what would be computed.
        events: Whether events about blocks are wanted.
    """

    def __init__(
        self,
        module: Any,
        extra: dict[str, Any],
        *,
        blocks: int = 64,
        step_tokens: int = 64,
        role: str = "kv_both",
        caching: bool = True,
        exact: bool = True,
        events: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {"chunk_tokens": 8, "revision": "1", "guard": False}
        self.config = config(role=role, block_tokens=BLOCK, extra=defaults | extra)
        self.config.kv_events_config = SimpleNamespace(enable_kv_cache_events=events)
        cache = cache_config(layers=LAYERS, block_tokens=BLOCK, heads=HEADS, dim=DIM, blocks=blocks)
        roles = module.KVConnectorBase_V1, module.KVConnectorRole
        self.worker = module.KvstoreConnector(self.config, roles[1].WORKER, cache)
        names = cache.kv_cache_groups[0].layer_names
        self.layers = {
            name: torch.zeros((blocks, HEADS, BLOCK, 2 * DIM), dtype=torch.bfloat16) for name in reversed(names)
        }
        self.names = names
        self.worker.register_kv_caches(self.layers)
        self.scheduler = module.KvstoreConnector(self.config, roles[1].SCHEDULER, cache)
        self.scheduler.bind_kv_cache_manager(self)
        self.exact, self.caching, self.step_tokens = exact, caching, step_tokens
        self.free = list(range(blocks - 1, 0, -1))
        self.cached: dict[bytes, int] = {}
        self.users: dict[int, int] = {}
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.remote: dict[str, Request] = {}
        self.ended_remote: dict[str, Request] = {}
        self.finished_ids: set[str] = set()
        self.counts: dict[str, int] = {}
        self.computed_tokens = 0
        self.events: list[Any] = []

    def get_block_ids(self, request_id: str) -> tuple[list[int]]:
        """What the engine's cache manager says."""
        return (list(self.requests[request_id].blocks),)

    def add(self, request: Request) -> None:
        """A request comes."""
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self.scheduler.on_new_request(request)

    def abort(self, request_id: str) -> None:
        """A request is aborted, whatever it is doing."""
        request = self.requests[request_id]
        if request_id in self.remote:
            self.ended_remote[request_id] = self.remote.pop(request_id)
            self._end(request, keep=True)
            return
        (self.waiting if request in self.waiting else self.running).remove(request)
        self._end(request)

    def preempt(self, request: Request) -> None:
        """A running request gives its blocks up and starts again."""
        self.running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)

    def step(self) -> None:
        """One step of the engine."""
        output = self._schedule()
        meta = pickle.loads(pickle.dumps(self.scheduler.build_connector_meta(output)))
        self.worker.bind_connector_metadata(meta)
        self._forward(output)
        # No load here is synchronous, so the engine starts them behind the forward pass.
        self.worker.start_load_kv(SimpleNamespace(attn_metadata=None))
        self.worker.wait_for_save()
        finished, self.finished_ids = self.finished_ids, set()
        sent, received = self.worker.get_finished(finished)
        assert not sent
        invalid = self.worker.get_block_ids_with_load_errors()
        result = SimpleNamespace(
            finished_recving=received, invalid_block_ids=invalid, kv_connector_worker_meta=self._worker_meta()
        )
        self.worker.clear_connector_metadata()
        for side in (self.worker, self.scheduler):
            if (stats := side.get_kv_connector_stats()) is not None:
                for name, count in stats.data.items():
                    self.counts[name] = self.counts.get(name, 0) + count
        self._update(output, result)
        self.events += self.scheduler.take_events()

    def run(self, steps: int = 20_000) -> None:
        """Step until every request has ended."""
        for _ in range(steps):
            if not self.requests:
                return
            computed = self.computed_tokens
            self.step()
            if self.computed_tokens == computed:
                time.sleep(0.001)
        raise AssertionError(f"requests never end: {list(self.requests.values())[:3]}")

    def shutdown(self) -> None:
        """End both halves."""
        self.scheduler.shutdown()
        self.worker.shutdown()

    def _worker_meta(self) -> Any:
        meta = self.worker.build_connector_worker_meta()
        return None if meta is None else pickle.loads(pickle.dumps(meta))

    def _schedule(self) -> SimpleNamespace:
        budget = self.step_tokens
        scheduled: dict[str, int] = {}
        cached = [request for request in self.running if budget > 0]
        before = {request.request_id: request.num_computed_tokens for request in cached}
        for request in cached:
            tokens = min(budget, request.num_prompt_tokens - request.num_computed_tokens)
            scheduled[request.request_id] = tokens
            budget -= tokens
        cached = [request for request in cached if scheduled[request.request_id]]
        scheduled = {name: tokens for name, tokens in scheduled.items() if tokens}
        fresh = []
        for request in list(self.waiting):
            if budget <= 0 or not self._admit(request):
                continue
            tokens = min(budget, request.num_prompt_tokens - request.num_computed_tokens)
            scheduled[request.request_id] = tokens
            budget -= tokens
            fresh.append(SimpleNamespace(req_id=request.request_id, num_computed_tokens=request.num_computed_tokens))
        data = SimpleNamespace(
            req_ids=[request.request_id for request in cached],
            num_computed_tokens=[before[request.request_id] for request in cached],
        )
        return SimpleNamespace(num_scheduled_tokens=scheduled, scheduled_new_reqs=fresh, scheduled_cached_reqs=data)

    def _admit(self, request: Request) -> bool:
        """Whether a waiting request runs in this step."""
        if request.num_computed_tokens == 0 and not request.blocks:
            local = self._local_hit(request)
            found, is_async = self.scheduler.get_num_new_matched_tokens(request, len(local) * BLOCK)
            if found is None:
                return False
            assert found % BLOCK == 0
            assert is_async == (found > 0)
            total = -(-request.num_prompt_tokens // BLOCK)
            if total - len(local) > len(self.free) - sum(self.users.get(b, 0) == 0 for b in local):
                return False
            self._take(request, local, total)
            self.scheduler.update_state_after_alloc(
                request, SimpleNamespace(get_block_ids=lambda: (request.blocks,)), found
            )
            request.num_computed_tokens = len(local) * BLOCK + found
            request.loaded_tokens = found
            if is_async:
                self.waiting.remove(request)
                self.remote[request.request_id] = request
                return False
        self.waiting.remove(request)
        self.running.append(request)
        self._check(request)
        return True

    def _forward(self, output: SimpleNamespace) -> None:
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            start = request.num_computed_tokens
            fresh = kv_of(
                request.prompt_token_ids, start, start + tokens, repr((request.cache_salt, request.lora_request))
            )
            slots = torch.tensor([request.blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, start + tokens)])
            for number, name in enumerate(self.names):
                pack(fresh[:, number, 0], fresh[:, number, 1], *self._halves(self.layers[name]), slots)
            self.computed_tokens += tokens
        if output.num_scheduled_tokens:
            for name in self.names:
                self.worker.wait_for_layer_load(name)
                self.worker.save_kv_layer(name, self.layers[name], None)

    def _update(self, output: SimpleNamespace, result: SimpleNamespace) -> None:
        for request_id, tokens in output.num_scheduled_tokens.items():
            self.requests[request_id].num_computed_tokens += tokens
        failed = set()
        for request in self.remote.values():
            bad = [n for n, block in enumerate(request.blocks) if block in result.invalid_block_ids]
            if bad and bad[0] * BLOCK < request.num_computed_tokens:
                request.num_computed_tokens = bad[0] * BLOCK
                failed.add(request.request_id)
        self.scheduler.update_connector_output(result)
        for request_id in result.finished_recving or ():
            if request_id in self.ended_remote:
                self._release(self.ended_remote.pop(request_id))
                del self.requests[request_id]
                continue
            request = self.remote.pop(request_id)
            if request_id in failed and request.num_computed_tokens == 0:
                self._release(request)
            else:
                self._cache(request)
            self.waiting.insert(0, request)
        for request in list(self.running):
            self._cache(request)
            if request.num_computed_tokens == request.num_prompt_tokens:
                self.running.remove(request)
                self._end(request)

    def _end(self, request: Request, *, keep: bool = False) -> None:
        delay, params = self.scheduler.request_finished_all_groups(request, (request.blocks,))
        assert not delay
        assert params is None
        self.finished_ids.add(request.request_id)
        if not keep:
            self._release(request)
            del self.requests[request.request_id]

    def _local_hit(self, request: Request) -> list[int]:
        found = []
        for digest in request.block_hashes[: (request.num_prompt_tokens - 1) // BLOCK] if self.caching else []:
            if digest not in self.cached:
                break
            found.append(self.cached[digest])
        return found

    def _take(self, request: Request, local: list[int], total: int) -> None:
        for block in local:
            if not self.users.get(block):
                self.free.remove(block)
        fresh = [self.free.pop(0) for _ in range(total - len(local))]
        self.cached = {digest: block for digest, block in self.cached.items() if block not in fresh}
        request.blocks = local + fresh
        for block in request.blocks:
            self.users[block] = self.users.get(block, 0) + 1

    def _release(self, request: Request) -> None:
        for block in request.blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)
        request.blocks = []

    def _cache(self, request: Request) -> None:
        for number, digest in enumerate(request.block_hashes[: request.num_computed_tokens // BLOCK]):
            self.cached.setdefault(digest, request.blocks[number])

    def _check(self, request: Request) -> None:
        """What the request goes on behind must be what the model would have computed."""
        tokens = request.num_computed_tokens
        if not tokens or not self.exact:
            return
        expected = kv_of(request.prompt_token_ids, 0, tokens, request.tag)
        blocks = request.blocks[: -(-tokens // BLOCK)]
        for number, name in enumerate(self.names):
            scratch = torch.zeros((len(blocks), HEADS, BLOCK, 2 * DIM), dtype=torch.bfloat16)
            pack(expected[:, number, 0], expected[:, number, 1], *self._halves(scratch), torch.arange(tokens))
            if not torch.equal(scratch, self.layers[name][blocks]):
                raise AssertionError(f"request {request.request_id} goes on behind wrong blocks in {name}")

    @staticmethod
    def _halves(layer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks, heads, tokens, _ = layer.shape
        keys, values = layer.view(blocks, heads, 2 * tokens, -1).chunk(2, dim=2)
        return keys, values


def assert_recorded() -> None:
    """The attributes that this engine gives the connector are those that the real one has."""
    own = {"blocks", "loaded_tokens"}
    fields = set(Request.__dataclass_fields__) | {"all_token_ids", "num_prompt_tokens", "block_hashes"}
    assert fields - own <= set(RECORD["fields"]["Request"])
