#!/usr/bin/env python3
"""A rank of a job of processes is killed; the others form a new group, go back to the newest checkpoint and end with the
losses, bit for bit, of an undisturbed job of their size that resumed from that checkpoint.

usage: shrink_test.py PROGRAM TRANSPORT [VICTIM]"""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

PROGRAM, TRANSPORT = os.path.abspath(sys.argv[1]), sys.argv[2]
VICTIM = int(sys.argv[3]) if len(sys.argv) > 3 else 1
RANKS = 3


def sets(*pairs):
    return [word for pair in pairs for word in ("--set", pair)]


def ranks_of(launcher):
    """rank -> pid of the launcher's children."""
    with open(f"/proc/{launcher}/task/{launcher}/children") as f:
        children = [int(pid) for pid in f.read().split()]
    out = {}
    for pid in children:
        try:
            with open(f"/proc/{pid}/environ", "rb") as f:
                for entry in f.read().split(b"\0"):
                    if entry.startswith(b"SLUICE_LAUNCH_RANK="):
                        out[int(entry.split(b"=")[1])] = pid
        except OSError:
            pass
    return out


def main():
    with tempfile.TemporaryDirectory() as root:
        text = os.path.join(root, "text.txt")
        with open(text, "w") as f:
            f.write("".join(f"the gate {i * 7919 % 1000} opens, the water flows.\n" for i in range(400)))
        folder = os.path.join(root, "ckpt")
        job = ["train", "--json", "--text", text] + sets(
            "model.hidden=32", "model.ffn=32", "train.tokens_per_step=256", "train.steps=600",
            "train.checkpoint_every=25", "train.checkpoint_keep=1000", "comm.timeout_ms=10000")
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            launch = subprocess.Popen(
                [PROGRAM, "launch", "--keep-going", "-n", str(RANKS), "--", PROGRAM, *job] +
                sets(f"comm.transport={TRANSPORT}", "train.on_failure=shrink", f"train.checkpoint_dir={folder}"),
                stdout=out, stderr=err)
            try:
                begin = time.monotonic()
                while not any(os.path.exists(os.path.join(folder, name, "manifest.sluice"))
                              for name in (os.listdir(folder) if os.path.isdir(folder) else [])):
                    assert launch.poll() is None and time.monotonic() < begin + 60, "no checkpoint was saved"
                    time.sleep(0.01)
                os.kill(ranks_of(launch.pid)[VICTIM], signal.SIGKILL)
                launch.wait(timeout=120)
            finally:
                if launch.poll() is None:
                    launch.terminate()
                    launch.wait()
                err.seek(0)
                errors = err.read().decode(errors="replace")
            out.seek(0)
            printed = out.read().decode()
        assert printed, errors
        report = json.loads(printed)
        assert len(report["recoveries"]) == 1, errors
        loss = report["recoveries"][0]
        assert loss["lost_rank"] == VICTIM and loss["ranks_before"] == RANKS, loss
        assert loss["ranks_after"] == RANKS - 1 and loss["phase"], loss
        assert report["world"]["ranks"] == RANKS - 1 and report["world"]["transport"] == TRANSPORT, report["world"]
        step = report["resumed_from"]
        assert step >= 25 and len(report["losses"]) == 600, step

        for name in os.listdir(folder):
            if int(name.split("-")[1]) > step:
                shutil.rmtree(os.path.join(folder, name))
        undisturbed = subprocess.run(
            [PROGRAM, *job, "--resume"] + sets(f"topology.ranks={RANKS - 1}", f"train.checkpoint_dir={folder}"),
            capture_output=True, text=True, timeout=120)
        assert undisturbed.returncode == 0, undisturbed.stderr
        other = json.loads(undisturbed.stdout)
        assert other["resumed_from"] == step
        assert report["losses"] == other["losses"], "the losses differ from an undisturbed job's"
        assert report["heldout_bpb"] == other["heldout_bpb"]
        print(f"rank {VICTIM} of {RANKS} killed over {TRANSPORT}; {RANKS - 1} went on from step {step} with the same bits")


if __name__ == "__main__":
    main()
