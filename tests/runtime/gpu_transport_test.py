#!/usr/bin/env python3
"""bench and train with rows that stay on GPUs: one rank, two ranks over nvlink and nccl, and how they fail. What needs more
GPUs than there are is skipped, and all of it without a GPU (exit status 77).

usage: gpu_transport_test.py PROGRAM SOURCE gpu|multi-gpu"""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM, SOURCE, KIND = sys.argv[1:4]
del sys.argv[1:4]
ENV = {k: v for k, v in os.environ.items() if not k.startswith("SLUICE_") or k == "SLUICE_NCCL_LIBRARY"}
BF16 = ["--set", "model.dtype=bf16"]
BENCH = ["bench", "--json", "--device", "cuda", "--set", "bench.iterations=3", "--set", "bench.warmup=1", "--set",
         "bench.tokens_per_rank=300", "--set", "model.hidden=136", "--set", "model.ffn=72", "--set", "bench.skew=1"]
HIERARCHICAL = ["--set", "schedule.policy=hierarchical"]
TRAIN = ["train", "--json", "--config", os.path.join(SOURCE, "configs", "quickstart.toml"), "--text", os.path.join(SOURCE, "docs"),
         "--set", "train.steps=12", "--set", "train.tokens_per_step=512", "--set", "topology.nodes=0", "--set",
         "topology.ranks=0", "--set", "schedule.policy=sequential", "--set", "runtime.log_level=error", *BF16]


def run(*command, env=None, timeout=100):
    return subprocess.run([PROGRAM, *command], capture_output=True, text=True, timeout=timeout, env={**ENV, **(env or {})})


def changed(job, *pairs):
    """The command with these settings, in the place of its own of the same keys."""
    job = list(job)
    for pair in pairs:
        same = [i for i, word in enumerate(job) if word.startswith(pair.split("=")[0] + "=")]
        if same:
            job[same[0]] = pair
        else:
            job += ["--set", pair]
    return job


INFO = json.loads(run("info", "--json").stdout)
USABLE = [t["name"] for t in INFO["transports"] if t["name"] in ("nvlink", "nccl") and t["usable"]]


class Gpus(unittest.TestCase):
    def document(self, *command, **more):
        done = run(*command, **more)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def launched(self, ranks, *command, **more):
        return self.document("launch", "-n", str(ranks), "--", PROGRAM, *command, **more)

    def assert_checked(self, report):
        self.assertEqual(report["rows"], "device", report.get("rows_because"))
        check = report["check"]
        self.assertGreater(check["tokens"], 0)
        for key in ("y_error", "dx_error", "dweight_error", "gradient_error"):
            self.assertTrue(0 <= check[key] <= check["tolerance"] <= 0.02, report)
        for key in ("forward_us", "backward_us", "plan_us", "exchange_alone_us", "gemms_alone_us", "local_work_us"):
            self.assertGreater(report[key]["median"], 0)
        self.assertGreater(report["dense_gemm_us"]["forward"], 0)
        self.assertGreater(report["to_dense_gemm"]["forward"], 0)


