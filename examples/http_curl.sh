#!/bin/sh
# Everything that curl alone can do with a server: keep bytes under a key, read them back whole or in part, ask what is
# there, wait for what somebody is about to put.
#
#     kvstore serve &
#     sh examples/http_curl.sh [http://127.0.0.1:8420]
#
# Needs curl, sha256sum and xxd. Where the server has a token, set KVSTORE_TOKEN.
set -eu

url=${1:-http://127.0.0.1:8420}
namespace=00112233445566778899aabbccddeeff
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

ask() {
    curl --silent --show-error --fail --header "Authorization: Bearer ${KVSTORE_TOKEN:-}" "$@"
}
digest() {
    printf '%s' "$1" | sha256sum | cut -c -64
}

head -c 100000 /dev/urandom > "$folder/file"
chunk=$url/v1/kv/$namespace/$(digest "first key")

echo "put, and wait until it is on the disk (if the server has one):"
ask --upload-file "$folder/file" "$chunk?ack=disk"
echo

echo "get it back, whole and a part of it:"
ask --output "$folder/copy" "$chunk"
cmp "$folder/file" "$folder/copy" && echo "the same 100000 bytes"
ask --range 0-9 "$chunk" | cmp - "$folder/file" --bytes=10 && echo "the first ten bytes"

echo "how much of a run of three keys is there (digests travel as raw bytes):"
for name in "first key" "second key" "third key"; do digest "$name"; done | xxd -r -p > "$folder/digests"
ask --data-binary "@$folder/digests" --header "Content-Type: application/vnd.kvstore.digests" \
    "$url/v1/match?namespace=$namespace"
echo

echo "wait for the second key, which another process puts a second later:"
second=$url/v1/kv/$namespace/$(digest "second key")
(sleep 1 && printf 'here it is' | ask --output /dev/null --upload-file - "$second") &
ask "$second?wait_ms=20000"
echo
wait

echo "keep the first for an hour, whatever room others need:"
head -c 32 "$folder/digests" | ask --data-binary @- --header "Content-Type: application/vnd.kvstore.digests" \
    "$url/v1/pins?namespace=$namespace&ttl_s=3600"
echo

echo "forget the whole namespace:"
ask --request DELETE "$url/v1/kv/$namespace"
echo
