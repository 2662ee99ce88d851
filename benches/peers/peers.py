"""Times `contrastive` beside what others use, in one run, each in turn; see README.md here.

Every measurement is taken in rounds: ours, then each peer, then again, so that a slow minute of the machine falls on
all. A round is warmed up and its time is the median of its runs; a cell's time is the least of its rounds.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
CELLS = "128x1024,128x4096,128x8192,128x16384,512x1024,512x4096,512x8192,512x16384,1024x4096,1024x16384"
SEARCHES = "32268x32268x98,1000x1000000x512"
SETS = 3  # input sets that take turns, as in `contrastive bench`
TAU = 0.07
# Ours: the precision, and the bytes a logit that are granted, if not the default.
OURS = {"ours": ("f32", 0), "ours bf16": ("bf16", 0), "ours, S kept": ("f32", 4), "ours bf16, S kept": ("bf16", 2)}
LOSSES = ["open_clip", "open_clip bf16", "one matmul", "one matmul bf16", "compile", "compile bf16", "jax", "jax bf16"]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # told apart by the colour-blind too


def ours(args, *words):
    """The JSON of a command of ours."""
    command = [args.contrastive, *map(str, words), "--device", "cpu", "--threads", str(args.threads), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def timed(run, seconds, least=3):
    """Median seconds of `run(turn)`, at least `least` of them, after a run that does not count; one if it is long."""
    begun = time.perf_counter()
    run(0)
    least = least if time.perf_counter() - begun < seconds else 1
    begun, times = time.perf_counter(), []
    while len(times) < least or (time.perf_counter() - begun < seconds and len(times) < 1000):
        one = time.perf_counter()
        run(len(times))
        times.append(time.perf_counter() - one)
    return statistics.median(times)


# The loss: unit rows u and v, logits u v' / tau, mean of both cross entropies, both gradients.


def unit_rows(n, d, seed):
    import numpy as np

    rng = np.random.default_rng(seed)
    pair = [rng.standard_normal((n, d), dtype=np.float32) for _ in range(2)]
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in pair]


def torch_loss(name, threads):
    """A function of torch tensors (u, v): the loss and both gradients."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    bf16 = name.endswith("bf16")
    scale = torch.tensor(1 / TAU)
    if name.startswith("open_clip"):
        from open_clip.loss import ClipLoss

        clip = ClipLoss(cache_labels=True)
        compute = lambda u, v: clip(u, v, scale)
    else:

        def compute(u, v):
            s = scale * (u @ v.T)
            labels = torch.arange(len(u))
            return (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2

        if name.startswith("compile"):
            torch._dynamo.reset()  # shapes seen before count against a limit, beyond which nothing is compiled
            compute = torch.compile(compute, dynamic=False)

    def run(u, v):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = compute(u, v)
        return (loss, *torch.autograd.grad(loss, (u, v)))

    return run


def jax_loss():
    import jax
    import jax.numpy as jnp

    def compute(pair):
        s = jnp.matmul(pair[0], pair[1].T, preferred_element_type=jnp.float32) / TAU
        own = jnp.diagonal(s)
        return jnp.mean(jax.nn.logsumexp(s, 1) - own) / 2 + jnp.mean(jax.nn.logsumexp(s, 0) - own) / 2

    return jax.jit(jax.value_and_grad(compute))


def loss_peer(name, threads, sets):
    """A function of a turn that evaluates the peer on its input set and waits for the result."""
    if name.startswith("jax"):
        import jax
        import jax.numpy as jnp

        step, dtype = jax_loss(), jnp.bfloat16 if name.endswith("bf16") else jnp.float32
        inputs = [tuple(jnp.asarray(x, dtype) for x in pair) for pair in sets]

        def run(turn):
            loss, grads = jax.block_until_ready(step(inputs[turn % len(inputs)]))
            return (loss, *grads)

    else:
        import torch

        step = torch_loss(name, threads)
        inputs = [[torch.from_numpy(x.copy()).requires_grad_() for x in pair] for pair in sets]

        def run(turn):
            return step(*inputs[turn % len(inputs)])

    return run


def arrays(result):
    import numpy as np

    return [np.asarray((x.detach().float().numpy() if hasattr(x, "detach") else x), dtype=np.float64) for x in result]


def check_losses(args, names):
    """Fails unless all agree with ours on inputs of one file: the value, and the gradients by norm."""
    import numpy as np

    u, v = unit_rows(257, 96, 7)
    with tempfile.TemporaryDirectory() as folder:
        path = {name: os.path.join(folder, name + ".npy") for name in ["u", "v", "du", "dv"]}
        np.save(path["u"], u), np.save(path["v"], v)
        files = [w for name in ["u", "v"] for w in (f"--{name}", path[name], f"--grad-{name}", path["d" + name])]
        found = ours(args, "loss", *files, "--tilting", "dot", "--tau", TAU)
        want = [found["loss"] + math.log(len(u)), np.load(path["du"]), np.load(path["dv"])]
    for name in names:
        got = arrays(loss_peer(name, args.threads, [(u, v)])(0))
        bound = 3e-2 if name.endswith("bf16") else 1e-4
        off = [np.linalg.norm(g - w) / np.linalg.norm(w) for g, w in zip(got, want)]
        if max(off) > bound:
            sys.exit(f"{name} and ours differ: {got[0]} and {want[0]}, relative differences {off}")


def peak_of(name, threads, n, d):
    """Bytes at the peak of one evaluation, beyond what was there before it: for a process of its own."""
    sets = [unit_rows(n, d, 0)]
    small = loss_peer(name, threads, [unit_rows(64, d, 1)])
    small(0), small(0)
    run = loss_peer(name, threads, sets)
    before = reset_peak()
    run(0)
    return peak() - before


def status(key):
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(key + ":"))


