"""Errors beside PyTorch's at the same precision: both against f64, on the same rounded embeddings.

    errors.py CONTRASTIVE [--device cpu|cuda] [--precision bf16|f16] [--seeds 10] [--out OUT.json]

CONTRASTIVE is the built command. PyTorch's program is the ordinary one: embeddings, logits and products of 16 bits, softmaxes of
f32, gradients by autograd. The reference is the same program in f64. Errors are root mean squares over seeds of
`|x - reference| / |reference|`, where a gradient counts as no smaller than a thousandth of what a single pair's dL/dS of 1
makes, and d tau than a tenth of the largest |S| over tau. Needs numpy and torch. Ends with status 1 where ours is the larger one and beyond 1e-2.
OUT.json is written anew after each case.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy
import torch
import torch.nn.functional as F

N, D = 291, 48
# The largest logits are about 10, and about 1e4.
SCALES = {"plain": 10.0, "extreme": 1e4}
OBJECTIVES = ["conditional", "joint", "sigmoid", "mmd", "joint-mmd"]
TILTINGS = ["cosine", "dot", "l2"]


def logits(tilting, u, v, tau):
    if tilting == "cosine":
        u, v = F.normalize(u, dim=-1), F.normalize(v, dim=-1)
    s = u @ v.T
    if tilting == "l2":
        s = s - (u.square().sum(-1)[:, None] + v.square().sum(-1)[None]) / 2
    return (s / tau.to(s.dtype)).to(torch.promote_types(s.dtype, torch.float32))


def loss(objective, s, x, y):
    """Of logits in f32 or f64; `x` and `y`, the data, are of the embeddings' precision."""
    if objective == "conditional":
        return -(torch.log_softmax(s, 1).diag().mean() + torch.log_softmax(s, 0).diag().mean()) / 2
    if objective == "joint":
        return s.flatten().logsumexp(0) - s.diag().mean()
    target = torch.eye(N, dtype=s.dtype, device=s.device)
    if objective == "sigmoid":
        return -F.logsigmoid((2 * target - 1) * s).sum() / N
    if objective == "mmd":
        by_row = ((torch.softmax(s, 1) - target).to(y.dtype) @ y).to(s.dtype)
        by_col = ((torch.softmax(s, 0) - target).T.to(x.dtype) @ x).to(s.dtype)
        return (by_row.square().sum() + by_col.square().sum()) / (2 * N)
    gap = torch.softmax(s.flatten(), 0).view_as(s) - target / N
    return (x.T @ (gap.to(y.dtype) @ y)).to(s.dtype).square().sum()


def torch_gradients(objective, tilting, u, v, x, y, tau, dtype, device):
    u, v, x, y = (torch.tensor(a, dtype=dtype, device=device) for a in (u, v, x, y))
    wide = torch.promote_types(dtype, torch.float32)
    tau = torch.tensor(tau, dtype=wide, device=device, requires_grad=True)
    u.requires_grad_()
    v.requires_grad_()
    s = logits(tilting, u, v, tau)
    loss(objective, s, x, y).backward()
    found = [t.grad.double().cpu().numpy() for t in (u, v, tau)]
    return found, s.abs().max().item()


def our_gradients(command, objective, tilting, u, v, x, y, tau, args):
    with tempfile.TemporaryDirectory() as folder:
        at = {name: str(pathlib.Path(folder, name + ".npy")) for name in ("u", "v", "x", "y", "du", "dv")}
        for name, values in (("u", u), ("v", v), ("x", x), ("y", y)):
            numpy.save(at[name], values.astype(numpy.float32))
        words = [command, "loss", "--u", at["u"], "--v", at["v"], "--grad-u", at["du"], "--grad-v", at["dv"], "--json"]
        words += ["--objective", objective, "--tilting", tilting, "--tau", repr(tau)]
        words += ["--device", args.device, "--precision", args.precision]
        if "mmd" in objective:
            words += ["--data-u", at["x"], "--data-v", at["y"], "--kernel", "linear"]
        found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        return [numpy.load(at["du"]), numpy.load(at["dv"]), numpy.array(found["grad_tau"])]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "f16"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out")
    args = parser.parse_args()
    half = {"bf16": torch.bfloat16, "f16": torch.float16}[args.precision]
    about = {"device": args.device, "precision": args.precision, "seeds": args.seeds, "torch": torch.__version__}
    about["shape"] = [N, N, D]
    table, worse = [], 0
    print(f"{'':34} {'dU, dV':^23} {'d tau':^23}")
    print(f"{'objective':12} {'tilting':8} {'logits':12} {'ours':>11} {'torch':>11} {'ours':>11} {'torch':>11}")
    for objective, tilting, (name, size) in itertools.product(OBJECTIVES, TILTINGS, SCALES.items()):
        errors = {"ours": [], "torch": []}
        for seed in range(args.seeds):
            rng = numpy.random.default_rng(seed)
            shared = rng.standard_normal((N, D))
            u, v = (shared + 0.7 * rng.standard_normal((N, D)) for _ in range(2))
            x, y = rng.standard_normal((N, 3)), rng.standard_normal((N, 2))
            u, v, x, y = (torch.tensor(a).to(half).double().numpy() for a in (u, v, x, y))
            tau = 1.0 / size if tilting == "cosine" else float((u * v).sum(-1).max()) / size
            case = (objective, tilting, u, v, x, y, tau)
            want, largest = torch_gradients(*case, torch.float64, "cpu")
            found = {
                "ours": our_gradients(args.command, *case, args),
                "torch": torch_gradients(*case, half, args.device)[0],
            }
            for who, got in found.items():
                norm = numpy.linalg.norm
                row = norm(u) / N**0.5
                least = 1e-3 / tau * (1 / row if tilting == "cosine" else row)
                off = [norm(g - w) / max(norm(w), least) for g, w in zip(got[:2], want)]
                off = [max(off), abs(got[2] - want[2]) / max(abs(want[2]), 0.1 * largest / tau)]
                errors[who].append([e if numpy.isfinite(e) else numpy.inf for e in off])
        rms = {who: numpy.sqrt(numpy.mean(numpy.square(of), 0)) for who, of in errors.items()}
        ours, others = rms["ours"], rms["torch"]
        bad = any(o > t and o > 1e-2 for o, t in zip(ours, others))
        worse += bad
        numbers = " ".join(f"{e:11.1e}" for e in (ours[0], others[0], ours[1], others[1]))
        print(f"{objective:12} {tilting:8} {name:12} {numbers}{'   worse' if bad else ''}", flush=True)
        table.append({
            "objective": objective, "tilting": tilting, "logits": size,
            "gradients": [ours[0], others[0]], "grad_tau": [ours[1], others[1]],
        })
        if args.out:
            pathlib.Path(args.out).write_text(json.dumps({**about, "ours_and_torch": table}, indent=1))
    sys.exit(worse > 0)


if __name__ == "__main__":
    main()
