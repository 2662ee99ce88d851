"""PyTorch's symmetric loss, forward and backward in bf16, at the sizes of our own times, and the ratios.

    peers.py OURS.jsonl OUT.json

OURS.jsonl: lines of `contrastive bench loss --json`. A size at which a peer runs out of memory has null.
"""

import json
import statistics
import sys

import torch
import torch.nn.functional as F

TAU = 0.07


def loss(u, v):
    """One product, cross entropy of it and of its transpose."""
    u, v = F.normalize(u, dim=-1), F.normalize(v, dim=-1)
    logits = u @ v.T / TAU
    labels = torch.arange(len(u), device=u.device)
    return (F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.T.float(), labels)) / 2


def milliseconds(f, n, d):
    """Median of repeated runs over inputs that take turns; None when memory does not suffice."""
    try:
        sets = [
            [torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
            for _ in range(3)
        ]

        def run(i):
            u, v = sets[i % len(sets)]
            u.grad = v.grad = None
            f(u, v).backward()

        for i in range(6):
            run(i)
        times = []
        while len(times) < 9 or (sum(times) < 1000 and len(times) < 200):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(len(times))
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()


def main():
    ours, out = sys.argv[1:]
    rows = []
    for line in open(ours):
        own = json.loads(line)
        n, d = own["n"], own["d"]
        row = {"n": n, "d": d, "ours": own["median_ms"]}
        row["eager"] = milliseconds(loss, n, d)
        # The compiler gives up less gracefully: where the plain program does not fit, neither is it asked.
        row["compiled"] = milliseconds(torch.compile(loss, dynamic=False), n, d) if row["eager"] else None
        peers = [row[p] for p in ("eager", "compiled") if row[p]]
        row["ratio"] = min(peers) / row["ours"] if peers else None
        print(row, flush=True)
        rows.append(row)
    card = torch.cuda.get_device_name()
    json.dump({"torch": torch.__version__, "card": card, "rows": rows}, open(out, "w"), indent=1)


if __name__ == "__main__":
    main()
