#!/usr/bin/env python3
"""Randomised fault runs: ranks train, one of them breaks, and what the others say is judged.

usage: fault_runs.py --program build/release/fault_rank [--runs N] [--seed S] [--transports local,tcp,shm,shm+tcp,ucx,mpi]
                     [--faults stop,slow] [--timeout-ms T] [--json FILE] [--only SEED]

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
import socket
import statistics
import subprocess
import sys
import tempfile
import time

PLACES = ["start", "plan", "dispatch", "combine", "backward", "all-reduce"]
# What breaks, and over which transports it can.
THREADS = ["vanish", "late", "throw", "slow", "lie", "garbage", "other"]
# From outside: a stranger sends garbage to every port, one joins with a wrong secret, one of another job; and a rank that
# was started with another configuration.
OUTSIDE = ["intruder", "secret", "stale"]
PROCESSES = ["kill", "stop"] + THREADS[1:] + OUTSIDE + ["config"]
FAULTS = {"local": THREADS, "shm": PROCESSES, "tcp": PROCESSES + ["cut"], "shm+tcp": PROCESSES + ["cut"],
          "ucx": PROCESSES + ["cut"], "mpi": ["stop"] + THREADS[1:]}
HARMLESS = ["slow"] + OUTSIDE  # the job must go on
STEPS_OF_HARMLESS = {"slow": 8, "intruder": 400, "secret": 400, "stale": 400}
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
    if {"shm", "tcp"} <= set(names):
        names.append("shm+tcp")
    return [name for name in names if name in FAULTS]


def command_of(program, case):
    fault, count = case["fault"], case["count"]
    if fault in OUTSIDE:
        fault, count = "none", STEPS_OF_HARMLESS[fault]
    words = [program, case["transport"], str(case["ranks"]), str(case["victim"]), fault, case["place"],
             str(count), str(case["timeout_ms"]), str(case["seed"])]
    sluice = os.path.join(os.path.dirname(program), "sluice")
    if fault == "config":
        words = ["sh", "-c", f'[ "$SLUICE_LAUNCH_RANK" = {case["victim"]} ] && export SLUICE_TRAIN_SEED={case["seed"] + 2}; '
                 f'exec {sluice} train --set comm.transport={case["transport"]} --set train.steps=5 --text {__file__}']
    if case["transport"] == "local":
        return words
    if case["transport"] == "mpi":
        root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        return ["mpirun", *root, "--oversubscribe", "--enable-recovery", "--mca", "btl", "vader,self", "--mca",
                "btl_vader_single_copy_mechanism", "none", "-n", str(case["ranks"])] + words
    return [sluice, "launch", "--keep-going", "-n", str(case["ranks"]), "--"] + words


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


def environment_of(pid):
    with open(f"/proc/{pid}/environ", "rb") as f:
        return dict(entry.decode(errors="replace").split("=", 1) for entry in f.read().split(b"\0") if b"=" in entry)


def listening_ports(pids):
    """TCP ports of this host on which these processes listen."""
    inodes = set()
    for pid in pids:
        try:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                link = os.readlink(f"/proc/{pid}/fd/{fd}")
                if link.startswith("socket:["):
                    inodes.add(link[8:-1])
        except OSError:
            pass
    ports = set()
    with open("/proc/net/tcp") as f:
        for line in f.readlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                ports.add(int(words[1].split(":")[1], 16))
    return ports


def attack(case, command, process, rng):
    """One attempt from outside while the job runs; what is wrong, or nothing."""
    ranks = [pid for pid in children_of(process.pid)]
    if case["fault"] == "intruder":
        for port in listening_ports(ranks + [process.pid]):
            for _ in range(3):
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=1) as stranger:
                        stranger.settimeout(0.2)
                        stranger.sendall(rng.randbytes(rng.choice([1, 40, 100, 5000])))
                        stranger.recv(4096)
                except OSError:
                    pass
        return ""
    for pid in ranks:
        try:
            environment = environment_of(pid)
        except OSError:
            continue
        if "SLUICE_LAUNCH_RANK" not in environment:
            continue
        if case["fault"] == "secret":
            environment["SLUICE_LAUNCH_SECRET"] = "0123456789abcdef" * 4
        else:
            environment["SLUICE_LAUNCH_JOB"] = str(rng.randrange(1, 1 << 31))
        try:
            done = subprocess.run(command[command.index("--") + 1:], env=environment, capture_output=True, text=True,
                                  timeout=60)
        except subprocess.TimeoutExpired:
            return "a stranger was not refused within a minute"
        return "a stranger was let in" if done.returncode == 0 or "losses" in done.stdout else ""
    return ""


def run(program, case):
    """The events of all ranks, how it ended, and what was said on standard error."""
    survivors = case["ranks"] - 1
    limit = time.monotonic() + case["timeout_ms"] / 1000 * 1.2 + 60
    with tempfile.TemporaryFile() as errors, tempfile.NamedTemporaryFile() as lines:
        command = command_of(program, case)
        process = subprocess.Popen(command, stdout=lines, stderr=errors)
        begin, rng, wrong, attacks = time.monotonic(), random.Random(case["seed"]), "", 0

        def events():
            out = []
            with open(lines.name, "rb") as f:  # by itself: the ranks write where the other one stands
                text = f.read().decode(errors="replace")
            for line in text.splitlines():
                try:
                    out.append(json.loads(line))
                except ValueError:
                    pass  # a line that is being written, or a launcher's
            return out

        hang = False
        while process.poll() is None:
            if case["fault"] in OUTSIDE and attacks < 3 and time.monotonic() > begin + 0.3:
                wrong = wrong or attack(case, command, process, rng)
                attacks += 1
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
        return events(), hang, code, errors.read().decode(errors="replace"), wrong


def judge(case, result, clean_losses):
    """("ok", detection in seconds or None) or (what is wrong, detail)."""
    events, hang, code, errors, wrong = result
    if hang:
        return "hang", errors[-500:]
    if wrong:
        return "false alarm", wrong
    if "Sanitizer" in errors or "runtime error:" in errors:
        return "crash", errors[-2000:]
    if case["fault"] == "config":
        named = f'rank {case["victim"]}: train.seed'
        return ("ok", None) if code != 0 and named in errors else ("wrong culprit", errors[-500:])
    ends = {e["rank"]: e for e in events if e["event"] == "end"}
    started = [e["at_ns"] for e in events if e["event"] == "fault"]
    expected = set(range(case["ranks"]))
    harmless = case["fault"] in HARMLESS
    if not harmless:
        expected -= {case["victim"]}
    if not harmless and not started and any("losses" in e for e in ends.values()):
        return "no trigger", ""
    if not expected <= set(ends):
        return "crash", f"exit {code}, no word of ranks {sorted(expected - set(ends))}: {errors[-500:]}"
    if case["transport"] == "local" and code != 0:
        return "crash", f"exit {code}: {errors[-500:]}"
    if harmless:
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


def draw(seed, transports, faults, timeout_ms):
    rng = random.Random(seed)
    transport = rng.choice(transports)
    fault = rng.choice([f for f in FAULTS[transport] if not faults or f in faults])
    ranks = rng.randint(2, 4)
    if fault == "other":
        ranks = max(ranks, 3)  # of two ranks that differ nobody can say which is wrong
    place = "plan" if fault in TAMPERING else "start" if fault in OUTSIDE + ["config"] else rng.choice(PLACES)
    victim = rng.randrange(ranks)
    if fault == "config":
        victim = rng.randrange(1, ranks)  # others are compared with rank 0
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
    parser.add_argument("--faults", help="only these")
    parser.add_argument("--timeout-ms", type=int, default=1000)
    parser.add_argument("--json")
    parser.add_argument("--only", type=int, help="the run of this seed alone, with what its ranks said")
    args = parser.parse_args()
    program = os.path.abspath(args.program)
    transports = args.transports.split(",") if args.transports else usable_transports(program)

    faults = set(args.faults.split(",")) if args.faults else set()
    for name in transports:
        if name not in FAULTS or (faults and not faults & set(FAULTS[name])):
            sys.exit(f"no such fault over {name}; there are {', '.join(FAULTS.get(name, FAULTS))}")

    clean = {}

    def clean_losses(case):
        """Of the same job without a fault, over threads: all transports give the same bits."""
        steps = STEPS_OF_HARMLESS[case["fault"]]
        key = (case["ranks"], case["seed"] % 2, steps)
        if key not in clean:
            result = run(program, {**case, "transport": "local", "fault": "none", "count": steps})
            clean[key] = next(e["losses"] for e in result[0] if "losses" in e)
        return clean[key]

    if args.only is not None:
        case = draw(args.only, transports, faults, args.timeout_ms)
        result = run(program, case)
        print(json.dumps(case), *(json.dumps(e) for e in result[0]), result[3], sep="\n")
        print(judge(case, result, clean_losses))
        return 0

    rows, seed = [], args.seed
    while len(rows) < args.runs:
        case = draw(seed, transports, faults, args.timeout_ms)
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
