#!/bin/sh
# LMCache's server (MP mode) with kvstore as its second tier, and vLLM in front of it.
# Usage: lmcache_server.sh [KVSTORE_URL]; then, on the same machine:
#   vllm serve MODEL --kv-transfer-config '{"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both",
#       "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": 6556}}'
set -eu
URL=${1:-http://127.0.0.1:8420}
exec lmcache server --host 127.0.0.1 --port "${LMCACHE_PORT:-6556}" --http-port "${LMCACHE_HTTP_PORT:-9556}" \
    --l1-size-gb 0.5 --eviction-policy LRU --chunk-size "${CHUNK_TOKENS:-256}" --supported-transfer-mode auto \
    --l2-adapter "{\"type\": \"plugin\", \"module_path\": \"kvstore.connectors.lmcache\",
        \"class_name\": \"KvstoreL2Adapter\", \"adapter_params\":
        {\"url\": \"$URL\", \"lookup_deadline_s\": ${LOOKUP_DEADLINE_S:-0.5}}}"
