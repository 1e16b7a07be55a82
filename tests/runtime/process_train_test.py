#!/usr/bin/env python3
"""The same training over threads and over processes that find each other: the same losses, to the last bit, however they
were started; and how it ends badly."""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest

PROGRAM = sys.argv.pop(1)
SOURCE = sys.argv.pop(1)
TRANSPORTS = sys.argv.pop(1).split(",")
TEXT = ["--set", "train.tokens_per_step=256", "--set", "model.ffn=32", "--text", os.path.join(SOURCE, "docs")]
SMALL = ["--set", "train.steps=6", "--set", "model.hidden=32", *TEXT]
CONFIG = ["--config", os.path.join(SOURCE, "configs", "quickstart.toml")]
ENV = {k: v for k, v in os.environ.items() if not k.startswith("SLUICE_")}


def over(transport):
    return [*CONFIG, "--set", f"comm.transport={transport}"]


def run(command, timeout=120, env=None):
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env={**ENV, **(env or {})})


class Processes(unittest.TestCase):
    def report(self, command):
        done = run(command)
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def assert_same(self, other, threads):
        self.assertEqual(len(threads["losses"]), 6)
        self.assertEqual(other["losses"], threads["losses"])
        self.assertEqual(other["heldout_bpb"], threads["heldout_bpb"])
        self.assertEqual(other["bytes"], threads["bytes"])

    def test_losses_are_those_of_threads_bit_for_bit(self):
        threads = self.report([PROGRAM, "train", *CONFIG, *SMALL, "--json"])
        for transport in TRANSPORTS:
            with self.subTest(transport=transport):
                self.assert_same(self.report([PROGRAM, "launch", "-n", "4", "--", PROGRAM, "train", *over(transport), *SMALL,
                                              "--json"]), threads)

    def environments(self, variables):
        """Starts 4 ranks with the variables that a launcher sets, and returns what each said."""
        jobs = []
        for rank in range(4):
            env = {**ENV, **{k: v.replace("@", str(rank)) for k, v in variables.items()}}
            jobs.append(subprocess.Popen([PROGRAM, "train", *over(TRANSPORTS[0]), *SMALL, "--json"], env=env, text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return [(*job.communicate(timeout=60), job.returncode) for job in jobs]

    def test_environments_of_other_launchers(self):
        threads = self.report([PROGRAM, "train", *CONFIG, *SMALL, "--json"])
        here = f"test-{os.getpid()}"
        for name, variables in {
            "torchrun": {"RANK": "@", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
                         "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": here},
            "mpirun": {"OMPI_COMM_WORLD_RANK": "@", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
                       "PMIX_NAMESPACE": here},
            "srun": {"SLURM_PROCID": "@", "SLURM_NTASKS": "4", "SLURM_NNODES": "1", "SLURM_JOB_ID": here,
                     "SLURM_STEP_ID": "0"},
        }.items():
            with self.subTest(launcher=name):
                ended = self.environments(variables)
                self.assertEqual([code for _, _, code in ended], [0] * 4, ended)
                self.assert_same(json.loads(ended[0][0]), threads)
                self.assertEqual([out for out, _, _ in ended[1:]], [""] * 3)

    def test_processes_that_are_no_group_are_refused(self):
        """Each would do the whole job by itself and print a report of its own."""
        for words, sets in ((["comm.transport local", "2 processes", "comm.transport=shm"], []),
                            (["topology.ranks is 3", "2 processes"], [f"comm.transport={TRANSPORTS[0]}", "topology.ranks=3"])):
            done = run([PROGRAM, "launch", "-n", "2", "--", PROGRAM, "train", *SMALL, *[w for s in sets for w in ("--set", s)]])
            self.assertEqual((done.returncode, done.stdout), (1, ""), done.stderr)
            for word in words:
                self.assertIn(word, done.stderr)
        done = run([PROGRAM, "launch", "-n", "2", "--", PROGRAM, "bench", "--set", "comm.transport=mpi"])
        self.assertEqual((done.returncode, done.stdout), (1, ""), done.stderr)  # also where MPI is not installed
        # One process is a group of its own, and a plan is made by threads wherever it is asked for.
        self.report([PROGRAM, "launch", "-n", "1", "--", PROGRAM, "train", *SMALL, "--json"])
        trace = os.path.join(SOURCE, "examples", "routing.trace")
        self.assertEqual(run([PROGRAM, "launch", "-n", "2", "--", PROGRAM, "plan", "--trace", trace]).returncode, 0)

    def test_too_few_file_descriptors(self):
        """Whichever call is the first to get none, its error has the reason."""
        said = ""
        for limit in range(5, 10):
            done = run(["bash", "-c", f'ulimit -n {limit}; exec "$@"', "bash", PROGRAM, "launch", "-n", "2", "--", "true"])
            self.assertNotIn("Success", done.stderr)
            self.assertEqual(done.returncode, 1 if done.stderr else 0, done.stderr)
            said += done.stderr
        self.assertIn("pipe: Too many open files", said)

    def test_agreed_keys_are_those_of_rank_0(self):
        """Of bench as of train, and whatever a text has in it."""
        script = f'SLUICE_SCHEDULE_NUM_CHUNKS=$((SLUICE_LAUNCH_RANK + 2)) exec "{PROGRAM}" "$@"'
        many = ["--set", f"comm.transport={TRANSPORTS[0]}", "--set", "schedule.policy=pipelined", "--set",
                "machine.source=a data sheet\nof two lines \\n", "--json"]
        bench = ["bench", "--set", "bench.iterations=1", "--set", "bench.warmup=0", "--set", "bench.tokens_per_rank=64", "--set",
                 "model.hidden=32", "--set", "model.ffn=32"]
        report = self.report([PROGRAM, "launch", "-n", "2", "--", "bash", "-c", script, "bash", *bench, *many])
        self.assertEqual((report["ranks"], report["schedule"]["num_chunks"]), (2, 2))
        report = self.report([PROGRAM, "launch", "-n", "2", "--", "bash", "-c", script, "bash", "train", *SMALL, *many])
        self.assertEqual(len(report["losses"]), 6)

    def test_address_and_secret_file(self):
        threads = self.report([PROGRAM, "train", *CONFIG, *SMALL, "--json"])
        with tempfile.TemporaryDirectory() as folder:
            secret = os.path.join(folder, "secret")
            with open(secret, "w") as f:
                f.write("0123456789abcdef0123456789abcdef\n")
            os.chmod(secret, 0o644)
            launch = [PROGRAM, "launch", "-n", "4", "--rendezvous", "127.0.0.1:0", "--secret-file", secret, "--", PROGRAM,
                      "train", *over(TRANSPORTS[0]), *SMALL, "--json"]
            done = run(launch)
            self.assertEqual(done.returncode, 1)
            self.assertIn("chmod 600", done.stderr)
            os.chmod(secret, 0o600)
            self.assert_same(self.report(launch), threads)
            done = run([PROGRAM, "launch", "-n", "2", "--rendezvous", "0.0.0.0:0", "--", "true"])
            self.assertEqual(done.returncode, 1)
            self.assertIn("--secret-file", done.stderr)

    def test_the_secret_is_on_no_command_line_and_in_no_output(self):
        script = 'test -n "$SLUICE_LAUNCH_SECRET" && tr "\\0" "\\n" < /proc/$$/cmdline | grep -c "$SLUICE_LAUNCH_SECRET"'
        done = run([PROGRAM, "launch", "-n", "1", "--", "bash", "-c", script])
        self.assertEqual(done.stdout.strip(), "0", done.stderr)

    def test_other_semantic_config_is_refused_on_every_rank(self):
        script = f'exec "{PROGRAM}" train "$@" --set model.hidden=$((32 + 16 * (SLUICE_LAUNCH_RANK == 1)))'
        begin = time.time()
        done = run([PROGRAM, "launch", "-n", "2", "--grace", "5", "--", "bash", "-c", script, "bash",
                    *over(TRANSPORTS[0]), *TEXT, "--set", "topology.nodes=2x1"])
        self.assertEqual(done.returncode, 1)
        self.assertLess(time.time() - begin, 30)
        self.assertIn("model.hidden", done.stderr)
        self.assertIn("rank 1", done.stderr)
        self.assertEqual(done.stdout, "")

    def test_wrong_number_of_ranks(self):
        done = run([PROGRAM, "launch", "-n", "3", "--grace", "5", "--", PROGRAM, "train", *over(TRANSPORTS[0]), *SMALL])
        self.assertEqual(done.returncode, 1)
        self.assertIn("3", done.stderr)
        self.assertIn("4", done.stderr)

    def test_no_launcher(self):
        done = run([PROGRAM, "train", *over(TRANSPORTS[0]), *SMALL])
        self.assertEqual(done.returncode, 1)
        self.assertIn("sluice launch", done.stderr)

    def test_a_program_that_is_not_there(self):
        done = run([PROGRAM, "launch", "-n", "2", "--", "/no/such/program"])
        self.assertEqual(done.returncode, 1)
        self.assertIn("/no/such/program", done.stderr)

    def fault(self, how, transport):
        """Hits rank 2 of a long training by a signal; what the job said and how long it took."""
        with tempfile.TemporaryDirectory() as folder:
            script = f'echo $$ > "{folder}/$SLUICE_LAUNCH_RANK"; exec "{PROGRAM}" "$@"'
            job = subprocess.Popen([PROGRAM, "launch", "-n", "4", "--grace", "5", "--", "bash", "-c", script, "bash", "train",
                                    *over(transport), *TEXT, "--set", "train.steps=1000000",
                                    "--set", "comm.timeout_ms=1500"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
            try:
                time.sleep(4)
                with open(os.path.join(folder, "2")) as f:
                    victim = int(f.read())
                os.kill(victim, how)
                begin = time.time()
                _, err = job.communicate(timeout=40)
            finally:
                if job.poll() is None:
                    job.kill()
                    job.wait()
        self.assertEqual(job.returncode, 1, err)
        for rank in (0, 1, 3):
            said = [line for line in err.splitlines() if f"error rank {rank} " in line]
            self.assertTrue(any("rank 2" in line for line in said), f"rank {rank} did not blame rank 2: {err}")
        return err, time.time() - begin

    def test_a_killed_rank_is_named_at_once(self):
        for transport in TRANSPORTS:
            with self.subTest(transport=transport):
                err, took = self.fault(signal.SIGKILL, transport)
                self.assertIn("rank 2 (pid", err)
                self.assertIn("signal 9", err)
                self.assertIn("died", err)
                self.assertLess(took, 6)

    def test_survivors_go_on_by_themselves(self):
        script = ('if [ "$SLUICE_LAUNCH_RANK" = 2 ]; then (while [ ! -e "$FOLDER"/*10/manifest.sluice ]; do sleep 0.05; done; '
                  'kill -9 $$) & fi; exec "$@"')
        for transport in TRANSPORTS:
            with self.subTest(transport=transport), tempfile.TemporaryDirectory() as folder:
                done = run([PROGRAM, "launch", "-n", "4", "--keep-going", "--", "bash", "-c", script, "bash", PROGRAM, "train",
                            *over(transport), *TEXT, "--set", "model.hidden=32", "--set", "train.steps=200",
                            "--set", "train.checkpoint_every=10", "--set", f"train.checkpoint_dir={folder}",
                            "--set", "train.on_failure=shrink", "--json"], env={"FOLDER": folder})
                self.assertEqual(done.returncode, 0, done.stderr)
                report = json.loads(done.stdout)
                self.assertEqual(len(report["losses"]), 200)
                self.assertEqual([(r["lost_rank"], r["ranks_before"], r["ranks_after"]) for r in report["recoveries"]],
                                 [(2, 4, 3)])

    def test_a_stopped_rank_is_named(self):
        for transport in TRANSPORTS:
            with self.subTest(transport=transport):
                self.assertIn("does not answer", self.fault(signal.SIGSTOP, transport)[0])


if __name__ == "__main__":
    unittest.main(verbosity=1)