def reset_peak():
    """Makes the peak what is resident now, and returns that."""
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return status("VmRSS")


def peak():
    return status("VmHWM")


def bench_losses(args, keep):
    check_losses(args, args.peers)
    cells = []
    for cell in args.cells.split(","):
        d, n = map(int, cell.split("x"))
        sets = [unit_rows(n, d, seed) for seed in range(SETS)]
        peers = {name: loss_peer(name, args.threads, sets) for name in args.peers}
        times, memory = {}, {}
        for _ in range(args.rounds):
            for name, (precision, more) in OURS.items():
                workspace = ["--workspace", more * n * n] if more else []
                shape = ["--n", n, "--d", d, "--tilting", "dot", "--precision", precision]
                found = ours(args, "bench", "loss", *shape, *workspace)
                times.setdefault(name, []).append(found["median_ms"] / 1e3)
                # Our scratch, and the two gradients, which the peers' peaks hold too.
                memory[name] = found["scratch_bytes"] + 2 * 4 * n * d
            for name, run in peers.items():
                try:
                    times.setdefault(name, []).append(timed(run, args.seconds))
                except (RuntimeError, MemoryError) as e:  # out of memory: the peer has no time here
                    print(f"{name} fails at {cell}: {e}", file=sys.stderr)
        del peers, sets
        if not args.no_memory:
            for name in args.peers:
                words = [sys.executable, __file__, "--peak", name, "--cells", cell, "--threads", str(args.threads)]
                done = subprocess.run(words, capture_output=True, text=True)
                memory[name] = int(done.stdout) if done.returncode == 0 else None
        cells.append(summary({"d": d, "n": n, "rounds_s": times, "peak_bytes": memory}, cell))
        keep({"cells": cells})
    f32 = lambda peer: not peer.endswith("bf16")
    ratios = {
        "f32: fastest f32 peer / ours": [fastest(c, f32) / c["s"]["ours"] for c in cells],
        "bf16: fastest peer / ours": [fastest(c, lambda p: True) / c["s"]["ours bf16"] for c in cells],
        "S kept: fastest f32 peer / ours": [fastest(c, f32) / c["s"]["ours, S kept"] for c in cells],
        "bf16, S kept: fastest peer / ours": [fastest(c, lambda p: True) / c["s"]["ours bf16, S kept"] for c in cells],
        "open_clip / ours": [fastest(c, lambda p: p.startswith("open_clip")) / best_of_ours(c) for c in cells],
    }
    for what, each in ratios.items():
        each = [r for r in each if math.isfinite(r)]
        if each:
            print(f"{what}: geometric mean {statistics.geometric_mean(each):.2f}, least {min(each):.2f}")
    keep({"cells": cells, "ratios": ratios})


