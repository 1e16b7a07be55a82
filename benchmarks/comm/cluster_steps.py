#!/usr/bin/env python3
"""Step time and bytes between nodes of one MoE layer on pretended hosts (scripts/cluster.sh): namespaces joined by links of
a real rate limit, real TCP between them.

    benchmarks/comm/cluster_steps.py [--transports tcp,shm+tcp,ucx,shm+ucx,mpi] [--nodes 2] [--rate 1gbit] [--iterations 20]
                                     [--json FILE [--commit ID]]

Exchanges: `flat` sends one row a route (run as K times the tokens with one expert each, so that nothing can be merged),
`de-duplicated` one row a destination rank (schedule.exchange = direct), `hierarchical` one row a destination node
(gateway). Each sequential and overlapped (pipelined, 4 chunks); forward and backward, the median of interleaved pairs, slowest
rank. The schedules are fixed, so a profile of this machine's threads is enough. All ranks share this machine's cores.
"""
import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
TOP_K = 4
TOKENS = 512  # a rank
MODEL = ["--set", "model.num_experts=16", "--set", "model.hidden=256", "--set", "model.ffn=256"]

EXCHANGES = {
    "flat": [f"bench.tokens_per_rank={TOKENS * TOP_K}", "bench.top_k=1", "schedule.exchange=direct"],
    "de-duplicated": [f"bench.tokens_per_rank={TOKENS}", f"bench.top_k={TOP_K}", "schedule.exchange=direct"],
    "hierarchical": [f"bench.tokens_per_rank={TOKENS}", f"bench.top_k={TOP_K}", "schedule.exchange=gateway"],
}


def bench(args, transport, sets):
    command = [os.path.join(ROOT, "scripts", "cluster.sh"), "--nodes", str(args.nodes), "--ranks-per-node", "2", "--rate",
               args.rate, "--launcher", "mpi" if transport == "mpi" else "sluice", "--sluice", args.sluice, "--"]
    if transport.endswith("ucx"):
        command += ["env", "UCX_TLS=tcp,self"]  # the pretended hosts share a memory
    command += [args.sluice, "bench", "--json"]
    command += MODEL
    for s in [f"topology.nodes={args.nodes}x2", "bench.skew=0",
              f"bench.iterations={args.iterations}", "bench.warmup=2", f"comm.transport={transport}",
              f"schedule.profile={args.profile}", "runtime.log_level=error", *sets]:
        command += ["--set", s]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 77:
        sys.exit(77)
    if done.returncode != 0:
        sys.exit(f"failed: {' '.join(command)}")
    return json.loads(done.stdout)


def rows_of(args, transport):
    rows = []
    for exchange, sets in EXCHANGES.items():
        report = bench(args, transport, [*sets, "schedule.policy=pipelined", "schedule.num_chunks=4"])
        across = report["bytes"]["across_nodes"]
        for name, prefix in (("sequential", "sequential_"), ("overlapped", "")):
            step = report[f"{prefix}forward_us"]["median"] + report[f"{prefix}backward_us"]["median"]
            rows.append({"transport": transport, "exchange": exchange, "schedule": name, "step_us": step,
                         "across_nodes_bytes": 2 * across, "nodes": args.nodes, "rate": args.rate,
                         "iterations": args.iterations})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transports", default="tcp")
    parser.add_argument("--nodes", type=int, default=2, help="of two ranks each")
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--sluice", default=os.path.join(ROOT, "build", "release", "sluice"))
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--commit", default="unknown", help="what was built, for the file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.profile = os.path.join(folder, "profile.json")
        subprocess.run([args.sluice, "info", "--probe", "-o", args.profile, "--set", "topology.nodes=2x2", *MODEL,
                        "--set", "runtime.log_level=error"], stdout=subprocess.DEVNULL, check=True)
        measure(args)


def measure(args):
    rows = []
    print(f"{'transport':<11}{'exchange':<15}{'schedule':<12}{'step ms':>9}{'to flat sequential':>20}"
          f"{'MB across nodes a step':>24}")
    for transport in args.transports.split(","):
        found = rows_of(args, transport)
        for r in found:
            print(f"{transport:<11}{r['exchange']:<15}{r['schedule']:<12}{r['step_us'] / 1e3:>9.2f}"
                  f"{found[0]['step_us'] / r['step_us']:>19.2f}x{r['across_nodes_bytes'] / 1e6:>24.2f}", flush=True)
        rows += found
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump({"benchmark": "cluster_steps", "date": datetime.date.today().isoformat(), "commit": args.commit,
                       "device": f"{os.cpu_count()} cores shared by all ranks; hosts are namespaces, links veth with tbf",
                       "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
