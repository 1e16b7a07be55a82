#!/usr/bin/env python3
"""Randomised fault runs: ranks train, one of them breaks, and what the others say is judged.

usage: fault_runs.py --program build/release/fault_rank [--runs N] [--seed S] [--transports local,tcp,shm,mpi]
                     [--timeout-ms T] [--json FILE] [--only INDEX]

Every run draws transport, fault, place, victim and number of ranks from the seed. Judged, a run at a time:
  hang            the run does not end within its deadline and a wide margin
  crash           a rank other than the victim dies of a signal, or a sanitizer reports something
  wrong culprit   a survivor blames another rank than the victim, or none, or not in the words the fault asks for
  late            detection took longer than the deadline (timeout + suspicion) and what a loaded machine adds
  false alarm     a rank that is only slow, or a stranger, ends the job or changes a loss
  no trigger      the fault did not happen (the run says nothing; it is drawn again)
Detection: from the fault to the last survivor's error. The exit status is 1 when any run is judged wrong.
"""
import argparse
import collections
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

PLACES = ["start", "plan", "dispatch", "combine", "backward", "all-reduce"]
# What breaks, and over which transports it can.
THREADS = ["vanish", "late", "throw", "slow", "lie", "garbage", "other"]
PROCESSES = ["kill", "stop"] + THREADS[1:]
FAULTS = {"local": THREADS, "shm": PROCESSES, "tcp": PROCESSES + ["cut"], "mpi": ["stop"] + THREADS[1:]}
TAMPERING = ("lie", "garbage", "other")  # of the plan's messages
# Codes that a survivor may report.
CODES = {
    "vanish": {"deadline passed", "peer lost"},
    "late": {"deadline passed"},
    "throw": {"group aborted", "out of memory", "peer lost"},
    "kill": {"peer lost"},
    "stop": {"peer lost", "deadline passed"},
    "cut": {"peer lost", "transport failure"},
    "lie": {"ranks disagree", "invalid argument"},
    "garbage": {"ranks disagree", "invalid argument"},
    "other": {"ranks disagree"},
}
LOAD_S = 2.0  # what a loaded machine may add before a detection counts as late


def usable_transports(program):
    sluice = os.path.join(os.path.dirname(program), "sluice")
    try:
        done = subprocess.run([sluice, "info", "--json"], capture_output=True, text=True, timeout=60)
        names = [t["name"] for t in json.loads(done.stdout)["transports"] if t["usable"]]
    except (OSError, ValueError, KeyError, subprocess.TimeoutExpired):
        names = ["local"]
    return [name for name in names if name in FAULTS]


def command_of(program, case):
    words = [program, case["transport"], str(case["ranks"]), str(case["victim"]), case["fault"], case["place"],
             str(case["count"]), str(case["timeout_ms"]), str(case["seed"])]
    if case["transport"] == "local":
        return words
    if case["transport"] == "mpi":
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        return ["mpirun", *root, "--oversubscribe", "--enable-recovery", "--mca", "btl", "vader,self", "--mca",
                "btl_vader_single_copy_mechanism", "none", "-n", str(case["ranks"])] + words
    return [os.path.join(os.path.dirname(program), "sluice"), "launch", "--keep-going", "-n",
            str(case["ranks"]), "--"] + words


def children_of(pid):
    out = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as f:
                for child in f.read().split():
                    out += [int(child)] + children_of(int(child))
    except OSError:
        pass
    return out


