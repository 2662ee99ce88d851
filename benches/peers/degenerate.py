"""Searches where rounding tells little apart: copies, clusters, one long row. Seconds of `contrastive retrieve` beside random rows.

    python3 benches/peers/degenerate.py PROGRAM...      # needs numpy; several programs take turns, the least of three counts
"""

import json
import os
import subprocess
import sys
import tempfile

import numpy as np

ITEMS, QUERIES, DIM, K = 10_000, 1_000, 512, 10


def sets(random):
    rows = random.standard_normal((ITEMS, DIM), dtype=np.float32)
    yield "random rows", rows
    yield "one row", np.tile(rows[:1], (ITEMS, 1))
    yield "a hundred rows, each many times", rows[random.integers(0, 100, ITEMS)]
    long = rows.copy()
    long[7] *= 1e6
    yield "one row a million times as long", long
    yield "all within 1e-5 of one", rows[0] + np.float32(1e-5) * rows


def seconds(program, tilting):
    command = [program, "retrieve", "--items", "items.npy", "--queries", "queries.npy", "--k", str(K), "--output", "found.npy"]
    answer = subprocess.run(command + ["--tilting", tilting, "--json"], capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)["seconds"]


def main():
    programs = [os.path.abspath(program) for program in sys.argv[1:]]
    random = np.random.default_rng(0)
    os.chdir(tempfile.mkdtemp())
    np.save("queries.npy", random.standard_normal((QUERIES, DIM), dtype=np.float32))
    for name, items in sets(random):
        np.save("items.npy", items)
        for tilting in ("cosine", "dot", "l2"):
            taken = [[seconds(program, tilting) for program in programs] for _ in range(3)]
            print(f"{name}, {tilting}:", " ".join(f"{min(column):.2f}" for column in zip(*taken)), flush=True)


if __name__ == "__main__":
    main()
