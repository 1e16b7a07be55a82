#!/usr/bin/env python3
"""The program as a user runs it: results, --json documents, and one clear line with a non-zero exit for bad input."""
import json
import os
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM = sys.argv.pop(1)
SOURCE = sys.argv.pop(1)
TRACE = "sluice-trace 1 layers 2 experts 16\n0 0 1:0.5 9:0.5\n0 1 3:1\n0 0\n1 0 2:1\n"
BENCH = ["bench", "--set", "bench.iterations=2", "--set", "bench.warmup=1", "--set", "bench.tokens_per_rank=64",
         "--set", "model.hidden=32", "--set", "model.ffn=32"]


def run(*args, env=None, **kwargs):
    return subprocess.run([PROGRAM, *args], capture_output=True, text=True, timeout=100,
                          env={**os.environ, **(env or {})}, **kwargs)


class Program(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.TemporaryDirectory()
        self.addCleanup(self.dir.cleanup)

    def file(self, name, content):
        path = os.path.join(self.dir.name, name)
        with open(path, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())
        return path

    def document(self, *args):
        done = run(*args)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def refused(self, words, *args, env=None, code=1):
        done = run(*args, env=env)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        self.assertEqual(done.stdout, "")
        lines = [line for line in done.stderr.splitlines() if line]
        self.assertEqual(len(lines), 1, done.stderr)
        for word in words:
            self.assertIn(word, lines[0])

    def test_info(self):
        info = self.document("info", "--json")
        self.assertEqual(info["transports"][0]["name"], "local")
        self.assertTrue(info["transports"][0]["usable"])
        for key in ("devices", "topology", "version"):
            self.assertIn(key, info)
        host = info["host"]
        self.assertGreaterEqual(host["threads"], host["cores"])
        self.assertGreaterEqual(host["cores"], host["own_cores"])
        # What hwloc says of this process is what the system says.
        done = subprocess.run(["taskset", "-c", "0", PROGRAM, "info", "--json"], capture_output=True, text=True, check=False)
        if 0 in os.sched_getaffinity(0) and done.returncode == 0:
            bound = json.loads(done.stdout)["host"]
            self.assertEqual((bound["own_threads"], bound["own_cores"]), ("0", 1))
        self.assertIn("transport local", run("info").stdout)

    def test_checkpoints(self):
        text = self.file("text.txt", "the gate opens, the water flows. " * 300)
        folder = os.path.join(self.dir.name, "ckpt")
        job = ["train", "--json", "--text", text, "--set", "topology.ranks=2", "--set", "model.hidden=16", "--set",
               "model.ffn=16", "--set", "train.tokens_per_step=64", "--set", "train.steps=6", "--set",
               "train.checkpoint_every=2", "--set", "train.checkpoint_keep=3", "--set",
               f"train.checkpoint_dir={folder}", "--set", "runtime.log_level=error"]
        report = os.path.join(self.dir.name, "report.json")
        whole = self.document(*job, "--set", f"train.report={report}")
        with open(report, encoding="utf-8") as f:
            self.assertEqual(json.load(f), whole)
        self.refused([self.dir.name], *job, "--set", f"train.report={self.dir.name}")
        self.assertEqual(sorted(os.listdir(folder)), [f"step-{step:010}" for step in (2, 4, 6)])
        self.refused(["already holds", "--resume"], *job)
        resumed = self.document(*job, "--resume-step", "2")
        self.assertEqual(resumed["resumed_from"], 2)
        self.assertEqual(resumed["losses"], whole["losses"])
        self.assertEqual(resumed["heldout_bpb"], whole["heldout_bpb"])
        newest = os.path.join(folder, "step-0000000006")
        shard = os.path.join(newest, min(os.listdir(newest), key=lambda name: not name.endswith("00001.bin")))
        with open(shard, "r+b") as f:
            f.truncate(1000)
        self.refused([shard, "section", "expected", "seen", "--resume-step 4"], *job, "--resume")
        self.refused(["train.checkpoint_dir"], "train", "--text", text, "--resume", "--set", "runtime.log_level=error")
        self.refused(["train.on_failure", "train.checkpoint_dir"], "train", "--set", "train.on_failure=shrink")

    def test_config(self):
        effective = self.document("config", "--json", "--set", "train.steps=7")
        self.assertEqual(effective["train"]["steps"]["value"], 7)
        self.assertIn("--set", effective["train"]["steps"]["source"])
        self.assertEqual(self.document("config", "--json")["train"]["seed"]["source"], "default")
        with open(os.path.join(SOURCE, "docs/config.md")) as f:
            self.assertEqual(run("config", "--doc").stdout, f.read())
        self.assertIn("properties", self.document("config", "--schema"))
        for name in sorted(os.listdir(os.path.join(SOURCE, "configs"))):
            with self.subTest(config=name):
                done = run("config", "--check", os.path.join(SOURCE, "configs", name))
                self.assertEqual(done.returncode, 0, done.stderr)

    def test_bench(self):
        for schedule in (["--set", "schedule.policy=sequential"], ["--set", "schedule.policy=pipelined"]):
            report = self.document(*BENCH, *schedule, "--set", "topology.nodes=2x2", "--json")
            self.assertEqual(report["ranks"], 4)
            self.assertEqual(report["rows"], "host")
            for key in ("device", "forward_us", "backward_us", "sequential_forward_us", "sequential_backward_us",
                        "floor_us", "dense_gemm_us", "predicted_forward_us", "overlap_efficiency", "exposed_comm_us",
                        "bytes", "flat_bytes", "schedule", "config_hash"):
                self.assertIn(key, report)
            self.assertGreater(report["forward_us"]["median"], 0)
            self.assertLessEqual(report["bytes"]["across_nodes"], report["flat_bytes"]["across_nodes"])
        self.assertIn("overlap efficiency", run(*BENCH).stdout)

    def test_device_cuda(self):
        """With a GPU both commands run there; without one, or without CUDA kernels, they say so."""
        train = ["train", "--text", os.path.join(SOURCE, "docs"), "--set", "train.steps=3",
                 "--set", "train.tokens_per_step=256", "--set", "topology.nodes=1x1"]
        for command in ([*BENCH, "--json"], [*train, "--json"]):
            done = run(*command, "--device", "cuda")
            if done.returncode == 0:
                json.loads(done.stdout)
            else:
                self.assertEqual(done.returncode, 1)
                self.assertRegex(done.stderr, "no CUDA device|no CUDA kernels")
                self.assertEqual(len(done.stderr.strip().splitlines()), 1, done.stderr)
        self.refused(["gpu", "cuda"], *BENCH, "--device", "gpu")

    def test_rows_between_gpus(self):
        """nvlink and nccl are values like any other; what they cannot do is said at once, also where there is no GPU."""
        cuda = ["--device", "cuda", "--set", "model.dtype=bf16"]
        transports = {t["name"]: t for t in self.document("info", "--json")["transports"]}
        for link in ("nvlink", "nccl"):
            over = ["--set", f"comm.transport={link}"]
            for command in (BENCH, ["train"]):
                self.refused([f"comm.transport {link}", "runtime.device cpu", "--device cuda"], *command, *over)
                self.refused(["model.dtype f32", "bf16"], *command, *over, "--device", "cuda")
                for key, value, words in (("comm.wire_dtype", "f32", ["rows or bf16"]), ("model.ffn", "20", ["multiple of 8"]),
                                          ("model.chain_iterations", "2", ["= 1"]), ("schedule.chain_chunks", "2", ["= 1"]),
                                          ("schedule.policy", "pipelined", ["by-source"]),
                                          ("schedule.policy", "by-source", ["schedule.num_chunks = 1"]),
                                          ("runtime.save", "rows", ["activations"])):
                    self.refused([key, value, link, *words], command[0], *over, *cuda, "--set", f"{key}={value}")
            self.refused([link, "host"], "tune", *over, "--set", "runtime.device=cuda", "--set", "model.dtype=bf16",
                         "-o", os.path.join(self.dir.name, "tuned.toml"))
            self.refused([link, "host"], "info", *over, "--set", "runtime.device=cuda", "--set", "model.dtype=bf16",
                         "--probe", "-o", os.path.join(self.dir.name, "profile.json"))
            if transports[link]["usable"]:
                continue
            self.assertRegex(transports[link]["why_not"], "CUDA|NCCL|nccl")
            began = time.monotonic()
            for command in ([*BENCH], ["train", "--text", os.path.join(SOURCE, "docs")]):
                self.refused([link, "choose another transport"], *command, *over, *cuda)
                done = run("launch", "-n", "2", "--", PROGRAM, *command, *over, *cuda)
                self.assertEqual((done.returncode, done.stdout), (1, ""), done.stderr)
                lines = done.stderr.strip().splitlines()
                self.assertEqual(sum("choose another transport" in line for line in lines), 2, done.stderr)  # each rank
                self.assertIn("ended with exit code 1", lines[-1])  # the launcher
            self.assertLess(time.monotonic() - began, 20)

    def test_experts_that_need_no_wire(self):
        # 16 of 20 experts have weights: of tokens with one expert each, all alike, four fifths travel as without the four.
        sets = lambda free: ["--set", f"model.num_experts={16 + free}", "--set", "bench.top_k=1", "--set", "bench.tokens_per_rank=2048",
                             "--set", "topology.nodes=2x1", "--set", "topology.across_nodes_bytes_per_s=1e9"]
        small = [a if "tokens_per_rank" not in a else "bench.seed=2" for a in BENCH[1:]]
        free = ["--set", "model.zero_experts=1", "--set", "model.copy_experts=1", "--set", "model.constant_experts=2"]
        travels = [self.document("bench", "--json", *small, *sets(n), *extra)["bytes"]["across_nodes"]
                for n, extra in ((0, []), (4, free))]
        self.assertAlmostEqual(travels[1] / travels[0], 0.8, delta=0.05)
        machine = ["--config", os.path.join(SOURCE, "configs/h100-infiniband.toml"), "--ranks", "8", "--policies",
                   "sequential", "--set", "bench.tokens_per_rank=256", "--json"]
        with_weights = self.document("simulate", *machine)
        half_free = self.document("simulate", *machine, "--set", "model.constant_experts=%d"
                                  % (with_weights["layer"]["num_experts"] // 2))
        self.assertLess(half_free["runs"][0]["step_us"], with_weights["runs"][0]["step_us"])

    def test_bench_sweep(self):
        runs = self.document(*BENCH, "--json", "--sweep")["runs"]
        schedules = [r["schedule"] for r in runs]
        self.assertEqual(sum(s["automatic"] for s in schedules), 1)
        fixed = {(s["policy"], s["num_chunks"]) for s in schedules[1:] if not s["automatic"]}
        self.assertEqual(fixed, {("pipelined", c) for c in (2, 4, 8)} |
                         {(p, c) for p in ("by-source", "hierarchical") for c in (1, 2, 4, 8)})
        for r in runs:
            self.assertGreater(r["predicted_forward_us"], 0)
            self.assertGreater(r["forward_to_sequential"]["median"], 0)

    def test_chain_of_experts(self):
        config = ["train", "--config", os.path.join(SOURCE, "configs/chain-of-experts.toml"),
                  "--text", os.path.join(SOURCE, "docs"), "--set", "train.tokens_per_step=256", "--json"]
        report = self.document(*config, "--set", "train.steps=8")
        self.assertEqual(len(report["losses"]), 8)
        self.assertLess(report["losses"][-1], report["losses"][0])
        self.assertEqual(report["active_experts"]["mean"], 2)
        # One chunk of tokens gives the same bits as two.
        one = self.document(*config, "--set", "train.steps=8", "--set", "schedule.chain_chunks=1")
        self.assertEqual(one["losses"], report["losses"])
        check = self.document(*config, "--check")
        self.assertTrue(check["passed"])
        self.assertLess(check["errors"]["gradient"]["error"], check["errors"]["gradient"]["limit"])

    def test_simulate(self):
        h100 = os.path.join(SOURCE, "configs/h100-infiniband.toml")
        small = ["--set", "bench.tokens_per_rank=64"]
        out = self.document("simulate", "--config", h100, "--ranks", "16", "--json", *small)
        self.assertEqual({r["node_size"] for r in out["runs"]}, {4, 8, 16})
        self.assertFalse(out["profile"]["measured"])
        self.assertEqual(out["counts"], "full plans")
        for r in out["runs"]:
            self.assertEqual(r["ranks"], 16)
            self.assertGreater(r["step_us"], 0)
            self.assertGreaterEqual(r["step_us"], max(r["floor_us"].values()) - 1e-6)
            self.assertGreaterEqual(r["exposed_comm_us"], 0)
            self.assertGreater(r["backward"]["step_us"], 0)
        self.assertEqual({r["schedule"]["policy"] for r in out["runs"]},
                         {"sequential", "pipelined", "by-source", "hierarchical"})
        large = self.document("simulate", "--config", h100, "--ranks", "512", "--json", "--chunks", "2", "--policies",
                              "hierarchical", *small)
        self.assertEqual(len(large["runs"]), 1)
        self.assertIn("plan summaries", large["counts"])
        self.assertIn("copy of expert", large["counts"])
        text = run("simulate", "--config", h100, "--ranks", "8", "--explain", *small).stdout
        for word in ("declared, not measured", "choice: ", "bound by"):
            self.assertIn(word, text)
        for name, ranks in (("gb200-nvl72", "144"), ("ethernet-cluster", "16")):
            config = os.path.join(SOURCE, "configs", name + ".toml")
            self.document("simulate", "--config", config, "--ranks", ranks, "--json", "--policies", "sequential", *small)

    def test_simulate_refuses(self):
        h100 = os.path.join(SOURCE, "configs/h100-infiniband.toml")
        base = ["simulate", "--config", h100]
        self.refused(["12", "8"], *base, "--ranks", "12")
        self.refused(["99", "64 tokens"], *base, "--ranks", "8", "--chunks", "99", "--set", "bench.tokens_per_rank=64")
        self.refused(["fastest", "pipelined"], *base, "--ranks", "8", "--policies", "fastest")
        self.refused(["--node-sizes", "3"], *base, "--ranks", "2", "--node-sizes", "3")
        self.refused(["machine", "--probe"], "simulate", "--ranks", "2")
        self.refused(["across_nodes_bytes_per_s"], *base, "--ranks", "16", "--set", "topology.across_nodes_bytes_per_s=0")
        self.refused(["none.json", "no such profile"], *base, "--ranks", "8", "--set", "schedule.profile=none.json")
        bad = self.file("bad.json", "{\"sluice_profile\": 1}")
        self.refused(["bad.json", "name"], *base, "--ranks", "8", "--set", "schedule.profile=" + bad)
        self.refused(["--ranks"], "simulate", "--ranks", "0", code=2)

    def test_probe_and_tune(self):
        small = BENCH[1:] + ["--set", "topology.nodes=2x1", "--set", "topology.across_nodes_bytes_per_s=1e9"]
        profile = os.path.join(self.dir.name, "p.json")
        printed = self.document("info", "--probe", "-o", profile, "--json", *small)
        with open(profile) as f:
            self.assertEqual(json.load(f), printed)
        self.assertTrue(printed["measured"])
        self.assertEqual(len(printed["gemms"]), 6)
        self.assertEqual(printed["link_model"], "calendar")
        self.assertGreater(len(printed["links"]["across_nodes"]["occupied"]), 3)
        # A profile of another machine: a warning, and it goes on.
        printed["device"] = "some other processor"
        other = self.file("other.json", json.dumps(printed))
        done = run("simulate", "--ranks", "2", "--set", "schedule.profile=" + other, *small)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("another machine", done.stderr)
        # A layer that was not measured.
        self.refused(["GEMM", "--probe"], "simulate", "--ranks", "2", "--set", "schedule.profile=" + profile, *small,
                     "--set", "model.dtype=bf16")
        # Contradictory: more bytes in less time.
        printed["gather"] = [[1, 5], [2, 4]]
        falls = self.file("falls.json", json.dumps(printed))
        self.refused(["falls.json", "gather", "falls"], "simulate", "--ranks", "2", "--set",
                     "schedule.profile=" + falls, *small)
        out = os.path.join(self.dir.name, "tuned.toml")
        tuned = self.document("tune", "-o", out, "--json", "--confirm", "2", *small, "--set", "schedule.profile=" + profile)
        self.assertEqual(tuned["profile"], profile)
        for r in tuned["runs"]:
            self.assertGreater(r["predicted_forward_us"], 0)
            self.assertGreater(r["forward_us"], 0)
        with open(out) as f:
            text = f.read()
        self.assertIn("# schedule", text)
        self.assertIn("predicted", text)
        self.assertEqual(run("config", "--check", out).returncode, 0)
        effective = self.document("config", "--json", "--config", out)
        self.assertEqual(effective["schedule"]["policy"]["value"], tuned["chosen"]["policy"])
        self.assertEqual(effective["schedule"]["profile"]["value"], profile)
        self.refused(["cannot be written"], "tune", "-o", os.path.join(self.dir.name, "no/such"), *small, "--set",
                     "schedule.profile=" + profile)
        self.assertEqual(run("info", "--probe").returncode, 2)

    def test_plan(self):
        trace = self.file("a.trace", TRACE)
        plan = self.document("plan", "--trace", trace, "--set", "topology.nodes=2x1", "--json", "--explain")
        self.assertEqual(plan["tokens"], 3)
        self.assertEqual(plan["routes"], 3)
        self.assertEqual(plan["total"]["rows"], {"same_rank": 1, "in_node": 0, "across_nodes": 2})
        self.assertEqual(len(plan["templates"]), 2)
        self.assertEqual(self.document("plan", "--trace", trace, "--layer", "1", "--json")["tokens"], 1)
        text = run("plan", "--trace", trace, "--set", "topology.nodes=2x1", "--explain").stdout
        for word in ("plan of rank 1", "expert_gemm1", "across nodes"):
            self.assertIn(word, text)

    def test_bad_configurations(self):
        bad = self.file("bad.toml", "[model]\nhidden = 64\n\n[train]\nstepz = 3\n")
        self.refused([bad + ":5:1", "stepz", "steps"], "config", "--check", bad)
        self.refused([":1:", "bad2.toml"], "bench", "--config", self.file("bad2.toml", "[model\n"))
        self.refused(["bad3.toml:2:10", "hidden"], "bench", "--config", self.file("bad3.toml", "[model]\nhidden = -4\n"))
        self.refused(["binary.toml"], "bench", "--config", self.file("binary.toml", b"\x00\x01\x02\xff"))
        self.refused(["nothing.toml"], "bench", "--config", os.path.join(self.dir.name, "nothing.toml"))
        self.refused(["100 chunks", "50 tokens"], "train", "--set", "schedule.policy=pipelined", "--set", "schedule.num_chunks=100",
                     "--set", "train.tokens_per_step=200", "--set", "topology.ranks=4", "--set", "train.steps=1", "--set", "runtime.log_level=error")
        self.refused(["99", "64 tokens"], *BENCH, "--set", "schedule.policy=pipelined", "--set", "schedule.num_chunks=99")
        self.refused(["--set", "model.hidden"], "bench", "--set", "model.hidden=many")
        self.refused(["SLUICE_MODEL_HIDDEN"], "bench", env={"SLUICE_MODEL_HIDDEN": "x"})
        self.refused(["top_k", "num_experts"], "bench", "--set", "bench.top_k=99")
        self.refused(["topology"], "bench", "--set", "topology.nodes=2x2", "--set", "topology.ranks=3")

    def test_bad_traces(self):
        self.refused(["bad.trace:2:", "0..15"], "plan", "--trace",
                     self.file("bad.trace", "sluice-trace 1 layers 1 experts 16\n0 0 16:1\n"))
        self.refused(["none.trace"], "plan", "--trace", os.path.join(self.dir.name, "none.trace"))
        trace = self.file("a.trace", TRACE)
        self.refused(["--layer", "0..1"], "plan", "--trace", trace, "--layer", "2")
        self.refused(["16 experts", "model.num_experts"], "plan", "--trace", trace, "--set", "model.num_experts=8")
        self.refused(["source rank 1", "1 ranks"], "plan", "--trace", trace, "--set", "topology.ranks=1")

    def test_bad_command_lines(self):
        self.refused(["--help"], code=2)
        self.refused(["--help"], "trane", code=2)
        self.refused(["--help"], "bench", "--nodes", "3", code=2)
        self.refused(["--trace"], "plan", code=2)
        self.refused(["trane", "train"], "trane", code=2)
        self.refused(["nonsense", "simulate"], "nonsense", code=2)
        # A text that is empty, as from a variable that is not set, is no default.
        for command in (["config", "--check", ""], ["config", "--config", ""], ["train", "--text", ""], ["bench", "--replay", ""],
                        ["bench", "--device", ""], ["plan", "--trace", ""]):
            self.refused([command[1], "is empty"], *command, code=2)
        self.refused(["is a section", "keys of train", "steps"], "config", "--set", "train=1")
        self.refused(["--here"], "launch", "-n", "2", "--here", "0-5", "--", "true")
        self.refused(["--secret-file"], "launch", "-n", "2", "--here", "0-0", "--", "true")

    def test_contradictory_options(self):
        train = ["train", "--text", self.file("t.txt", "the gate opens. " * 500), "--set", "train.steps=1"]
        self.refused(["--text", "train.text"], *train, "--set", "train.text=x")
        self.refused(["--device", "runtime.device=cuda"], *train, "--device", "cpu", "--set", "runtime.device=cuda")
        self.refused(["--replay", "bench.replay"], "bench", "--replay", "a", "--set", "bench.replay=b")
        self.refused(["--check", "--resume"], *train, "--check", "--resume")
        self.refused(["--resume-step"], *train, "--resume", "--resume-step", "3")
        self.refused(["--record-steps", "--record"], *train, "--record-steps", "3")
        self.refused(["--record", "a.trace", "twice"], *train, "--record", "a.trace", "--record", "a.trace=b")
        self.refused(["a.json", "twice"], *train, "--set", "train.report=a.json", "--set", "runtime.timeline=a.json")
        trace = self.file("a.trace", TRACE)
        place = ["place", "--stats", trace, "--nodes", "2", "--ranks-per-node", "1"]
        self.refused(["--eval-assign", "--eval"], *place, "--eval-assign", "mixed", code=2)
        self.refused(["--nodes"], *place[:3], "--nodes", "-2", "--ranks-per-node", "-2", code=2)

    def test_what_cannot_be_written_is_said_before_the_work(self):
        text = self.file("t.txt", "the gate opens. " * 500)
        nowhere = os.path.join(self.dir.name, "no", "such")
        endless = ["train", "--text", text, "--set", "train.steps=1000000", "--set", "runtime.log_level=error"]
        self.refused([nowhere, "cannot be written"], *endless, "--record", f"{nowhere}={text}")
        self.refused([nowhere, "cannot be written"], *endless, "--set", f"runtime.timeline={nowhere}")
        self.refused(["train.checkpoint_dir /proc/none", "cannot be made"], *endless, "--set", "train.checkpoint_dir=/proc/none")
        endless = [*BENCH[:1], *BENCH[3:], "--set", "bench.iterations=1000000", "--set", "runtime.log_level=error"]
        self.refused([nowhere, "cannot be written"], *endless, "--set", f"runtime.timeline={nowhere}")

    def test_links_that_a_profile_does_not_know_are_not_free(self):
        small = BENCH[1:] + ["--set", "topology.nodes=2x1"]
        profile = os.path.join(self.dir.name, "p.json")
        self.document("info", "--probe", "-o", profile, "--json", *small)
        known = ["simulate", "--json", "--set", "schedule.profile=" + profile, "--policies", "sequential"]
        # Two ranks of a node were not measured: neither swept without being asked for, nor at no cost.
        self.assertEqual({r["node_size"] for r in self.document(*known, *small)["runs"]}, {1})
        self.refused([profile, "links.in_node", "--probe"], *known, *small, "--node-sizes", "2")
        self.refused([profile, "links.in_node", "--probe"], *known, *BENCH[1:], "--ranks", "2")
        self.document(*known, *BENCH[1:], "--ranks", "2", "--set", "topology.in_node_bytes_per_s=1e9")
        # A declared machine likewise.
        declared = ["simulate", "--json", "--set", "machine.gemm_flops_per_s=1e12", "--set", "machine.memory_bytes_per_s=1e11",
                    "--policies", "sequential", "--set", "topology.across_nodes_bytes_per_s=1e9", *small]
        self.assertEqual({r["node_size"] for r in self.document(*declared)["runs"]}, {1})
        self.refused(["in_node_bytes_per_s"], *declared, "--node-sizes", "2")

    def test_placement_files(self):
        one = {"sluice_placement": 1, "planner": "by hand", "num_experts": 4, "num_ranks": 2, "nodes": [[0], [1]],
               "layers": [{"layer": 0, "experts_of_rank": [[0, 1], [2, 3]]}]}
        train = ["train", "--text", self.file("t.txt", "the gate opens. " * 500), "--set", "train.steps=1", "--set",
                 "train.tokens_per_step=64", "--set", "model.num_experts=4", "--set", "topology.ranks=2", "--set",
                 "placement.policy=file", "--set"]
        file = lambda **what: "placement.file=" + self.file("p.json", json.dumps({**one, **what}))
        quiet = ["--set", "runtime.log_level=error"]
        done = run(*train, file())
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("other nodes", done.stderr)
        done = run(*train, file(nodes=[[0, 1]]))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertNotIn("other nodes", done.stderr)
        layer = one["layers"][0]
        self.refused(["p.json", "3 layers", "model.num_layers is 2"], *train, file(layers=[layer] * 3), *quiet)
        self.refused(["p.json", "layers[0]", "expert 3"], *train, file(layers=[{"layer": 0, "experts_of_rank": [[0, 1], [2]]}]), *quiet)
        self.refused(["p.json", "rank 1 is in none"], *train, file(nodes=[[0]]), *quiet)
        self.refused(["is no file"], *train, "placement.file=" + self.dir.name, *quiet)
        self.refused(["is no file"], *train, "placement.file=/dev/zero", *quiet)

    def test_machine_of_place(self):
        """What a user says of the machine goes before the default one, and nothing is called twice that was said once."""
        trace = self.file("a.trace", "sluice-trace 2 layers 1 experts 16\n0 0 1:0.5 9:0.5\n0 1 3:1\nend 2\n")
        place = ["place", "--json", "--stats", trace, "--nodes", "2", "--ranks-per-node", "1", "--policy",
                 "contiguous"]
        default = self.document(*place)["costs"]
        narrow = self.document(*place, "--set", "model.hidden=512")["costs"]
        self.assertAlmostEqual(default["row_across_us"] / narrow["row_across_us"], 4)
        done = run(*place, env={"SLUICE_MODEL_HIDDEN": "512"})
        self.assertEqual(json.loads(done.stdout)["costs"], narrow)

    def test_sizes_beyond_the_machine(self):
        source = self.file("far.trace", "sluice-trace 2 layers 1 experts 16\n0 65535 1:1\nend 1\n")
        self.refused(["65536 ranks", "1024"], "plan", "--trace", source)
        text = self.file("t.txt", "the gate opens. " * 500)
        done = subprocess.run(["bash", "-c", 'ulimit -v 6000000; exec "$@"', "bash", PROGRAM, "train", "--text", text, "--set",
                               "runtime.log_level=error", "--set", "model.hidden=65536", "--set", "model.ffn=262144"],
                              capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertRegex(done.stderr, "^sluice error .*out of memory: .*smaller")
        self.assertNotIn("please report", done.stderr)

    def test_a_sequential_schedule_has_one_chunk(self):
        # schedule.num_chunks says nothing of it, however few tokens there are.
        text = self.file("t.txt", "the gate opens. " * 500)
        few = ["train", "--json", "--text", text, "--set", "train.steps=2", "--set", "train.tokens_per_step=3", "--set",
               "topology.ranks=2", "--set", "schedule.num_chunks=64", "--set", "runtime.log_level=error"]
        self.assertEqual(len(self.document(*few)["losses"]), 2)

    def test_names_that_json_must_escape(self):
        name = os.fsencode(os.path.join(self.dir.name, 'a"b\\')) + b"\xff.toml"
        with open(name, "wb") as file:
            file.write(b"[train]\nsteps = 3\n")
        done = subprocess.run([PROGRAM, "config", "--json", "--check", name], capture_output=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertTrue(json.loads(done.stdout)["valid"])
        with open(name, "w", encoding="utf-8") as file:
            file.write(TRACE)
        done = subprocess.run([PROGRAM, "plan", "--json", "--trace", name], capture_output=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(json.loads(done.stdout)["tokens"], 3)

    def test_full_disk(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full")
        with open("/dev/full", "w") as full:
            done = subprocess.run([PROGRAM, "info"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        self.assertEqual(done.returncode, 1)
        self.assertIn("standard output", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=1)
