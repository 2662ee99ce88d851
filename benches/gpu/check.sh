#!/usr/bin/env bash
# On a host with an NVIDIA card, in the folder that build.sh made: correctness of the kernels against f64, what compute-sanitizer
# says if it is there, times, beside PyTorch's if that is there, the same bits twice.
#
#     [SEEDS=1] [OUT=FOLDER] [FROM=CHECK] check.sh [RESULTS] [CARD]
#
# FROM goes on with what a run that was ended left in RESULTS: `timeout -s TERM 540 check.sh` ends one in good order. Everything ends up in RESULTS/CARD-DRIVER-DATE-COMMIT.json, the logs beside it, and all of it in OUT/results.tgz (OUT: RESULTS
# unless it is given), however this ends: what was not measured yet is first, and what takes long last. Exit status 0: all that
# could be checked is right; what could not be is named in the file.
#
# Estimates for an H200, 15 minutes in all: what no card has run yet 1, its memcheck 2, losses 2, retrieval 1, errors 1, LeNet 0.5,
# peers 3.5, sweeps 3, the other sanitizers 1.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
results=$(realpath -m "${1:-results}")
ordinal=${2:-0}
out=${OUT:-$results}
from=${FROM:-}
# Cards by the numbers that nvidia-smi gives them.
export CONTRASTIVE_CARD=$ordinal CUDA_DEVICE_ORDER=PCI_BUS_ID here results ordinal

die() { echo "error: $*" >&2; exit 1; }
command -v python3 >/dev/null || die "python3: not found; it writes the results"
for file in contrastive cuda verbs peers.py errors.py commit; do
    [ -e "$here/$file" ] || die "$here/$file: not there; run this in the folder that benches/gpu/build.sh makes"
