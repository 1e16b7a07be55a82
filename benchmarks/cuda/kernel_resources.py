#!/usr/bin/env python3
"""Registers, shared memory and spills of the kernels in CUDA objects or programs, as a Markdown table.

usage: kernel_resources.py FILE...        needs cuobjdump and c++filt on the PATH; the newest architecture of each file

Instances of one template share a line: the least and the most. Spills show as stack (bytes of local memory a thread).
Dynamic shared memory is not in the file: of the Hopper GEMM it is kSharedBytes of grouped_gemm_impl.cuh.
"""
import collections
import re
import subprocess
import sys


def resources(path):
    text = subprocess.run(["cuobjdump", "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    arch, found = 0, {}
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            values = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            found.setdefault(name, []).append((arch, values))
    return {name: max(of, key=lambda a: a[0]) for name, of in found.items()}


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    kernels = {}
    for path in sys.argv[1:]:
        kernels.update(resources(path))
    names = subprocess.run(["c++filt"], input="\n".join(kernels), check=True, capture_output=True, text=True).stdout
    lines = collections.defaultdict(list)
    for full, (arch, values) in zip(names.splitlines(), kernels.values()):
        match = re.search(r"(?:(fp32|portable)::)?(?:\(anonymous namespace\)::)?(\w+)(?:<.*>)?\(", full)
        if match:
            lines["::".join(filter(None, match.groups())), arch].append(values)

    def span(of, key):
        least, most = min(v[key] for v in of), max(v[key] for v in of)
        return str(least) if least == most else f"{least} to {most}"

    print("| kernel | code | instances | registers | static shared memory, bytes | stack, bytes |\n|---|---|---|---|---|---|")
    for (name, arch), of in sorted(lines.items()):
        print(f"| {name} | sm_{arch} | {len(of)} | {span(of, 'REG')} | {span(of, 'SHARED')} | {span(of, 'STACK')} |")


if __name__ == "__main__":
    main()
