#!/bin/sh
# vLLM with kvstore: prefixes are loaded from a server, and what is computed is stored there.
# usage: vllm_serve.sh MODEL [URL] [further arguments of vllm serve]
set -eu
model=$1
url=${2:-http://127.0.0.1:8420}
[ $# -gt 1 ] && shift
shift

exec vllm serve "$model" "$@" --kv-transfer-config '{
    "kv_connector": "KvstoreConnector",
    "kv_connector_module_path": "kvstore.connectors.vllm",
    "kv_role": "'"${KV_ROLE:-kv_both}"'",
    "kv_connector_extra_config": {"url": "'"$url"'", "chunk_tokens": '"${CHUNK_TOKENS:-256}"'}
}'
