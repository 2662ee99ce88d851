#!/usr/bin/env bash
# On a host with an NVIDIA card, in the folder that build.sh made: correctness of the kernels against f64, what
# compute-sanitizer says if it is there, then times, beside PyTorch's if that is there. `check.sh [RESULTS] [CARD]`.
# Exit status 0: all that could be checked is right; what could not be is named in RESULTS/host.json.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
results=${1:-results}
export CONTRASTIVE_CARD=${2:-0}
mkdir -p "$results"
failed=0

nvidia-smi >/dev/null || { echo "error: nvidia-smi: found no card, expected one and its driver" >&2; exit 1; }
check() { # NAME COMMAND...
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    if "$@" >"$results/$name.log" 2>&1; then echo "ok, $((SECONDS - start)) s"; else
        failed=1
        echo "FAILED, see $results/$name.log"
        tail -n 20 "$results/$name.log"
    fi
}

check devices "$here/contrastive" devices
check losses "$here/cuda"
check verbs "$here/verbs"

# The sanitizer slows kernels a hundredfold: the small cases only.
sanitizer=$(command -v compute-sanitizer || true)
if [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck synccheck initcheck; do
        check "$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 "$here/verbs" --test-threads 1
    done
fi

: >"$results/loss.jsonl"
for d in 128 512 1024; do
    for n in 4096 8192 16384 32768 65536; do
        "$here/contrastive" bench loss --device "cuda:$CONTRASTIVE_CARD" --precision bf16 --n $n --d $d --json >>"$results/loss.jsonl" || failed=1
    done
done
"$here/contrastive" bench loss --device "cuda:$CONTRASTIVE_CARD" --precision bf16 --n 1048576 --d 512 --json >>"$results/loss.jsonl" || failed=1

torch=false
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    torch=true
    check peers python3 "$here/peers.py" "$results/loss.jsonl" "$results/peers.json"
fi

python3 - "$results/host.json" "$(cat "$here/commit")" "$torch" "${sanitizer:-}" "$failed" <<'PYTHON' || failed=1
import datetime, json, subprocess, sys
out, commit, torch, sanitizer, failed = sys.argv[1:]
query = "name,driver_version,clocks.sm,clocks.max.sm,power.limit"
card = subprocess.run(["nvidia-smi", "--query-gpu=" + query, "--format=csv,noheader"], capture_output=True, text=True)
json.dump({
    "cards": [dict(zip(query.split(","), line.split(", "))) for line in card.stdout.splitlines()],
    "date": datetime.date.today().isoformat(), "commit": commit,
    "torch_compared": torch == "true", "sanitizer_run": bool(sanitizer), "failed": failed != "0",
}, open(out, "w"), indent=1)
PYTHON
echo "results in $results"
exit $failed