done
command -v nvidia-smi >/dev/null || die "nvidia-smi: not found, expected an NVIDIA driver"
nvidia-smi -i "$ordinal" >/dev/null || die "nvidia-smi: found no card $ordinal, expected one"
mkdir -p "$results" "$out"
if [ -z "$from" ]; then
    rm -f "$results"/*.jsonl "$results"/peers.json "$results"/errors-*.json
    : >"$results/checks.jsonl"
fi
# The driver compiles the kernels once and keeps them here: each step is a process of its own.
export CUDA_CACHE_PATH="$results/cache"
unset CUDA_CACHE_DISABLE

summary() { # The JSON file and the archive, of whatever there is by now; its status is that of the checks.
    local status
    python3 - "$results" "$(cat "$here/commit")" "$ordinal" <<'PYTHON'
import datetime, json, os, re, subprocess, sys

folder, commit, ordinal = sys.argv[1:]
keys = ["name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit", "memory.total"]
asked = ["nvidia-smi", "-i", ordinal, "--query-gpu=" + ",".join(keys), "--format=csv,noheader"]
answer = subprocess.run(asked, capture_output=True, text=True).stdout.strip().split(", ")
card = dict(zip(keys, answer))


def parsed(text):
    """None of what is not JSON: a program that was ended may have written half a line."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def lines(name):
    path = os.path.join(folder, name)
    found = [parsed(line) for line in open(path)] if os.path.exists(path) else []
    return [line for line in found if line is not None]


def whole(name):
    path = os.path.join(folder, name)
    return parsed(open(path).read()) if os.path.exists(path) else None


date = datetime.date.today().isoformat()
found = {
    "card": card, "date": date, "commit": commit, "checks": lines("checks.jsonl"), "loss": lines("loss.jsonl"),
    "objectives": lines("objectives.jsonl"), "retrieve": lines("retrieve.jsonl"),
    "lenet_samples_per_s": [line.get("samples_per_s") for line in lines("lenet/metrics.jsonl")],
    "peers": whole("peers.json"), "errors": [whole(f"errors-{precision}.json") for precision in ("bf16", "f16")],
}
name = "-".join([card.get("name") or "card", card.get("driver_version", "driver"), date, commit[:8]])
path = os.path.join(folder, re.sub(r"[^A-Za-z0-9.-]+", "_", name) + ".json")
with open(path, "w") as out:
    json.dump(found, out, indent=1)
print("results in", path)
sys.exit(any(check["state"] != "ok" and not check["state"].startswith("not checked") for check in found["checks"]))
PYTHON
    status=$?
    tar -czf "$out/results.tgz" --exclude=./cache --exclude=./results.tgz -C "$results" . && echo "archive in $out/results.tgz"
    return $status
}
ended() { # STATUS
    trap - EXIT
    # What was started beside each other.
    kill $(jobs -p) 2>/dev/null
    summary || exit 1
    exit "$1"
}
trap 'ended $?' EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

wanted() { # NAME: not what comes before FROM
    [ -z "$from" ] || [ "$from" = "$1" ] || return 1
    from=
}
check() { # NAME LIMIT COMMAND...: the limit in seconds
    wanted "$1" || return 0
    local name=$1 limit=$2 start=$SECONDS state=ok
    shift 2
    echo "== $name: $*"
    # In a shell of its own, as a step may be a function (which is exported); waited for, so that this script hears its signals.
    timeout -k 10 "$limit" bash -c '"$@"' bash "$@" >"$results/$name.log" 2>&1 &
    wait $!
    case $? in
        0) ;;
        124 | 137) state="ended after $limit s" ;;
        *) state=failed ;;
    esac
    [ "$state" = ok ] || tail -n 20 "$results/$name.log"
    echo "$state, $((SECONDS - start)) s ($results/$name.log)"
    printf '{"check": "%s", "state": "%s", "seconds": %d}\n' "$name" "$state" "$((SECONDS - start))" >>"$results/checks.jsonl"
}
skip() { # NAME WHY
    wanted "$1" || return 0
    echo "== $1: not checked, $2"
    printf '{"check": "%s", "state": "not checked: %s", "seconds": 0}\n' "$1" "$2" >>"$results/checks.jsonl"
}

check devices 60 "$here/contrastive" devices
# What no card has run yet.
new=(drawn_pairings plain_pairs normals_on orders_of raw_addresses)
check new 180 "$here/cuda" --nocapture "${new[@]}"

# The sanitizer slows kernels a hundredfold: small cases only.
sanitizer=$(command -v compute-sanitizer || true)
export sanitizer
unsanitized="compute-sanitizer is not installed"
if [ -n "$sanitizer" ] && "$sanitizer" --tool memcheck "$here/cuda" no_such_test 2>&1 | grep -qi 'not supported'; then
    sanitizer= unsanitized="compute-sanitizer does not support this host"
fi
sanitized() { # TOOL PROGRAM TEST...
    "$sanitizer" --tool "$1" --error-exitcode 9 "${@:2}"
}
small() { # TOOL
    sanitized "$1" "$here/cuda" embeddings_on features_on blocks_add plain_pairs drawn_pairings normals_on &&
        sanitized "$1" "$here/verbs" attention convolutions layer_norms pooling optimiser rows_are replayed
}
export -f sanitized small
if [ -n "$sanitizer" ]; then
    check memcheck-new 240 sanitized memcheck "$here/cuda" "${new[@]}"
else
    skip memcheck-new "$unsanitized"
fi

bench() { # FILE ARGUMENT...: its line goes to the file once it is whole
    local line
    line=$("$here/contrastive" bench "${@:2}" --device "cuda:$ordinal" --json) && echo "$line" >>"$results/$1"
}
export -f bench
loss() { # N D
    check "loss-$1-$2" 120 bench loss.jsonl loss --precision bf16 --n "$1" --d "$2"
}
objective() { # OBJECTIVE N PRECISION
    check "loss-$1-$3" 60 bench objectives.jsonl loss --precision "$3" --objective "$1" --n "$2" --d 512
}
for d in 128 256 512 768 1024; do
    for n in 4096 32768; do
        loss $n $d
    done
done
for n in 1024 8192 16384 65536 1048576; do
    loss $n 512
done
objective joint 32768 bf16
objective joint 32768 f16
objective sigmoid 32768 bf16
for objective in mmd joint-mmd; do
    objective $objective 16384 bf16
done

for k in 10 100; do
    check "retrieve-$k" 120 bench retrieve.jsonl retrieve --n 16384 --m 1000000 --d 512 --k $k
done

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
export -f lenet same_bits
check determinism 120 same_bits

torch=
CUDA_VISIBLE_DEVICES=$ordinal python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null && torch=1
for precision in bf16 f16; do
    if [ -n "$torch" ]; then
        check "errors-$precision" 120 env CUDA_VISIBLE_DEVICES="$ordinal" python3 "$here/errors.py" "$here/contrastive" \
            --device cuda --precision $precision --seeds "${SEEDS:-1}" --out "$results/errors-$precision.json"
    else
        skip "errors-$precision" "python3 has no torch that sees the card"
    fi
done

if [ -n "$torch" ]; then
    check peers 420 env CUDA_VISIBLE_DEVICES="$ordinal" python3 "$here/peers.py" "$results/loss.jsonl" \
        "$results/lenet/metrics.jsonl" "$results/peers.json"
else
    skip peers "python3 has no torch that sees the card"
fi

known=()
for test in "${new[@]}"; do known+=(--skip "$test"); done
check sweeps 300 "$here/cuda" --nocapture "${known[@]}"
check verbs 180 "$here/verbs"

# The four tools beside each other, as nothing is timed any more.
for tool in memcheck racecheck synccheck initcheck; do
    # Here, as FROM is this shell's.
    wanted "$tool" || continue
    if [ -n "$sanitizer" ]; then
        check "$tool" 300 small "$tool" &
    else
        skip "$tool" "$unsanitized"
    fi
done
wait