def summary(cell, title):
    """Adds the least of the rounds, and prints it."""
    cell["s"] = {name: min(times) for name, times in cell["rounds_s"].items() if times}
    print(title, *(f"| {name} {1e3 * s:.2f} ms" for name, s in cell["s"].items()), flush=True)
    for name, size in cell.get("peak_bytes", {}).items():
        if size is not None:
            print(f"    {name}: {size / 2**20:.1f} MiB beyond inputs", flush=True)
    return cell


def fastest(cell, keep):
    return min((s for name, s in cell["s"].items() if not name.startswith("ours") and keep(name)), default=math.inf)


def best_of_ours(cell):
    return min(cell["s"][name] for name in OURS)


# The ceiling: square matrix products of the libraries that the peers stand on.


def bench_products(args, keep):
    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    n = 512 if args.quick else 4096
    a = np.random.default_rng(9).standard_normal((n, n), dtype=np.float32)
    products = {"numpy": lambda _: a @ a}
    for name, dtype in [("torch", torch.float32), ("torch bf16", torch.bfloat16)]:
        own = torch.from_numpy(a).to(dtype)
        products[name] = lambda _, own=own: own @ own
    times = {name: [timed(run, args.seconds) for _ in range(args.rounds)] for name, run in products.items()}
    rates = {name: 2 * n**3 / min(t) / 1e9 for name, t in times.items()}
    print("matrix product:", *(f"| {name} {rate:.0f} GFLOP/s" for name, rate in rates.items()), flush=True)
    keep({"n": n, "gflops": rates, "rounds_s": times})


# Search: the five items of largest inner product.


def bench_searches(args, keep):
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(args.threads)
    k, cells = 5, []

    def index_of(items):
        index = faiss.IndexFlatIP(items.shape[1])
        index.add(items)
        return index

    rng = np.random.default_rng(5)
    queries, items = (rng.standard_normal((n, 98), dtype=np.float32) for n in (300, 4000))
    with tempfile.TemporaryDirectory() as folder:
        path = {name: os.path.join(folder, name + ".npy") for name in ["q", "i", "out"]}
        np.save(path["q"], queries), np.save(path["i"], items)
        files = ["--queries", path["q"], "--items", path["i"], "--output", path["out"]]
        ours(args, "retrieve", *files, "--tilting", "dot", "--k", k)
        same = np.mean(np.load(path["out"]) == index_of(items).search(queries, k)[1])
        if same < 0.999:
            sys.exit(f"faiss and ours agree on {same:.4f} of the indices")
    for search in args.searches.split(","):
        n, m, d = map(int, search.split("x"))
        index = index_of(rng.standard_normal((m, d), dtype=np.float32))
        sets = [rng.standard_normal((n, d), dtype=np.float32) for _ in range(SETS)]
        times = {"ours": [], "faiss": []}
        for _ in range(args.rounds):
            found = ours(args, "bench", "retrieve", "--n", n, "--m", m, "--d", d, "--k", k, "--tilting", "dot")
            times["ours"].append(found["median_ms"] / 1e3)
            times["faiss"].append(timed(lambda turn: index.search(sets[turn % SETS], k), args.seconds))
        cells.append(summary({"queries": n, "items": m, "d": d, "rounds_s": times}, search))
        print(f"faiss / ours: {cells[-1]['s']['faiss'] / cells[-1]['s']['ours']:.2f}")
        keep({"k": k, "cells": cells})


# Training, batches of 512 drawn anew each step, Adam.