class OneGpu(Gpus):
    def test_bench(self):
        for activation in ("swiglu", "gelu", "relu"):
            for policy in ("sequential", "auto"):
                report = self.document(*BENCH, *BF16, "--set", f"model.activation={activation}", "--set",
                                       f"schedule.policy={policy}")
                self.assert_checked(report)
                self.assertEqual((report["ranks"], report["link"]), (1, "none"))
                self.assertEqual(report["bytes"], {"in_node": 0, "across_nodes": 0})
        overlapped = self.document(*BENCH, *BF16, "--set", "schedule.policy=by-source", "--set", "schedule.num_chunks=1")
        self.assert_checked(overlapped)
        self.assertEqual(overlapped["schedule"]["policy"], "by-source")

    def test_what_the_gpu_layer_does_not_do_passes_the_host(self):
        for why, sets in (("bf16", ["model.dtype=f32"]), ("runtime.save", ["model.dtype=bf16", "runtime.save=rows"]),
                          ("chunks", ["model.dtype=bf16", "schedule.policy=pipelined"]),
                          ("zero", ["model.dtype=bf16", "model.zero_experts=1"]),
                          ("shm|local", ["model.dtype=bf16", "topology.ranks=2"])):
            report = self.document(*BENCH, *[word for s in sets for word in ("--set", s)])
            self.assertEqual(report["rows"], "host")
            self.assertRegex(report["rows_because"], why)

    def test_two_ranks_that_share_a_gpu_are_refused(self):
        for link in USABLE:
            done = run("launch", "-n", "2", "--", PROGRAM, *BENCH, *BF16, "--set", f"comm.transport={link}",
                       env={"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]})
            self.assertEqual(done.returncode, 1, done.stdout)
            self.assertIn("share one GPU", done.stderr)


class TwoGpus(Gpus):
    def ranks_of(self, launcher):
        """rank -> pid of the launcher's children."""
        with open(f"/proc/{launcher.pid}/task/{launcher.pid}/children") as f:
            children = [int(pid) for pid in f.read().split()]
        out = {}
        for pid in children:
            with open(f"/proc/{pid}/environ", "rb") as f:
                for entry in f.read().split(b"\0"):
                    if entry.startswith(b"SLUICE_LAUNCH_RANK="):
                        out[int(entry.split(b"=")[1])] = pid
        return out

    def need_nccl(self):
        if "nccl" not in USABLE:
            self.skipTest("NCCL cannot be loaded")

    def kill_one(self, link, *sets):
        # The deadline is longer than the launcher's patience with survivors: they hear of the loss from their host.
        endless = [word.replace("iterations=3", "iterations=1000000") for word in BENCH]
        job = subprocess.Popen([PROGRAM, "launch", "-n", "2", "--", PROGRAM, *endless, *BF16, "--set", f"comm.transport={link}",
                                *sets], env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(8)
        self.assertIsNone(job.poll(), job.poll() and job.communicate()[1])
        began = time.monotonic()
        os.kill(self.ranks_of(job)[1], signal.SIGKILL)
        out, err = job.communicate(timeout=40)
        self.assertEqual((job.returncode, out), (1, ""), err)
        self.assertRegex(err, "error rank 0 [^\n]*rank 1")  # the survivor says who was lost
        print(f"{link} {' '.join(sets)}: ended after {time.monotonic() - began:.1f} s: {err.strip()}", file=sys.stderr)

    def test_bench_is_the_same_over_both_links(self):
        reports = {}
        for link in USABLE:
            for policy in ("sequential", "by-source"):
                report = self.launched(2, *BENCH, *BF16, "--set", f"comm.transport={link}", "--set",
                                       f"schedule.policy={policy}", "--set", "schedule.num_chunks=1")
                self.assert_checked(report)
                self.assertEqual((report["ranks"], report["link"]), (2, link))
                self.assertGreater(report["bytes"]["in_node"], 0)
                reports[link, policy] = report
        bits = {(r["check"]["y_bits"], r["check"]["dx_bits"]) for r in reports.values()}
        self.assertEqual(len(bits), 1, {k: r["check"] for k, r in reports.items()})

    def test_nodes_may_be_declared(self):
        for link in USABLE:
            report = self.launched(2, *BENCH, *BF16, "--set", f"comm.transport={link}", "--set", "topology.nodes=2x1")
            self.assert_checked(report)
            self.assertGreater(report["bytes"]["across_nodes"], 0)

    def test_hierarchical_is_two_hops_between_nodes(self):
        self.need_nccl()
        nodes = ["--set", "comm.transport=nccl", "--set", "topology.nodes=2x1"]
        one_hop = self.launched(2, *BENCH, *BF16, *nodes, "--set", "schedule.policy=sequential")
        for chunks in (1, 3):
            report = self.launched(2, *BENCH, *BF16, *nodes, *HIERARCHICAL, "--set", f"schedule.num_chunks={chunks}")
            self.assert_checked(report)
            schedule = report["schedule"]
            self.assertEqual((schedule["policy"], schedule["exchange"], schedule["num_chunks"]), ("hierarchical", "gateway", chunks))
            # Nodes of one rank: no more is rounded, and the same rows cross.
            for key in ("y_bits", "dx_bits"):
                self.assertEqual(report["check"][key], one_hop["check"][key])
            self.assertEqual(report["bytes"], one_hop["bytes"])
            self.assertGreater(report["bytes"]["across_nodes"], 0)
        # Without a second rank a node, and without a second node, there is one hop.
        for sets in (["--set", "schedule.policy=auto", *nodes], [*HIERARCHICAL, "--set", "comm.transport=nccl"]):
            report = self.launched(2, *BENCH, *BF16, *sets)
            self.assert_checked(report)
            self.assertEqual((report["schedule"]["policy"], report["schedule"]["exchange"]), ("by-source", "direct"))

    def test_training_with_two_hops_is_that_with_one_within_rounding(self):
        self.need_nccl()
        job = changed([*TRAIN, "--device", "cuda"], "comm.transport=nccl", "topology.nodes=2x1")
        one_hop = self.launched(2, *job)
        for chunks in (1, 3):
            two_hops = self.launched(2, *changed(job, "schedule.policy=hierarchical", f"schedule.num_chunks={chunks}"))
            self.assertEqual(len(two_hops["losses"]), 12)
            self.assertEqual(two_hops["losses"][0], one_hop["losses"][0])  # sums of nodes of one rank have the same bits
            for step, (a, b) in enumerate(zip([*one_hop["losses"], one_hop["heldout_bpb"]],
                                              [*two_hops["losses"], two_hops["heldout_bpb"]])):
                self.assertTrue(abs(a - b) <= 0.01 * abs(a), f"{chunks} chunks, step {step}: {a} with one hop, {b} with two")
            print(f"bits per byte: one hop {one_hop['heldout_bpb']:.5f}, two hops in {chunks} {two_hops['heldout_bpb']:.5f}",
                  file=sys.stderr)

    def test_two_nodes_of_two(self):
        self.need_nccl()
        if INFO["gpus"] < 4:
            self.skipTest(f"4 GPUs are needed, this process sees {INFO['gpus']}")
        nodes = ["--set", "comm.transport=nccl", "--set", "topology.nodes=2x2"]
        one_hop = self.launched(4, *BENCH, *BF16, *nodes, "--set", "schedule.policy=sequential")
        for sets in (["--set", "schedule.policy=auto"], [*HIERARCHICAL, "--set", "schedule.num_chunks=3"]):
            report = self.launched(4, *BENCH, *BF16, *nodes, *sets)
            self.assert_checked(report)
            self.assertEqual(report["schedule"]["policy"], "hierarchical")
            # A row crosses to a node once, not once a rank.
            self.assertLess(report["bytes"]["across_nodes"], one_hop["bytes"]["across_nodes"])
        job = changed([*TRAIN, "--device", "cuda"], "comm.transport=nccl", "topology.nodes=2x2")
        one_hop, two_hops = self.launched(4, *job), self.launched(4, *changed(job, "schedule.policy=auto"))
        for step, (a, b) in enumerate(zip(one_hop["losses"], two_hops["losses"])):
            self.assertTrue(abs(a - b) <= 0.02 * abs(a), f"step {step}: {a} with one hop, {b} with two")

    def test_a_rank_that_dies_between_two_hops_is_told(self):
        self.need_nccl()
        self.kill_one("nccl", "--set", "topology.nodes=2x1", *HIERARCHICAL, "--set", "schedule.num_chunks=3")

    def test_training_is_the_cpus_within_rounding(self):
        for sets in ([], ["--set", "model.zero_experts=1", "--set", "model.copy_experts=1", "--set",
                          "model.constant_experts=1"]):
            cpu = self.launched(2, *TRAIN, *sets, "--set", "comm.transport=shm")
            runs = {link: self.launched(2, *TRAIN, *sets, "--device", "cuda", "--set", f"comm.transport={link}")
                    for link in USABLE}
            for link, gpu in runs.items():
                self.assertEqual(len(gpu["losses"]), 12)
                for step, (a, b) in enumerate(zip([*cpu["losses"], cpu["heldout_bpb"]], [*gpu["losses"], gpu["heldout_bpb"]])):
                    self.assertTrue(abs(a - b) <= 0.02 * abs(a), f"{link} step {step}: {a} on the CPU, {b} on GPUs")
                self.assertEqual(gpu["losses"], runs[USABLE[0]]["losses"])
            print(f"bits per byte: cpu {cpu['heldout_bpb']:.4f}, "
                  + ", ".join(f"{link} {gpu['heldout_bpb']:.4f}" for link, gpu in runs.items()), file=sys.stderr)

    def test_a_rank_that_dies_is_told_and_nobody_hangs(self):
        for link in USABLE:
            self.kill_one(link)

    def survive_one(self, link, *pairs):
        with tempfile.TemporaryDirectory() as root:
            folder = os.path.join(root, "ckpt")
            job = changed([*TRAIN, "--device", "cuda"], "train.steps=400", f"comm.transport={link}", "comm.timeout_ms=5000",
                          "train.on_failure=shrink", "train.checkpoint_every=25", "train.checkpoint_keep=1000",
                          f"train.checkpoint_dir={folder}", *pairs)
            launch = subprocess.Popen([PROGRAM, "launch", "--keep-going", "-n", "2", "--", PROGRAM, *job], env=ENV, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            end = time.monotonic() + 40
            while not os.path.exists(os.path.join(folder, "step-0000000025", "manifest.sluice")):
                self.assertTrue(launch.poll() is None and time.monotonic() < end, launch.poll() and launch.communicate()[1])
                time.sleep(0.01)
            began = time.monotonic()
            os.kill(self.ranks_of(launch)[1], signal.SIGKILL)
            out, err = launch.communicate(timeout=60)
            self.assertEqual(launch.returncode, 0, err)
            report = json.loads(out)
            self.assertEqual(len(report["recoveries"]), 1, err)
            self.assertEqual(report["recoveries"][0]["lost_rank"], 1)
            self.assertEqual((report["world"]["ranks"], report["world"]["transport"]), (1, link))
            print(f"{link} {' '.join(pairs)}: done {time.monotonic() - began:.1f} s after the loss: {report['recoveries'][0]}",
                  file=sys.stderr)
            step = report["resumed_from"]
            self.assertGreaterEqual(step, 25)
            for name in os.listdir(folder):
                if int(name.split("-")[1]) > step:
                    shutil.rmtree(os.path.join(folder, name))
            undisturbed = self.launched(1, *changed(job, "topology.nodes=0"), "--resume")
            self.assertEqual(undisturbed["resumed_from"], step)
            self.assertEqual(report["losses"], undisturbed["losses"])

    def test_the_survivor_of_a_killed_rank_goes_on_alone(self):
        for link in USABLE:
            with self.subTest(link=link):
                self.survive_one(link)

    def test_the_survivor_of_two_hops_goes_on_with_one(self):
        self.need_nccl()
        self.survive_one("nccl", "topology.nodes=2x1", "schedule.policy=hierarchical")


if __name__ == "__main__":
    needed = 2 if KIND == "multi-gpu" else 1
    if INFO["gpus"] < needed or not USABLE:
        print(f"skipped: {needed} GPUs are needed, this process sees {INFO['gpus']}")
        sys.exit(77)
    unittest.main(defaultTest="TwoGpus" if KIND == "multi-gpu" else "OneGpu")
