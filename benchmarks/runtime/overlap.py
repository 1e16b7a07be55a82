#!/usr/bin/env python3
"""How much of the exchange hides behind the experts: settings of compute/wire ratio and skew, every schedule in turns.

  benchmarks/runtime/overlap.py PROGRAM OUT.json [--commit ID] [--counts NAME=FILE ...] [--iterations N]

Two ranks with a core each as two nodes, over a link that transport local emulates. The link's speed is chosen from a first
run so that a forward pass is on the wire for a stated part of its compute time. For every setting `bench --sweep` lets the
configured schedules, auto and sequential take turns. --counts names files of one number an expert (bench.popularity), such
as a model's counts; uniform and Zipf are always measured. Nothing else should run on the machine.
"""
import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile

MODEL = {"model.num_experts": 64, "model.hidden": 512, "model.ffn": 256, "bench.tokens_per_rank": 2048, "bench.top_k": 4}


def bench(program, sets, *extra):
    command = [program, "bench", "--config", os.path.join(os.path.dirname(__file__), "../../configs/bench.toml"), "--json",
               *extra]
    for key, value in {**MODEL, **sets}.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def name_of(run):
    s = run["schedule"]
    return "auto" if s["automatic"] else s["policy"] + (f"-{s['num_chunks']}" if s["policy"] != "sequential" else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("out")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--counts", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--ratios", default="0.3,0.6,1.0", help="wire time over compute time, with commas")
    args = parser.parse_args()
    routings = {"uniform": {"bench.skew": 0}, "zipf": {"bench.skew": 1}}
    for item in args.counts:
        name, file = item.split("=", 1)
        routings[name] = {"bench.popularity": os.path.abspath(file)}

    rows, summaries = [], []
    with tempfile.TemporaryDirectory() as folder:
        profile = os.path.join(folder, "profile.json")
        probe = [args.program, "info", "--probe", "-o", profile, "--config",
                 os.path.join(os.path.dirname(__file__), "../../configs/bench.toml")]
        for key, value in MODEL.items():
            probe += ["--set", f"{key}={value}"]
        subprocess.run(probe, check=True, stdout=subprocess.DEVNULL)
        for routing, sets in routings.items():
            fast = bench(args.program, {**sets, "schedule.policy": "sequential", "bench.iterations": 5,
                                        "schedule.profile": profile})
            compute_us = fast["floor_us"]["compute"]
            wire_bytes = fast["bytes"]["across_nodes"] / 2
            for ratio in map(float, args.ratios.split(",")):
                speed = wire_bytes / (ratio * compute_us) * 1e6
                runs = bench(args.program, {**sets, "topology.across_nodes_bytes_per_s": speed, "schedule.profile": profile,
                                            "bench.iterations": args.iterations}, "--sweep")["runs"]
                for run in runs:
                    rows.append({"case": f"{routing}, wire {ratio} of compute", "shape": name_of(run),
                                 "chosen": run["schedule"], "median_us": run["forward_us"]["median"],
                                 "mad_us": run["forward_us"]["mad"], "baseline": "sequential",
                                 "baseline_us": run["sequential_forward_us"]["median"],
                                 "ratio": run["sequential_forward_us"]["median"] / run["forward_us"]["median"],
                                 "upper95_to_sequential": run["forward_to_sequential"]["upper95"],
                                 "overlap_efficiency": run["overlap_efficiency"],
                                 "exposed_comm_us": run["exposed_comm_us"], "floor_us": run["floor_us"],
                                 "predicted_us": run["predicted_forward_us"],
                                 "backward": {k: run[v] for k, v in {
                                     "us": "backward_us", "sequential_us": "sequential_backward_us",
                                     "overlap_efficiency": "overlap_efficiency_backward",
                                     "predicted_us": "predicted_backward_us"}.items()}})
                summaries.append(summary(rows, f"{routing}, wire {ratio} of compute"))
                save(args, fast["device"], summaries, rows)  # after every setting: a run that is cut off keeps what it has

    autos = [r for r in rows if r["shape"] == "auto" and r["overlap_efficiency"] is not None]
    errors = [abs(predicted / measured - 1) for r in rows
              for predicted, measured in ((r["predicted_us"], r["median_us"]),
                                          (r["backward"]["predicted_us"], r["backward"]["us"]["median"]))]
    if autos:
        print(f"auto: overlap efficiency least {min(r['overlap_efficiency'] for r in autos):.3f}, "
              f"median {statistics.median(r['overlap_efficiency'] for r in autos):.3f}")
    print(f"prediction error: median {100 * statistics.median(errors):.1f}%, largest {100 * max(errors):.1f}%")


def save(args, device, summaries, rows):
    with open(args.out, "w") as out:
        json.dump({"benchmark": "overlap", "date": datetime.date.today().isoformat(), "commit": args.commit,
                   "device": device + ", 2 ranks with a core each, emulated link", "driver": platform.platform(),
                   "model": MODEL, "summary": summaries, "rows": rows}, out, indent=1)
        out.write("\n")


def summary(rows, case):
    mine = [r for r in rows if r["case"] == case]
    fixed = [r for r in mine if r["shape"] != "auto"]
    auto = next(r for r in mine if r["shape"] == "auto")
    out = {"case": case, "chosen": f"{auto['chosen']['policy']}-{auto['chosen']['num_chunks']}"}
    # auto chooses for the whole step, forward and backward: a training layer's plan serves both.
    for what, time in {"forward": lambda r: r["median_us"],
                       "step": lambda r: r["median_us"] + r["backward"]["us"]["median"]}.items():
        best = min(fixed, key=time)
        out[what] = {"best": best["shape"], "best_us": time(best), "auto_us": time(auto),
                     "auto_to_best": time(auto) / time(best)}
        print(f"{case}, {what}: best {best['shape']} {time(best):.0f} us, auto ({out['chosen']}) "
              f"{out[what]['auto_to_best']:.3f} of it", file=sys.stderr)
    best = min(fixed, key=lambda r: r["median_us"])
    out["auto_to_sequential_upper95"] = auto["upper95_to_sequential"]
    out["overlap_efficiency"] = {"best": best["overlap_efficiency"], "auto": auto["overlap_efficiency"]}
    print(f"   forward x{best['ratio']:.3f} of sequential; auto to sequential: 95% below {out['auto_to_sequential_upper95']:.3f}; "
          f"overlap efficiency best {best['overlap_efficiency']}, auto {auto['overlap_efficiency']}", file=sys.stderr)
    return out


if __name__ == "__main__":
    main()