def torch_lenet(threads, compiled):
    """A training step of LeNet in torch: one-hot labels, so its loss is a cross entropy over ten classes."""
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    conv = lambda i, o, padding: [nn.Conv2d(i, o, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
    dense = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    net = nn.Sequential(*conv(1, 6, 2), *conv(6, 16, 0), nn.Flatten(), *dense)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    x, y = torch.randn(20_000, 1, 28, 28), torch.randint(0, 10, (20_000,))
    compute = lambda x, y: nn.functional.cross_entropy(net(x), y)
    compute = torch.compile(compute) if compiled else compute

    def run(_):
        index = torch.randint(0, len(x), (512,))
        optimiser.zero_grad()
        compute(x[index], y[index]).backward()
        optimiser.step()

    return run


def linear_data():
    import numpy as np

    rng = np.random.default_rng(3)
    return [rng.standard_normal((10_000, width), dtype=np.float32) for width in (12, 5)]


def torch_linear(threads):
    """A training step of two linear encoders of 12 and 5 numbers to 5."""
    import torch

    u, v = map(torch.from_numpy, linear_data())
    weights = [torch.randn(5, x.shape[1]).mul_(0.1).requires_grad_() for x in (u, v)]
    optimiser = torch.optim.Adam(weights, lr=1e-3, fused=True)
    torch.set_num_threads(threads)
    labels = torch.arange(512)

    def run(_):
        index = torch.randint(0, len(u), (512,))
        s = (u[index] @ weights[0].T) @ (v[index] @ weights[1].T).T
        loss = (torch.nn.functional.cross_entropy(s, labels) + torch.nn.functional.cross_entropy(s.T, labels)) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return run


def jax_linear():
    """The same in JAX: data on the device, everything from drawing the batch to Adam in one jitted step."""
    import jax
    import jax.numpy as jnp

    data = [jnp.asarray(x) for x in linear_data()]
    zeros = lambda: [jnp.zeros((5, x.shape[1])) for x in data]
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    weights = [0.1 * jax.random.normal(key, w.shape) for key, w in zip(keys, zeros())]

    def compute(weights, u, v):
        s = (u @ weights[0].T) @ (v @ weights[1].T).T
        own = jnp.diagonal(s)
        return (jnp.mean(jax.nn.logsumexp(s, 1) - own) + jnp.mean(jax.nn.logsumexp(s, 0) - own)) / 2

    def step(state, u, v, index):
        weights, m, v2, t = state
        grads = jax.grad(compute)(weights, u[index], v[index])
        m = [0.9 * a + 0.1 * g for a, g in zip(m, grads)]
        v2 = [0.999 * a + 0.001 * g * g for a, g in zip(v2, grads)]
        scaled = [(a / (1 - 0.9**t)) / (jnp.sqrt(b / (1 - 0.999**t)) + 1e-8) for a, b in zip(m, v2)]
        return [w - 1e-3 * s for w, s in zip(weights, scaled)], m, v2, t + 1

    step = jax.jit(step, donate_argnums=0)
    state, seed = [(weights, zeros(), zeros(), jnp.float32(1))], linear_batches()

    def run(_):
        state[0] = jax.block_until_ready(step(state[0], *data, next(seed)))

    return run


def linear_batches():
    import numpy as np

    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, 10_000, 512).astype(np.int32)


def bench_training(args, keep):
    result = {}
    for what, unit, samples, peers in [
        ("digits", "images/s", 512, {"torch": torch_lenet(args.threads, False), "torch.compile": torch_lenet(args.threads, True)}),
        ("gp", "steps/s", 1, {"torch": torch_linear(args.threads), "jax": jax_linear()}),
    ]:
        times = {"ours": [], **{name: [] for name in peers}}
        for _ in range(args.rounds):
            times["ours"].append(ours(args, "bench", "train", "--experiment", what)["median_ms"] / 1e3)
            for name, run in peers.items():
                times[name].append(timed(run, args.seconds, 20))
        rates = {name: samples / min(t) for name, t in times.items()}
        best = max(rate for name, rate in rates.items() if name != "ours")
        print(f"{what}:", *(f"| {name} {rate:.0f} {unit}" for name, rate in rates.items()), f"| ours / best {rates['ours'] / best:.2f}")
        result[what] = {"unit": unit, "rates": rates, "rounds_s": times, "batch": 512}
        keep(result)


def machine(args):
    def command(*words):
        done = subprocess.run(words, capture_output=True, text=True, cwd=HERE)
        return done.stdout.strip() if done.returncode == 0 else ""

    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ["torch", "open_clip_torch", "jax", "jaxlib", "faiss-cpu", "numpy"]:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    with open("/proc/cpuinfo") as f:
        cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.machine())
    with open("/proc/cpuinfo") as f:
        flags = next((line.split() for line in f if line.startswith("flags")), [])
    isa = [flag for flag in flags if flag in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": command("git", "rev-parse", "HEAD") + ("+" if command("git", "status", "--porcelain") else ""),
        "contrastive": command(args.contrastive, "--version"),
        "cpu": cpu,
        "isa": isa,
        "threads": args.threads,
        "python": platform.python_version(),
        "versions": versions,
        "quick": args.quick,
    }


