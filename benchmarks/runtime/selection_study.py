#!/usr/bin/env python3
"""What selection policies cost in bits per byte and save in crossings between nodes: the byte model on 2x2 ranks.

  benchmarks/runtime/selection_study.py PROGRAM OUT.json --text FILE [--seeds 1,2,3] [--steps N] [--arms NAME,...]
                                        [--commit ID] [--link BYTES_PER_S]

Every arm trains the same model (16 experts with weights, top-2 or 2 in the mean) on the same tokens in the same order, over
links between nodes that transport local slows down (emulated); seeds change weights and order. Each run appends one line to
OUT.jsonl, and a run that is there already is not repeated, so that an interrupted study goes on where it was. OUT.json
and the table are made from all lines there are. Step time is that of the whole training loop; 4 ranks share the cores of
the machine, so it tells of this machine and of emulated links. Nothing else should run on it.

Arms named "by kind" learn two kinds of text of this machine (C++ headers, manual pages), one after the other in the file, and deal
tokens by position: node 0 has the one kind, node 1 the other. There a locality loss can be of use; elsewhere every
node has the same kind of text. They have a baseline of their own.
"""
import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "scheduler"))
from placement_study import collect  # texts of this machine, by kind

MODEL = {
    "topology.nodes": "2x2", "comm.transport": "local", "schedule.policy": "pipelined", "schedule.num_chunks": 2,
    "model.num_layers": 2, "model.num_experts": 16, "model.hidden": 64, "model.ffn": 64, "model.context": 8,
    "model.embed": 32, "train.tokens_per_step": 2048, "train.learning_rate": 3e-3, "routing.top_k": 2,
    "topology.across_nodes_latency_us": 50,
}
SOFTMAX = {"routing.policy": "softmax_topk", "routing.aux_loss": 0.01}
REGRET = {"routing.policy": "bounded_regret", "routing.aux_loss": 0.01}
ETR = {"routing.policy": "etr", "routing.etr_tau": 0.5, "routing.etr_temperature": 0.25, "routing.renormalize": "false",
       "routing.route_scale": 4, "routing.capacity_factor": 1.25, "routing.aux_loss": 0.01}
ARMS = {
    "top-k": SOFTMAX,
    "relu": {"routing.policy": "relu"},
    "sigmoid top-k": {"routing.policy": "sigmoid_topk", "routing.bias_update": 0.01},
    "node-limited 1 of 2": {"routing.policy": "node_limited", "routing.bias_update": 0.01},
    **{f"bounded regret {e}": {**REGRET, "routing.regret_epsilon": e} for e in (0.02, 0.1, 0.2, 0.4)},
    "top-k, locality loss 1": {**SOFTMAX, "routing.locality_loss": 1},
    "etr": ETR,
    "etr, locality loss 1": {**ETR, "routing.locality_loss": 1},
    # The paper's balance loss has no factor of the number of experts: 0.2 is 0.01 with it.
    "moe++ 16+4": {"routing.policy": "moepp", "routing.aux_loss": 0.2, "model.num_experts": 20, "model.zero_experts": 1,
                   "model.copy_experts": 1, "model.constant_experts": 2, "model.gate_residual": "true"},
}
BY_KIND = "by kind: "
HOME = {"train.deal": "by_position"}
ARMS |= {BY_KIND + name: sets for name, sets in {
    "top-k": {**SOFTMAX, **HOME},
    "top-k, dealt at random": SOFTMAX,
    **{f"top-k, locality loss {mu}": {**SOFTMAX, **HOME, "routing.locality_loss": mu} for mu in (0.1, 1)},
    "bounded regret 0.1": {**REGRET, **HOME, "routing.regret_epsilon": 0.1},
    "bounded regret 0.1, locality loss 0.1": {**REGRET, **HOME, "routing.regret_epsilon": 0.1, "routing.locality_loss": 0.1},
}.items()}
# Of ReLU routing the L1 term has settled long before; of a run's beginning nothing is said by its last tenth.
AT_END = "the last tenth of the steps"


def baseline(arm):
    return BY_KIND + "top-k" if arm.startswith(BY_KIND) else "top-k"


def kinds_text(out):
    """Two kinds of text one after the other, as long as each other."""
    path = out[:-len(".json")] + ".kinds.txt"
    with open(path, "wb") as file:
        for kind in ("cpp", "man"):
            file.write(collect(kind, 400_000)[0])
    return path


def tail_mean(values):
    count = max(1, len(values) // 10)
    return statistics.fmean(values[-count:])


def run(program, arm, seed, text, args):
    sets = {**MODEL, "topology.across_nodes_bytes_per_s": args.link, **ARMS[arm], "train.seed": seed,
            "train.steps": args.steps}
    command = [program, "train", "--json", "--text", text]
    for key, value in sets.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    report = json.loads(done.stdout)
    return {
        "arm": arm, "seed": seed, "steps": args.steps, "link": args.link,
        "text": "C++ headers, then manual pages" if arm.startswith(BY_KIND) else os.path.basename(os.path.normpath(args.text)),
        "text_bytes": report["text"]["bytes"], "config_hash": report["config_hash"], "sets": sets,
        "heldout_bpb": report["heldout_bpb"], "order2_bpb": report["order2_bpb"],
        "node_crossings_per_token": report["crossings_per_token_at_end"]["across_nodes"],
        "node_crossings_per_token_of_run": report["crossings_per_token"]["across_nodes"],
        "rank_crossings_per_token": report["crossings_per_token_at_end"]["in_node"],
        "active_experts": report["active_experts"]["end"],
        "expert_balance": tail_mean(report["balance"]["experts"]), "rank_balance": tail_mean(report["balance"]["ranks"]),
        "across_nodes_bytes_per_step": report["across_nodes_bytes_per_step_at_end"],
        "step_us": report["seconds"] / args.steps * 1e6,
        "figures": {name: figure["end"] for name, figure in report["routing"]["figures"].items()},
        "emulated_links": report["world"]["emulated_links"],
    }


def spread(values):
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values), "each": values}


