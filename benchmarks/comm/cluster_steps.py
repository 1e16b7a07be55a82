#!/usr/bin/env python3
"""Step time and bytes between nodes of one MoE layer on pretended hosts (scripts/cluster.sh): namespaces joined by links of
a real rate limit, real TCP between them.

    benchmarks/comm/cluster_steps.py [--transport tcp] [--rate 1gbit] [--iterations 20] [--json FILE]

Exchanges: `flat` sends one row a route (run as K times the tokens with one expert each, so that nothing can be merged),
`de-duplicated` one row a destination rank (schedule.exchange = direct), `hierarchical` one row a destination node
(gateway). Each sequential and overlapped; forward and backward, the median of interleaved pairs, slowest rank.
"""
import argparse
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
TOP_K = 4
TOKENS = 512  # a rank

EXCHANGES = {
    "flat": [f"bench.tokens_per_rank={TOKENS * TOP_K}", "bench.top_k=1", "schedule.exchange=direct"],
    "de-duplicated": [f"bench.tokens_per_rank={TOKENS}", f"bench.top_k={TOP_K}", "schedule.exchange=direct"],
    "hierarchical": [f"bench.tokens_per_rank={TOKENS}", f"bench.top_k={TOP_K}", "schedule.exchange=gateway"],
}


def bench(args, sets):
    command = [os.path.join(ROOT, "scripts", "cluster.sh"), "--nodes", "2", "--ranks-per-node", "2", "--rate", args.rate,
               "--launcher", "mpi" if args.transport == "mpi" else "sluice", "--sluice", args.sluice, "--",
               args.sluice, "bench", "--json"]
    sets = ["model.num_experts=16", "model.hidden=256", "model.ffn=256", "topology.nodes=2x2", "bench.skew=0",
            f"bench.iterations={args.iterations}", "bench.warmup=2", f"comm.transport={args.transport}",
            f"schedule.profile={args.profile}", *sets]
    for s in sets:
        if not s.endswith("="):
            command += ["--set", s]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 77:
        sys.exit(77)
    if done.returncode != 0:
        sys.exit(f"failed: {' '.join(command)}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transport", default="tcp")
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--profile", default="", help="machine profile; empty: measured at every start")
    parser.add_argument("--sluice", default=os.path.join(ROOT, "build", "release", "sluice"))
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    rows = []
    for exchange, sets in EXCHANGES.items():
        report = bench(args, [*sets, "schedule.policy=pipelined", "schedule.num_chunks=4"])
        across = report["bytes"]["across_nodes"]
        for name, prefix in (("sequential", "sequential_"), ("overlapped", "")):
            step = report[f"{prefix}forward_us"]["median"] + report[f"{prefix}backward_us"]["median"]
            rows.append({"exchange": exchange, "schedule": name, "step_us": step, "across_nodes_bytes": 2 * across,
                         "transport": args.transport, "rate": args.rate, "iterations": args.iterations})
    base = rows[0]["step_us"]
    print(f"{'exchange':<15}{'schedule':<12}{'step ms':>9}{'to flat sequential':>20}{'MB across nodes a step':>24}")
    for r in rows:
        print(f"{r['exchange']:<15}{r['schedule']:<12}{r['step_us'] / 1e3:>9.2f}{base / r['step_us']:>19.2f}x"
              f"{r['across_nodes_bytes'] / 1e6:>24.2f}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump({"rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
