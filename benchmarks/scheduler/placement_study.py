#!/usr/bin/env python3
"""Placements on held-out routing: every planner, planned on some domains and judged on one left out.

    placement_study.py SLUICE OUT.json [--olmoe DIR] [--work DIR] [--moves N] [--steps N] [--held-out N] [--jobs N]

Routing comes from (a) the byte model of `sluice train` (64 experts, 3 layers; softmax top-8 and ReLU), trained on a mixture
of five kinds of text found on a Debian machine and recorded for each kind apart; (b) routes of OLMoE in DIR, resampled, not
recorded; (c) counts of OLMoE in DIR, which tell balance and nothing of crossings. Sources of what is planned on are mixed,
and, for (a), skewed: kind d lives on node d. What is judged comes from everywhere.

A cell is judged at 4 or more nodes, against the better of EPLB's two policies for each figure by itself: node crossings
15% fewer, busiest node no worse (10% better with half as many spare slots as experts or more), balance 0.95 of it,
predicted step time within 1% of the best planner.

An interrupted study goes on where it was: traces stay in the work folder, finished cells in OUT.jsonl. Remove both to begin
anew, as after a change of the planner or the model. Only planning times need a quiet machine; --jobs N plans N cells at a time.
"""
import argparse
import glob
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

CELLS = [(2, 4, 8), (2, 4, 9), (2, 4, 12), (4, 8, 2), (4, 8, 3), (4, 8, 4), (8, 8, 1), (8, 8, 2), (8, 8, 3)]
EXPERTS = 64
KEYS = ["node_crossings_per_token", "rank_crossings_per_token", "hops_per_token", "balance", "busiest_node_crossings",
        "predicted_step_us", "planning_ms"]
TEXTS = {  # patterns of files
    "cpp": ["/usr/include/c++/*/*", "/usr/include/c++/*/bits/*.h"],
    "python": ["/usr/lib/python3*/*.py", "/usr/lib/python3*/*/*.py"],
    "english": ["/usr/share/common-licenses/*", "/usr/share/perl/*/pod/*.pod", "/usr/share/doc/*/README*",
                "/usr/share/doc/*/copyright"],
    "man": ["/usr/share/man/man[1578]/*.gz"],
    "perl": ["/usr/share/perl/*/*.pm", "/usr/share/perl/*/*/*.pm"],
}


