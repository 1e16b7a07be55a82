#!/usr/bin/env python3
"""The same training over threads and over MPI processes: the same losses, to the last bit; and how it ends badly."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM = sys.argv.pop(1)
SOURCE = sys.argv.pop(1)
MPIRUN = ["mpirun", "--oversubscribe"] + (["--allow-run-as-root"] if os.geteuid() == 0 else [])
TEXT = ["--set", "train.tokens_per_step=256", "--set", "model.ffn=32", "--text", os.path.join(SOURCE, "docs")]
SMALL = ["--set", "train.steps=6", "--set", "model.hidden=32", *TEXT]
# OpenMPI's shared memory uses process_vm_readv, which containers may forbid; it falls back with a warning.
ENV = {**os.environ, "OMPI_MCA_btl_vader_single_copy_mechanism": "none"}


def config(name):
    return ["--config", os.path.join(SOURCE, "configs", name)]


def run(command, timeout=120, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=ENV, **kwargs)


class Mpi(unittest.TestCase):
    def report(self, command):
        done = run(command)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def test_losses_are_those_of_threads_bit_for_bit(self):
        threads = self.report([PROGRAM, "train", *config("quickstart.toml"), *SMALL, "--json"])
        plain = self.report([*MPIRUN, "-n", "4", PROGRAM, "train", *config("mpi.toml"), *SMALL, "--json"])
        launched = self.report([PROGRAM, "launch", "--mpi", "-n", "4", "--", PROGRAM, "train", *config("mpi.toml"),
                                *SMALL, "--json"])
        self.assertEqual(len(threads["losses"]), 6)
        for other in (plain, launched):
            self.assertEqual(other["losses"], threads["losses"])
            self.assertEqual(other["heldout_bpb"], threads["heldout_bpb"])
            self.assertEqual(other["bytes"], threads["bytes"])

    def test_other_semantic_config_is_refused_on_every_rank(self):
        script = f'exec "{PROGRAM}" train "$@" --set model.hidden=$((32 + 16 * (OMPI_COMM_WORLD_RANK == 1)))'
        begin = time.time()
        done = run([*MPIRUN, "-n", "2", "bash", "-c", script, "bash", *config("mpi.toml"), *TEXT,
                    "--set", "topology.nodes=2x1"])
        self.assertNotEqual(done.returncode, 0)
        self.assertLess(time.time() - begin, 30)
        self.assertIn("model.hidden", done.stderr)
        self.assertIn("rank 1", done.stderr)
        self.assertEqual(done.stdout, "")

    def test_wrong_number_of_ranks(self):
        done = run([*MPIRUN, "-n", "3", PROGRAM, "train", *config("mpi.toml"), *SMALL])
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("3", done.stderr)
        self.assertIn("4", done.stderr)

    def test_a_stopped_rank_is_named(self):
        with tempfile.TemporaryDirectory() as folder:
            script = f'echo $$ > "{folder}/$OMPI_COMM_WORLD_RANK"; exec "{PROGRAM}" "$@"'
            job = subprocess.Popen([*MPIRUN, "-n", "4", "bash", "-c", script, "bash", "train", *config("mpi.toml"), *TEXT,
                                    "--set", "train.steps=100000", "--set", "comm.timeout_ms=1500"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
            try:
                deadline = time.time() + 60
                while len(os.listdir(folder)) < 4 and time.time() < deadline:
                    time.sleep(0.1)
                time.sleep(4)
                with open(os.path.join(folder, "2")) as f:
                    victim = int(f.read())
                os.kill(victim, signal.SIGSTOP)
                _, err = job.communicate(timeout=30)
            finally:
                if job.poll() is None:
                    job.kill()
                    job.wait()
            self.assertNotEqual(job.returncode, 0)
            self.assertIn("rank 2", err)


if __name__ == "__main__":
    if shutil.which("mpirun") is None:
        print("skipped: mpirun is not installed")
        sys.exit(77)
    unittest.main(verbosity=1)
