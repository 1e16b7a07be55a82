#!/usr/bin/env python3
"""torch._grouped_mm on the shapes of grouped_gemm_cuda_benchmark, timed alike: 256 MB written before each call, events
around it, median and median absolute deviation. Group sizes are drawn from the same distributions (not the same draws).
Forward and dgrad write bf16 rows; wgrad writes bf16 and adds to nothing, so it does less than Sluice's.

usage: torch_grouped_mm.py [--iterations N]      prints one JSON document
"""
import argparse
import json
import statistics

import torch

SHAPES = [
    ("deepseek-v3", 8192 * 8, 32, 7168, 2048),
    ("qwen3-235b", 8192 * 8, 64, 4096, 1536),
    ("qwen3-30b", 16384 * 8, 64, 2048, 768),
    ("mixtral-8x7b", 8192 * 2, 4, 4096, 14336),
    ("olmoe", 16384 * 8, 32, 2048, 1024),
]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=15)
    iterations = parser.parse_args().iterations
    torch.manual_seed(20260101)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def timed(call):
        times = []
        for i in range(-2, iterations):
            flush.fill_(i & 0xFF)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            if i >= 0:
                times.append(begin.elapsed_time(end) * 1e3)
        median = statistics.median(times)
        return median, statistics.median(abs(t - median) for t in times)

    rows_out = []
    for name, rows, groups, hidden, ffn in SHAPES:
        for zipf in (False, True):
            weights = torch.ones(groups)
            if zipf:
                weights = (1.0 / torch.arange(1, groups + 1))[torch.randperm(groups)]
            draws = torch.multinomial(weights, rows, replacement=True)
            offsets = torch.bincount(draws, minlength=groups).cumsum(0).to(torch.int32).cuda()
            for which, out, inner in (("gemm1", 2 * ffn, hidden), ("gemm2", hidden, ffn)):
                w = torch.randn(groups, out, inner, device="cuda", dtype=torch.bfloat16) * inner**-0.5
                a = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
                dc = torch.randn(rows, out, device="cuda", dtype=torch.bfloat16)
                calls = {
                    "forward": lambda: torch._grouped_mm(a, w.transpose(-2, -1), offs=offsets),
                    "dgrad": lambda: torch._grouped_mm(dc, w, offs=offsets),
                    "wgrad_bf16": lambda: torch._grouped_mm(dc.t(), a, offs=offsets),
                }
                for op, call in calls.items():
                    median, mad = timed(call)
                    rows_out.append({
                        "shape": f"{name}/{which}",
                        "case": f"torch_grouped_mm_{op}_{'zipf' if zipf else 'uniform'}",
                        "median_us": round(median, 1),
                        "mad_us": round(mad, 1),
                        "tflop_per_s": round(2e-6 * rows * out * inner / median, 1),
                    })
                del w, a, dc
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "iterations": iterations,
                      "rows": rows_out}, indent=1))


if __name__ == "__main__":
    main()
