#!/usr/bin/env bash
# Everything a check on a GPU host needs, in a folder: `benches/gpu/build.sh [FOLDER]`, then carry the folder there and
# run its check.sh. The host needs a driver; no Rust, no CUDA toolkit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-target/gpu-check}
mkdir -p "$out"

# The command line comes with the tests that run it.
cargo test --release --test cuda --test verbs --no-run --message-format json |
    python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["kind"][0] in ("bin", "test"):
        print(message["executable"], message["target"]["name"])' |
    while read -r path name; do cp "$path" "$out/$name"; done
strip "$out/contrastive" "$out/cuda" "$out/verbs"
cp benches/gpu/check.sh benches/gpu/peers.py benches/peers/errors.py "$out/"
git rev-parse HEAD >"$out/commit"

size=$(du -sm "$out" | cut -f1)
[ "$size" -lt 60 ] || { echo "error: $out: found $size MiB, expected less than 60" >&2; exit 1; }
echo "$out: $size MiB; on the GPU host: $out/check.sh [RESULTS]"