def plot(result, path):
    """Time and memory against N, a column for each d of several N."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "peers", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    cells = result["loss"]["cells"]
    dims = sorted({c["d"] for c in cells if sum(other["d"] == c["d"] for other in cells) > 1})
    figure, axes = plt.subplots(2, len(dims), figsize=(3.2 * len(dims), 5.6), squeeze=False, sharex=True, sharey="row")
    for column, d in enumerate(dims):
        own = sorted((c for c in cells if c["d"] == d), key=lambda c: c["n"])
        for row, (key, factor) in enumerate([("s", 1e3), ("peak_bytes", 2**-20)]):
            ax = axes[row][column]
            names = dict.fromkeys(name for c in own for name in c[key])
            for at, name in enumerate(names):
                points = [(c["n"], factor * c[key][name]) for c in own if c[key].get(name)]
                width = 2.2 if name.startswith("ours") else 1.0
                style = {(False, False): "-", (True, False): "--", (False, True): ":", (True, True): "-."}["bf16" in name, "kept" in name]
                color = "k" if name.startswith("ours") else COLOURS[LOSSES.index(name) // 2]
                label = name.replace("compile", "torch.compile").replace("jax", "JAX jit")
                ax.plot(*zip(*points), style, marker=".", label=label, linewidth=width, color=color)
            ax.set_xscale("log", base=2), ax.set_yscale("log"), ax.grid(alpha=0.3)
            if row == 0:
                ax.set_title(f"d = {d}")
            else:
                ax.set_xlabel("N")
    axes[0][0].set_ylabel("loss and gradients, ms"), axes[1][0].set_ylabel("peak beyond inputs, MiB")
    axes[0][-1].legend(fontsize=6, loc="upper left", handlelength=4)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


BENCHES = {"product": bench_products, "loss": bench_losses, "retrieve": bench_searches, "train": bench_training}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contrastive", default=os.path.join(HERE, "../../target/release/contrastive"))
    parser.add_argument("--what", default=",".join(BENCHES), help="of product, loss, retrieve, train")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cells", default=CELLS, help="d x N, ...")
    parser.add_argument("--searches", default=SEARCHES, help="queries x items x d, ...")
    parser.add_argument("--peers", default=",".join(LOSSES), help="of the loss")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a peer's round, at least three runs")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small cells once: does it work?")
    parser.add_argument("--out", help="JSON [default: benches/results/cpu-DATE.json; quick: none]")
    parser.add_argument("--plot", help="SVG of time and memory against N")
    parser.add_argument("--replot", help="no measurement: the plot of this JSON")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.contrastive = os.path.abspath(args.contrastive)
    # Whatever a library takes for the number of cores, it is this.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ.update({"OMP_NUM_THREADS": str(args.threads), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""})
    if args.replot:
        with open(args.replot) as f:
            return plot(json.load(f), args.plot)
    if args.peak:
        d, n = map(int, args.cells.split("x"))
        return print(peak_of(args.peak, args.threads, n, d))
    if args.quick:
        args.cells, args.searches, args.rounds, args.seconds = "64x512,128x1024", "500x4000x98", 1, 0.2
    args.peers = [name for name in args.peers.split(",") if name]
    result = machine(args)
    print(json.dumps(result), flush=True)
    out = args.out or (not args.quick and os.path.join(HERE, f"../results/cpu-{result['date'][:10]}.json"))
    if out:
        os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    for what in args.what.split(","):

        def keep(found):
            """What is measured so far is in the file, whatever happens to the rest."""
            result[what] = found
            if out:
                with open(out + ".part", "w") as f:
                    json.dump(result, f, indent=1)
                os.replace(out + ".part", out)

        BENCHES[what](args, keep)
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
