#!/usr/bin/env python3
"""Sluice's grouped GEMMs against torch._grouped_mm and one dense torch.mm (cuBLAS) of the same FLOPs: one process, the same
tensors, arms in turns (and in the other order every second time), 256 MB written before each call, events around it,
medians and median absolute deviations.

Forward and dgrad write bf16 rows. torch's wgrad writes bf16 and adds to nothing, and so does the dense one; Sluice's adds to
fp32 gradients (wgrad) or writes them (wgrad_write, beside which torch runs once more). Every result of Sluice's is compared with torch's.

usage: torch_grouped_mm.py LIBRARY [--iterations N] [--date DATE] [--commit HASH]      prints one JSON document
  LIBRARY  libsluice_grouped_gemm.so of the build folder's benchmarks/cuda
"""
import argparse
import ctypes
import json
import statistics
import sys

import torch

SHAPES = [
    ("deepseek-v3", 8192 * 8, 32, 7168, 2048),
    ("qwen3-235b", 8192 * 8, 64, 4096, 1536),
    ("qwen3-30b", 16384 * 8, 64, 2048, 768),
    ("mixtral-8x7b", 8192 * 2, 4, 4096, 14336),
    ("olmoe", 16384 * 8, 32, 2048, 1024),
]


def load(path):
    function = ctypes.CDLL(path).sluice_grouped_gemm
    function.restype = ctypes.c_char_p
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    function.argtypes = [ctypes.c_char, pointer, i32, i64, i64, i64, pointer, pointer, pointer, pointer]

    def call(op, group_ptr, out, inner, first, rows, result):
        problem = function(op.encode(), group_ptr.data_ptr(), group_ptr.numel() - 1, rows.shape[0], out, inner,
                           first.data_ptr(), rows.data_ptr(), result.data_ptr(),
                           torch.cuda.current_stream().cuda_stream)
        if problem is not None:
            raise RuntimeError(problem.decode())

    return call


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--iterations", type=int, default=11)
    parser.add_argument("--date", default="")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    ours = load(arguments.library)
    torch.manual_seed(20260101)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def in_turns(arms):
        times = {name: [] for name in arms}
        for i in range(-2, arguments.iterations):
            for name in list(arms) if i % 2 == 0 else reversed(list(arms)):
                flush.fill_(i & 0xFF)
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                arms[name]()
                end.record()
                end.synchronize()
                if i >= 0:
                    times[name].append(begin.elapsed_time(end) * 1e3)
        return times

    rows_out = []
    for name, rows, groups, hidden, ffn in SHAPES:
        for zipf in (False, True):
            weights = torch.ones(groups)
            if zipf:
                weights = (1.0 / torch.arange(1, groups + 1))[torch.randperm(groups)]
            draws = torch.multinomial(weights, rows, replacement=True)
            counts = torch.bincount(draws, minlength=groups).cumsum(0)
            offsets = counts.to(torch.int32).cuda()
            group_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts]).cuda()
            for which, out, inner in (("gemm1", 2 * ffn, hidden), ("gemm2", hidden, ffn)):
                w = torch.randn(groups, out, inner, device="cuda", dtype=torch.bfloat16) * inner**-0.5
                a = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
                dc = torch.randn(rows, out, device="cuda", dtype=torch.bfloat16)
                h = torch.full((rows, out), float("nan"), device="cuda", dtype=torch.bfloat16)
                da = torch.full((rows, inner), float("nan"), device="cuda", dtype=torch.bfloat16)
                grads = torch.zeros(groups, out, inner, device="cuda")
                written = torch.full_like(grads, float("nan"))
                cases = {
                    "forward": (lambda: torch.mm(a, w[0].t()),
                                lambda: torch._grouped_mm(a, w.transpose(-2, -1), offs=offsets),
                                lambda: ours("f", group_ptr, out, inner, w, a, h), h),
                    "dgrad": (lambda: torch.mm(dc, w[0]),
                              lambda: torch._grouped_mm(dc, w, offs=offsets),
                              lambda: ours("d", group_ptr, out, inner, w, dc, da), da),
                    "wgrad": (lambda: torch.mm(dc.t(), a),
                              lambda: torch._grouped_mm(dc.t(), a, offs=offsets),
                              lambda: ours("w", group_ptr, out, inner, dc, a, grads), grads),
                    "wgrad_write": (lambda: torch.mm(dc.t(), a),
                                    lambda: torch._grouped_mm(dc.t(), a, offs=offsets),
                                    lambda: ours("o", group_ptr, out, inner, dc, a, written), written),
                }
                for op, (dense, theirs, mine, result) in cases.items():
                    mine()
                    expected = theirs().float()
                    # Both round a sum of the same products to bf16, in different orders.
                    error = ((result.float() - expected).abs().max() / expected.abs().max()).item()
                    if not error <= 2**-7:
                        sys.exit(f"{name}/{which} {op}: results differ from torch's by {error} of the largest")
                    del expected
                    times = in_turns({"dense": dense, "torch": theirs, "sluice": mine})
                    median = {arm: statistics.median(t) for arm, t in times.items()}
                    spread = {arm: statistics.median(abs(x - median[arm]) for x in t) for arm, t in times.items()}
                    row = {"shape": f"{name}/{which}", "case": f"{op}_{'zipf' if zipf else 'uniform'}"}
                    for arm in median:
                        row[f"{arm}_us"] = round(median[arm], 1)
                        row[f"{arm}_mad_us"] = round(spread[arm], 1)
                    row["torch_over_sluice"] = round(median["torch"] / median["sluice"], 3)
                    row["dense_over_sluice"] = round(median["dense"] / median["sluice"], 3)
                    rows_out.append(row)
                    print(row["shape"], row["case"], row["torch_over_sluice"], row["dense_over_sluice"],
                          file=sys.stderr, flush=True)
                del w, a, dc, h, da, grads, written
    print(json.dumps({"date": arguments.date, "commit": arguments.commit, "device": torch.cuda.get_device_name(),
                      "torch": torch.__version__, "iterations": arguments.iterations, "rows": rows_out}, indent=1))


if __name__ == "__main__":
    main()