def collect(kind, limit):
    """Text of one kind, at most `limit` bytes, and how many files it is from."""
    parts, size, count = [], 0, 0
    for pattern in TEXTS[kind]:
        for path in sorted(glob.glob(pattern)):
            if not os.path.isfile(path) or size >= limit:
                continue
            try:
                opener = gzip.open if path.endswith(".gz") else open
                with opener(path, "rb") as file:
                    data = file.read(min(limit // 8, limit - size))
            except OSError:
                continue
            if data and b"\0" not in data:
                parts.append(data)
                size += len(data)
                count += 1
    if size < limit // 4:
        sys.exit(f"placement_study: only {size} bytes of {kind} text on this machine")
    return b"\n".join(parts)[:limit], count


def record(args, router, work):
    """Traces by kind of a model that was trained on all kinds, and what training said. Recorded once a work folder."""
    traces = {kind: f"{work}/{router}.{kind}.trace" for kind in TEXTS}
    known = f"{work}/{router}.{args.steps}.json"
    if os.path.exists(known):
        with open(known) as file:
            return traces, json.load(file)
    texts, files = {}, {}
    for kind in TEXTS:
        texts[kind], files[kind] = collect(kind, 400_000)
        with open(f"{work}/{kind}.txt", "wb") as file:
            file.write(texts[kind])
    block = 2048
    with open(f"{work}/mix.txt", "wb") as file:  # kinds take turns, so that batches and held-out parts have all of them
        for begin in range(0, 400_000, block):
            for kind in TEXTS:
                file.write(texts[kind][begin:begin + block])
    command = [args.sluice, "train", "--json", "--text", f"{work}/mix.txt", "--record-steps", "8"]
    for kind, trace in traces.items():
        command += ["--record", f"{trace}={work}/{kind}.txt"]
    sets = [f"model.num_experts={EXPERTS}", "model.num_layers=3", "model.hidden=32", "model.ffn=16",
            "topology.nodes=2x1", "train.tokens_per_step=1024", f"train.steps={args.steps}", "train.learning_rate=5e-3",
            "routing.top_k=8", f"routing.policy={router}"]
    sets += ["routing.aux_loss=1e-2"] if router == "softmax_topk" else ["routing.relu_lambda0=1e-6"]
    for s in sets:
        command += ["--set", s]
    begin = time.time()
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode != 0:
        sys.exit(f"placement_study: {out.stderr}")
    report = json.loads(out.stdout)
    told = {"router": router, "files": files, "steps": args.steps, "heldout_bpb": report["heldout_bpb"],
            "order2_bpb": report["order2_bpb"], "active_experts": report["active_experts"]["end"],
            "seconds": round(time.time() - begin, 1)}
    with open(known, "w") as file:
        json.dump(told, file)
    return traces, told


def place(args, cell, fit, held_out, assign):
    nodes, ranks, slots = cell
    command = [args.sluice, "place", "--json", "--nodes", str(nodes), "--ranks-per-node", str(ranks), "--slots-per-rank",
               str(slots), "--moves", str(args.moves), "--assign", assign, "--eval-assign", "mixed", "--stats", *fit,
               "--eval", held_out]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode != 0:
        sys.exit(f"placement_study: {' '.join(command)}\n{out.stderr}")
    report = json.loads(out.stdout)
    pick = lambda figures: {name: {key: figures[name][key] for key in KEYS} for name in figures}
    return pick({"sluice": report["fit"]["sluice"]}), pick(report["eval"])


def judge(cell, figures):
    """Ratios of ours to the better of EPLB's policies, and whether the cell's targets are met."""
    nodes, ranks, slots = cell
    ours, eplb = figures["sluice"], [figures["eplb_global"], figures["eplb_hierarchical"]]
    out = {}
    if ours["node_crossings_per_token"] is not None:
        out["node_crossings"] = ours["node_crossings_per_token"] / min(e["node_crossings_per_token"] for e in eplb)
        out["busiest_node"] = ours["busiest_node_crossings"] / min(e["busiest_node_crossings"] for e in eplb)
        out["step"] = ours["predicted_step_us"] / min(f["predicted_step_us"] for f in figures.values())
    out["balance"] = ours["balance"] / max(e["balance"] for e in eplb)
    spare = nodes * ranks * slots / EXPERTS - 1
    met = {"balance": out["balance"] >= 0.95}
    if "step" in out:
        met |= {"node_crossings": out["node_crossings"] <= 0.85, "step": out["step"] <= 1.01,
                "busiest_node": out["busiest_node"] <= (0.9 if spare >= 0.5 else 1)}
    out["judged"] = nodes >= 4
    out["met"] = met
    return out


def planning_time(args):
    """256 experts, 58 layers, 72 ranks with 4 slots: synthetic routes, since only time is asked."""
    import random
    rng = random.Random(1)
    path, layers = f"{args.work}/large.routes.txt", range(58)
    with open(path, "w") as file:
        file.write(f"# synthetic, layers {','.join(map(str, layers))}, top-8 of 256: one line a token\n")
        for _ in range(3000):
            line = []
            for _ in layers:
                kind, chosen = rng.randrange(16), set()
                while len(chosen) < 8:
                    near = (kind * 16 + int(rng.random() ** 2 * 40)) % 256
                    chosen.add(near if rng.random() < 0.8 else rng.randrange(256))
                line.append(",".join(map(str, sorted(chosen))))
            file.write(" ".join(line) + "\n")
    rows = []
    for nodes, ranks in ((9, 8), (1, 72)):
        for moves in (0, args.moves):  # 0: the pairwise objective's placement without the search on tokens
            out = subprocess.run([args.sluice, "place", "--json", "--policy", "sluice", "--stats", path, "--nodes", str(nodes),
                                  "--ranks-per-node", str(ranks), "--slots-per-rank", "4", "--moves", str(moves)],
                                 capture_output=True, text=True, check=True)
            ours = json.loads(out.stdout)["fit"]["sluice"]
            rows.append({"nodes": nodes, "ranks_per_node": ranks, "moves": ours["moves"], "planning_ms": ours["planning_ms"]})
            print(f"256 experts x 58 layers, {nodes}x{ranks}: {rows[-1]}", file=sys.stderr)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sluice")
    parser.add_argument("out")
    parser.add_argument("--olmoe", help="folder with OLMoE's routes and counts; without it only the byte model")
    parser.add_argument("--work", default="/tmp/placement_study", help="folder for texts and traces")
    parser.add_argument("--moves", type=int, default=60000)
    parser.add_argument("--steps", type=int, default=400, help="training steps of the byte model")
    parser.add_argument("--held-out", type=int, default=len(TEXTS), help="how many kinds of text to leave out in turn")
    parser.add_argument("--jobs", type=int, default=1, help="cells planned at a time")
    parser.add_argument("--routers", nargs="*", default=["softmax_topk", "relu"])
    args = parser.parse_args()
    os.makedirs(args.work, exist_ok=True)

    timing = planning_time(args)
    sources, training = [], []
    for router in args.routers:
        traces, report = record(args, router, args.work)
        training.append(report)
        print(f"{router}: {report}", file=sys.stderr)
        sources += [(f"byte model, {router}", traces, kind, assign) for kind in list(traces)[:args.held_out]
                    for assign in ("mixed", "skewed")]
    if args.olmoe:
        routes = {d: f"{args.olmoe}/{d}.routes.txt" for d in ("arxiv", "github")}
        counts = {d: f"{args.olmoe}/{d}.json" for d in ("arxiv", "github", "c4")}
        sources += [("OLMoE routes (resampled)", routes, d, "mixed") for d in routes]
        sources += [("OLMoE counts", counts, d, "mixed") for d in counts]

    lines, done = args.out + "l", {}
    if os.path.exists(lines):
        with open(lines) as file:
            done = {row["key"]: row for row in map(json.loads, file)}

    def study(job):
        (name, files, left_out, assign), cell = job
        key = f"{name}; {left_out}; {assign}; {cell}; {args.moves}; {args.steps}"
        if key in done:
            return done[key]
        fit = [path for domain, path in files.items() if domain != left_out]
        on_fit, on_held_out = place(args, cell, fit, files[left_out], assign)
        row = {"key": key, "routing": name, "held_out": left_out, "sources": assign,
               "cell": f"{cell[0]}x{cell[1]}, {cell[2]} slots", **judge(cell, on_held_out), "fit": on_fit, "eval": on_held_out}
        with open(lines, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k not in ("key", "fit", "eval")}), file=sys.stderr, flush=True)
        return row

    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(study, [(source, cell) for source in sources for cell in CELLS]))

    summary = []
    for name in dict.fromkeys(r["routing"] for r in rows):
        for cell in dict.fromkeys(r["cell"] for r in rows):
            some = [r for r in rows if r["routing"] == name and r["cell"] == cell]
            entry = {"routing": name, "cell": cell, "judged": some[0]["judged"], "cases": len(some)}
            for key in ("node_crossings", "busiest_node", "balance", "step"):
                values = [r[key] for r in some if key in r]
                if values:
                    worst = min(values) if key == "balance" else max(values)
                    entry[key] = {"median": statistics.median(values), "worst": worst,
                                  "met": sum(r["met"][key] for r in some)}
            summary.append(entry)
    run = lambda *command: subprocess.run(command, capture_output=True, text=True).stdout.strip()
    device = next((l.split(":", 1)[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "unknown")
    head = {"date": time.strftime("%Y-%m-%d"), "commit": run("git", "rev-parse", "--short", "HEAD"), "device": device,
            "driver": None, "moves": args.moves, "training": training, "planning": timing, "summary": summary}
    with open(args.out, "w") as file:  # a row a line
        file.write(json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n  ')
        file.write(",\n  ".join(json.dumps({k: v for k, v in row.items() if k != "key"}) for row in rows) + "\n ]\n}\n")
    for entry in summary:
        line = f"{entry['routing']:28} {entry['cell']:16}"
        for key in ("node_crossings", "busiest_node", "balance", "step"):
            if key in entry:
                v = entry[key]
                line += f" {key} {v['median']:.3f} (worst {v['worst']:.3f}, met {v['met']}/{entry['cases']})"
        print(line)


if __name__ == "__main__":
    main()