def summarize(runs):
    """One row an arm; differences to the baseline are taken seed by seed."""
    rows = []
    for arm in ARMS:
        base = {r["seed"]: r for r in runs if r["arm"] == baseline(arm)}
        own = sorted((r for r in runs if r["arm"] == arm), key=lambda r: r["seed"])
        if not own:
            continue
        steps = [r["step_us"] for r in own]
        pairs = [(r, base[r["seed"]]) for r in own if r["seed"] in base]
        row = {"case": arm, "shape": "2x2 ranks, 16 experts with weights", "text": own[0]["text"], "seeds": [r["seed"] for r in own],
               "median_us": statistics.median(steps),
               "mad_us": statistics.median(abs(v - statistics.median(steps)) for v in steps)}
        for key in ("heldout_bpb", "node_crossings_per_token", "node_crossings_per_token_of_run",
                    "rank_crossings_per_token", "active_experts", "expert_balance", "rank_balance",
                    "across_nodes_bytes_per_step"):
            row[key] = spread([r[key] for r in own])
        row["figures"] = {name: statistics.fmean(r["figures"][name] for r in own) for name in own[0]["figures"]}
        if pairs:
            row["baseline"] = baseline(arm)
            row["baseline_us"] = statistics.median(b["step_us"] for _, b in pairs)
            row["ratio"] = row["baseline_us"] / row["median_us"]
            row["bpb_over_baseline"] = spread([r["heldout_bpb"] - b["heldout_bpb"] for r, b in pairs])
            row["crossings_saved"] = spread(
                [1 - r["node_crossings_per_token"] / b["node_crossings_per_token"] for r, b in pairs])
        rows.append(row)
    return rows


def table(rows):
    head = ["policy", "bits/byte", "over top-k", "(least .. most)", "node crossings", "saved", "experts", "balance of ranks",
            "step ms", "faster"]
    lines = [head]
    for r in rows:
        over, saved = r.get("bpb_over_baseline"), r.get("crossings_saved")
        lines.append([
            r["case"], f"{r['heldout_bpb']['mean']:.4f}", f"{over['mean']:+.4f}" if over else "-",
            f"{over['min']:+.4f} .. {over['max']:+.4f}" if over else "-",
            f"{r['node_crossings_per_token']['mean']:.3f}", f"{100 * saved['mean']:.1f}%" if saved else "-",
            f"{r['active_experts']['mean']:.2f}", f"{r['rank_balance']['mean']:.3f}", f"{r['median_us'] / 1000:.1f}",
            f"x{r['ratio']:.2f}" if "ratio" in r else "-"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("out")
    parser.add_argument("--text", required=True, help="file or directory that stays as it is while the study runs")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--arms", default="", help="names, with semicolons; default: all")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--link", type=float, default=4e7, help="bytes/s between nodes, each way of each rank")
    args = parser.parse_args()
    arms = [a.strip() for a in args.arms.split(";") if a.strip()] or list(ARMS)
    for arm in arms:
        if arm not in ARMS:
            sys.exit(f"there is no arm {arm!r}; there are: {'; '.join(ARMS)}")
    seeds = [int(s) for s in args.seeds.split(",")]
    if not args.out.endswith(".json"):
        sys.exit(f"{args.out}: the name must end in .json")
    lines = args.out + "l"
    runs = []
    if os.path.exists(lines):
        with open(lines) as file:
            runs = [json.loads(line) for line in file]
    for r in runs:
        if (r["steps"], r["link"]) != (args.steps, args.link):
            sys.exit(f"{lines} has a run of {r['steps']} steps at {r['link']} bytes/s; remove it or ask for the same")
    done = {(r["arm"], r["seed"]) for r in runs}
    todo = [(arm, seed) for seed in seeds for arm in arms if (arm, seed) not in done]  # all arms of a seed, then the next
    kinds = kinds_text(args.out) if any(arm.startswith(BY_KIND) for arm, _ in todo) else None
    for i, (arm, seed) in enumerate(todo):
        print(f"run {i + 1} of {len(todo)}: {arm}, seed {seed}", file=sys.stderr, flush=True)
        runs.append(run(args.program, arm, seed, kinds if arm.startswith(BY_KIND) else args.text, args))
        first = next(r for r in runs if baseline(r["arm"]) == baseline(arm))
        if first["text_bytes"] != runs[-1]["text_bytes"]:
            sys.exit(f"the text has {runs[-1]['text_bytes']} bytes and had {first['text_bytes']} before: it must not change")
        with open(lines, "a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
    rows = summarize(runs)
    document = {
        "benchmark": "selection_study", "date": datetime.date.today().isoformat(), "commit": args.commit,
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 2x2 ranks as threads, emulated links",
        "driver": platform.platform(), "steps": args.steps,
        "across_nodes_bytes_per_s": args.link, "crossings_and_balance_of": AT_END, "model": MODEL, "rows": rows,
        "curve": [{"case": r["case"], "crossings_saved": r["crossings_saved"]["mean"],
                   "bpb_over_baseline": r["bpb_over_baseline"]["mean"]} for r in rows if "baseline" in r],
    }
    with open(args.out, "w") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
    table(rows)


if __name__ == "__main__":
    main()
