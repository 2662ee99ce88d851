#!/usr/bin/env bash
# On a host with an NVIDIA card, in the folder that build.sh made: correctness of the kernels against f64, the same bits
# twice, times, beside PyTorch's if that is there, then what compute-sanitizer says if it is there.
#
#     check.sh [RESULTS] [CARD]
#
# Everything ends up in RESULTS/CARD-DRIVER-DATE-COMMIT.json, the logs beside it. Exit status 0: all that could be checked
# is right; what could not be is named in the file.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
results=${1:-results}
ordinal=${2:-0}
export CONTRASTIVE_CARD=$ordinal

die() { echo "error: $*" >&2; exit 1; }
command -v python3 >/dev/null || die "python3: not found; it writes the results"
for file in contrastive cuda verbs peers.py commit; do
    [ -e "$here/$file" ] || die "$here/$file: not there; run this in the folder that benches/gpu/build.sh makes"
done
command -v nvidia-smi >/dev/null || die "nvidia-smi: not found, expected an NVIDIA driver"
nvidia-smi -i "$ordinal" >/dev/null || die "nvidia-smi: found no card $ordinal, expected one"
mkdir -p "$results"
: >"$results/checks.jsonl"

check() { # NAME COMMAND...
    local name=$1 start=$SECONDS state=ok
    shift
    echo "== $name: $*"
    if ! "$@" >"$results/$name.log" 2>&1; then
        state=failed
        tail -n 20 "$results/$name.log"
    fi
    echo "$state, $((SECONDS - start)) s ($results/$name.log)"
    printf '{"check": "%s", "state": "%s", "seconds": %d}\n' "$name" "$state" "$((SECONDS - start))" >>"$results/checks.jsonl"
}
skip() { # NAME WHY
    echo "== $1: not checked, $2"
    printf '{"check": "%s", "state": "not checked: %s", "seconds": 0}\n' "$1" "$2" >>"$results/checks.jsonl"
}

check devices "$here/contrastive" devices
check losses "$here/cuda" --nocapture
check verbs "$here/verbs"

# LeNet on one card: a run, its times epoch by epoch, and the same again for its bits.
lenet() { # FOLDER
    rm -rf "$1"
    "$here/contrastive" train digits --device "cuda:$ordinal" --precision bf16 --samples 40960 --batch 512 --epochs 12 \
        --log-every 80 --out "$1"
}
same_bits() {
    lenet "$results/lenet" && lenet "$results/lenet-again" &&
        cmp "$results/lenet/model.safetensors" "$results/lenet-again/model.safetensors"
}
check determinism same_bits

: >"$results/loss.jsonl"
: >"$results/mmd.jsonl"
loss() { # N D
    "$here/contrastive" bench loss --device "cuda:$ordinal" --precision bf16 --n "$1" --d "$2" --json >>"$results/loss.jsonl"
}
mmd() { # objective
    "$here/contrastive" bench loss --device "cuda:$ordinal" --precision bf16 --objective "$1" --n 16384 --d 512 --json >>"$results/mmd.jsonl"
}
for d in 128 256 512 768 1024; do
    for n in 4096 32768; do
        check "loss-$n-$d" loss $n $d
    done
done
for n in 1024 8192 16384 65536; do
    check "loss-$n-512" loss $n 512
done
check loss-1048576-512 loss 1048576 512
for objective in mmd joint-mmd; do
    check "loss-$objective" mmd $objective
done
: >"$results/retrieve.jsonl"
retrieve() { # K
    "$here/contrastive" bench retrieve --device "cuda:$ordinal" --n 16384 --m 1000000 --d 512 --k "$1" --json >>"$results/retrieve.jsonl"
}
for k in 10 100; do
    check "retrieve-$k" retrieve $k
done

if CUDA_VISIBLE_DEVICES=$ordinal python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
    check peers env CUDA_VISIBLE_DEVICES="$ordinal" python3 "$here/peers.py" "$results/loss.jsonl" \
        "$results/lenet/metrics.jsonl" "$results/peers.json"
    for precision in bf16 f16; do
        check "errors-$precision" env CUDA_VISIBLE_DEVICES="$ordinal" python3 "$here/errors.py" "$here/contrastive" --device cuda \
            --precision $precision --seeds 4 --out "$results/errors-$precision.json"
    done
else
    skip peers "python3 has no torch that sees the card"
fi

# The sanitizer slows kernels a hundredfold: the small cases only, and the four tools beside each other, as nothing is timed.
sanitizer=$(command -v compute-sanitizer || true)
small() { # TOOL
    "$sanitizer" --tool "$1" --error-exitcode 9 "$here/cuda" embeddings_on features_on blocks_add &&
        "$sanitizer" --tool "$1" --error-exitcode 9 "$here/verbs" attention convolutions layer_norms pooling optimiser \
            rows_are replayed
}
for tool in memcheck racecheck synccheck initcheck; do
    if [ -n "$sanitizer" ]; then
        check "$tool" small "$tool" &
    else
        skip "$tool" "compute-sanitizer is not installed"
    fi
done
wait

python3 - "$results" "$(cat "$here/commit")" "$ordinal" <<'PYTHON'
import datetime, json, os, re, subprocess, sys

folder, commit, ordinal = sys.argv[1:]
keys = ["name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit", "memory.total"]
asked = ["nvidia-smi", "-i", ordinal, "--query-gpu=" + ",".join(keys), "--format=csv,noheader"]
answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip().split(", ")
card = dict(zip(keys, answer))


def lines(name):
    path = os.path.join(folder, name)
    return [json.loads(line) for line in open(path)] if os.path.exists(path) else []


def whole(name):
    path = os.path.join(folder, name)
    return json.load(open(path)) if os.path.exists(path) else None


date = datetime.date.today().isoformat()
found = {
    "card": card, "date": date, "commit": commit, "checks": lines("checks.jsonl"), "loss": lines("loss.jsonl"),
    "mmd": lines("mmd.jsonl"), "retrieve": lines("retrieve.jsonl"),
    "lenet_samples_per_s": [line["samples_per_s"] for line in lines("lenet/metrics.jsonl")],
    "peers": whole("peers.json"), "errors": [whole(f"errors-{precision}.json") for precision in ("bf16", "f16")],
}
name = "-".join([card["name"], card["driver_version"], date, commit[:8]])
path = os.path.join(folder, re.sub(r"[^A-Za-z0-9.-]+", "_", name) + ".json")
with open(path, "w") as out:
    json.dump(found, out, indent=1)
print("results in", path)
sys.exit(any(check["state"] == "failed" for check in found["checks"]))
PYTHON