def end_tree(process):
    """Kills what this run started: a stopped victim does not end by itself."""
    for pid in children_of(process.pid) + [process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def run(program, case):
    """The events of all ranks, how it ended, and what was said on standard error."""
    survivors = case["ranks"] - 1
    limit = time.monotonic() + case["timeout_ms"] / 1000 * 1.2 + 60
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as lines:
        process = subprocess.Popen(command_of(program, case), stdout=lines, stderr=errors)

        def events():
            lines.seek(0)
            out = []
            for line in lines.read().decode(errors="replace").splitlines():
                try:
                    out.append(json.loads(line))
                except ValueError:
                    pass  # a line that is being written, or a launcher's
            return out

        hang = False
        while process.poll() is None:
            # A victim that was stopped stays; everyone else has spoken.
            if case["fault"] == "stop":
                ended = {e["rank"] for e in events() if e["event"] == "end"}
                if len(ended - {case["victim"]}) == survivors:
                    break
            if time.monotonic() > limit:
                hang = True
                break
            time.sleep(0.02)
        if process.poll() is None:
            end_tree(process)
        code = process.wait()
        errors.seek(0)
        return events(), hang, code, errors.read().decode(errors="replace")


def judge(case, result, clean_losses):
    """("ok", detection in seconds or None) or (what is wrong, detail)."""
    events, hang, code, errors = result
    if hang:
        return "hang", errors[-500:]
    if "Sanitizer" in errors or "runtime error:" in errors:
        return "crash", errors[-2000:]
    ends = {e["rank"]: e for e in events if e["event"] == "end"}
    started = [e["at_ns"] for e in events if e["event"] == "fault"]
    expected = set(range(case["ranks"]))
    if case["fault"] != "slow":
        expected -= {case["victim"]}
    if case["fault"] != "slow" and not started and any("losses" in e for e in ends.values()):
        return "no trigger", ""
    if not expected <= set(ends):
        return "crash", f"exit {code}, no word of ranks {sorted(expected - set(ends))}: {errors[-500:]}"
    if case["transport"] == "local" and code != 0:
        return "crash", f"exit {code}: {errors[-500:]}"
    if case["fault"] == "slow":
        bad = [e for e in ends.values() if "losses" not in e]
        if bad:
            return "false alarm", bad[0].get("message", "")
        losses = {e["losses"] for e in ends.values()}
        return ("ok", None) if losses == {clean_losses(case)} else ("false alarm", "losses differ")
    if not started:
        return "no trigger", ""
    for rank in sorted(expected):
        end = ends[rank]
        if "code" not in end:
            return "wrong culprit", f"rank {rank} saw no error"
        if end.get("culprit") != case["victim"] or end["code"] not in CODES[case["fault"]]:
            return "wrong culprit", f"rank {rank}: {end.get('culprit')}, {end['code']}: {end['message']}"
        if not end.get("phase"):
            return "wrong culprit", f"rank {rank} names no phase: {end['message']}"
        if case["fault"] == "late" and "late" not in end["message"]:
            return "wrong culprit", f"rank {rank} does not say late: {end['message']}"
    detection = max(ends[r]["at_ns"] for r in expected) / 1e9 - started[0] / 1e9
    if detection > case["timeout_ms"] / 1000 * 1.2 + LOAD_S:
        return "late", f"{detection:.2f} s"
    return "ok", detection


def draw(seed, transports, timeout_ms):
    rng = random.Random(seed)
    transport = rng.choice(transports)
    fault = rng.choice(FAULTS[transport])
    ranks = rng.randint(2, 4)
    if fault == "other":
        ranks = max(ranks, 3)  # of two ranks that differ nobody can say which is wrong
    place = "plan" if fault in TAMPERING else rng.choice(PLACES)
    victim = rng.randrange(ranks)
    if fault in ("lie", "garbage") and ranks == 3 and victim == 2:
        victim = 0  # with an odd seed rank 2 is alone in its node (fault_rank.cpp), and lies are told within a node
    return {"transport": transport, "fault": fault, "place": place, "ranks": ranks, "victim": victim,
            "count": 1 if place == "start" else rng.randint(1, 60), "timeout_ms": timeout_ms, "seed": seed}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--transports", help="by default all that are usable here")
    parser.add_argument("--timeout-ms", type=int, default=1000)
    parser.add_argument("--json")
    parser.add_argument("--only", type=int, help="the run of this seed alone, with what its ranks said")
    args = parser.parse_args()
    program = os.path.abspath(args.program)
    transports = args.transports.split(",") if args.transports else usable_transports(program)

    clean = {}

    def clean_losses(case):
        """Of the same job without a fault, over threads: all transports give the same bits."""
        key = (case["ranks"], case["seed"] % 2)
        if key not in clean:
            result = run(program, {**case, "transport": "local", "fault": "none"})
            clean[key] = next(e["losses"] for e in result[0] if "losses" in e)
        return clean[key]

    if args.only is not None:
        case = draw(args.only, transports, args.timeout_ms)
        result = run(program, case)
        print(json.dumps(case), *(json.dumps(e) for e in result[0]), result[3], sep="\n")
        print(judge(case, result, clean_losses))
        return 0

    rows, seed = [], args.seed
    while len(rows) < args.runs:
        case = draw(seed, transports, args.timeout_ms)
        seed += 1
        verdict, detail = judge(case, run(program, case), clean_losses)
        if verdict == "no trigger":
            if seed - args.seed > 5 * args.runs + 50:
                sys.exit("faults do not happen: too many runs without one")
            continue
        rows.append({**case, "verdict": verdict, "detection_s": detail if verdict == "ok" else None,
                     "detail": "" if verdict == "ok" else detail})
        if verdict != "ok":
            print(f"seed {case['seed']}: {verdict}: {case}: {detail}", file=sys.stderr)

    verdicts = collections.Counter(row["verdict"] for row in rows)
    deadline = args.timeout_ms / 1000 * 1.2
    summary = {"runs": len(rows), "first_seed": args.seed, "last_seed": seed - 1, "transports": transports,
               "timeout_s": args.timeout_ms / 1000, "deadline_s": deadline,
               "hangs": verdicts["hang"], "crashes": verdicts["crash"], "wrong_culprits": verdicts["wrong culprit"],
               "late": verdicts["late"], "false_alarms": verdicts["false alarm"]}

    def times(chosen):
        found = sorted(r["detection_s"] for r in chosen if r["detection_s"] is not None)
        return (statistics.median(found), found[-1]) if found else (None, None)

    summary["detection_s"] = dict(zip(("median", "max"), times(rows)))
    groups = collections.defaultdict(list)
    for row in rows:
        groups[(row["transport"], row["fault"])].append(row)
    print(f"seeds {args.seed}..{seed - 1}, timeout {args.timeout_ms / 1000:g} s, deadline {deadline:g} s")
    print(f"{'transport':10} {'fault':8} {'runs':>5} {'wrong':>5} {'median s':>9} {'max s':>7}")
    for (transport, fault), chosen in sorted(groups.items()):
        median, most = times(chosen)
        wrong = sum(row["verdict"] != "ok" for row in chosen)
        shown = ("-", "-") if median is None else (f"{median:.3f}", f"{most:.3f}")
        print(f"{transport:10} {fault:8} {len(chosen):5} {wrong:5} {shown[0]:>9} {shown[1]:>7}")
    print(", ".join(f"{key} {summary[key]}" for key in ("runs", "hangs", "crashes", "wrong_culprits", "late",
                                                        "false_alarms")))
    if args.json:
        with open(args.json, "w") as f:
            json.dump({"summary": summary, "rows": rows}, f, indent=1)
            f.write("\n")
    return 0 if len(rows) == verdicts["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
