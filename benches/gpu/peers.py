"""PyTorch at what we time ourselves, and the ratios: the symmetric loss, forward and backward in bf16, at the sizes of
our own times; and LeNet's training at batch 512, eager and as a CUDA graph.

    peers.py LOSS.jsonl LENET.jsonl OUT.json

LOSS.jsonl: lines of `contrastive bench loss --json`; LENET.jsonl: the metrics.jsonl of `contrastive train digits`. Where a peer
fails, of memory say, it has null, and its words are under `failed`. `part_of_ceiling`: our 8 N M D operations a second over the
library's product's. OUT.json is written anew after each row, so that what ends this early costs no more than a row.
"""

import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F

TAU = 0.07


def loss(u, v):
    """One product, cross entropy of it and of its transpose."""
    u, v = F.normalize(u, dim=-1), F.normalize(v, dim=-1)
    logits = u @ v.T / TAU
    labels = torch.arange(len(u), device=u.device)
    return (F.cross_entropy(logits.float(), labels) + F.cross_entropy(logits.T.float(), labels)) / 2


def matrix_product():
    """The ceiling: TFLOP/s of the library's product of 8192 x 8192 bf16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 8192**3 / statistics.median(times[5:]) / 1e9


def milliseconds(f, n, d):
    """Median of repeated runs over inputs that take turns."""
    sets = [
        [torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)] for _ in range(3)
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


def compiled(n, d):
    """The same of the compiled loss. Each size is compiled for itself, and from the ninth on the compiler would leave it eager."""
    torch._dynamo.reset()
    return milliseconds(torch.compile(loss, dynamic=False), n, d)


def attempt(row, name, f, *args):
    """What `f` finds goes to the row; of a failure, its words."""
    row[name] = None
    try:
        row[name] = f(*args)
    except Exception as e:
        row.setdefault("failed", {})[name] = f"{type(e).__name__}: {e}"
    # Not before the exception is gone, which holds the tensors of what failed.
    torch.cuda.empty_cache()


BATCH = 512
SAMPLES = 30720


class Lenet(torch.nn.Module):
    """What `encoder_u = { kind = "lenet" }` is."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.ModuleList([torch.nn.Conv2d(1, 6, 5, padding=2), torch.nn.Conv2d(6, 16, 5)])
        self.linear = torch.nn.ModuleList([torch.nn.Linear(400, 120), torch.nn.Linear(120, 84), torch.nn.Linear(84, 10)])

    def forward(self, x):
        for conv in self.conv:
            x = F.max_pool2d(F.relu(conv(x)), 2)
        x = x.flatten(1)
        for linear in self.linear[:2]:
            x = F.relu(linear(x))
        return self.linear[2](x)


def lenet_step():
    """A step on data that is on the card: gather, forward, loss, backward, Adam; and where its samples' numbers go."""
    images = torch.randn(SAMPLES, 1, 28, 28, device="cuda")
    labels = F.one_hot(torch.randint(10, (SAMPLES,), device="cuda"), 10).float()
    index = torch.randint(SAMPLES, (BATCH,), device="cuda")
    targets = torch.arange(BATCH, device="cuda")
    model = Lenet().cuda()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True, capturable=True)

    def step():
        adam.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(images[index]) @ labels[index].T
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        adam.step()
        return loss

    return step, index


def samples_per_s(step, index):
    """The rate of steps whose samples are new each time, and whose loss is read once in 60."""
    permutation = torch.randperm(SAMPLES, device="cuda")
    rates = []
    for _ in range(12):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for k in range(SAMPLES // BATCH):
            index.copy_(permutation[k * BATCH : (k + 1) * BATCH])
            loss = step()
        loss.item()
        rates.append(SAMPLES / (time.perf_counter() - begun))
    return statistics.median(rates[2:])


def eager_rate():
    """Of LeNet's steps one by one."""
    return samples_per_s(*lenet_step())


def graph_rate():
    """Of a graph of such a step."""
    step, index = lenet_step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay():
        graph.replay()
        return loss

    return samples_per_s(replay, index)


def lines(path):
    """What is JSON of a file's lines: a program that was ended may have written half of the last."""
    found = []
    with open(path) as file:
        for line in file:
            try:
                found.append(json.loads(line))
            except ValueError:
                print(f"{path}: not JSON: {line!r}", flush=True)
    return found


def our_rate(trained):
    """The first epochs load kernels and record the step."""
    return statistics.median([line["samples_per_s"] for line in lines(trained)][2:])


def main():
    ours, trained, out = sys.argv[1:]
    found = {"torch": torch.__version__, "card": torch.cuda.get_device_name()}
    found.update(tflops=matrix_product(), rows=[], lenet_samples_per_s={})
    rates = found["lenet_samples_per_s"]
    # First of all: without it there is no ratio, which is said before anything is timed.
    attempt(rates, "ours", our_rate, trained)
    print(rates, flush=True)

    def save(said):
        print(said, flush=True)
        with open(out, "w") as file:
            json.dump(found, file, indent=1)

    for line in lines(ours):
        n, d, ms = line["n"], line["d"], line["median_ms"]
        row = {"n": n, "d": d, "ours": ms, "part_of_ceiling": 8 * n * n * d / ms / 1e9 / found["tflops"]}
        # Logits that no card holds.
        if n <= 65536:
            attempt(row, "eager", milliseconds, loss, n, d)
        # The compiler gives up less gracefully: where the plain program does not fit, neither is it asked.
        if row.get("eager"):
            attempt(row, "compiled", compiled, n, d)
        peers = [row[p] for p in ("eager", "compiled") if row.get(p)]
        row["ratio"] = min(peers) / ms if peers else None
        found["rows"].append(row)
        save(row)
    for name, f in (("eager", eager_rate), ("graph", graph_rate)):
        attempt(rates, name, f)
        rates[f"ratio_{name}"] = rates["ours"] / rates[name] if rates["ours"] and rates[name] else None
        save(rates)


if __name__ == "__main__":
    main()
