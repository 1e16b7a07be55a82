"""The layering check must find what it is for: each planted fault gives its line, and a clean tree gives none."""
import pathlib
import subprocess
import sys
import tempfile

CHECK = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "layering_check.py"
CLEAN = {
    "base/a.hpp": "#pragma once\n#include <vector>\n",
    "base/a.cpp": '#include "sluice/base/a.hpp"\n',
    "scheduler/s.hpp": '#include "sluice/base/a.hpp"\n',
    "comm/t.hpp": '#include "sluice/base/a.hpp"\n',
    "comm/device/d.hpp": "",
    "kernels/k.hpp": '#include "sluice/base/a.hpp"\n#include "sluice/comm/device/d.hpp"\n',
    "runtime/r.cpp": '#include "sluice/comm/t.hpp"\n#include "sluice/kernels/k.hpp"\n#include "sluice/sluice.hpp"\n',
    "runtime/include/sluice/sluice.hpp": '#include "sluice/scheduler/s.hpp"\n',
    "tests/base/t.cpp": '#include "sluice/base/a.hpp"\n#include "helper.hpp"\n',
}


def run(files):
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            path = pathlib.Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        (pathlib.Path(folder) / "runtime").mkdir(exist_ok=True)
        result = subprocess.run([sys.executable, str(CHECK), folder], capture_output=True, text=True, check=False)
        return result.returncode, result.stdout


def expect(what, changes, line):
    """`line`: how the only problem begins, or None for no problem."""
    status, output = run({**CLEAN, **changes})
    lines = output.splitlines()
    good = (status, lines) == (0, []) if line is None else status == 1 and len(lines) == 1 and lines[0].startswith(line)
    if not good:
        sys.exit(f"{what}: expected {line!r}, got status {status} and\n{output}")


expect("clean tree", {}, None)
for room, other in [("base", "comm/t.hpp"), ("scheduler", "comm/t.hpp"), ("comm", "scheduler/s.hpp"),
                    ("kernels", "comm/t.hpp"), ("kernels", "scheduler/s.hpp"), ("scheduler", "sluice.hpp"),
                    ("comm", "kernels/k.hpp")]:
    expect(f"{room} -> {other}", {f"{room}/bad.cpp": f'\n#include "sluice/{other}"\n'},
           f"{room}/bad.cpp:2: {room} includes sluice/{other}; it may include only {room}")
expect("angle brackets", {"base/bad.cpp": "#include <sluice/comm/t.hpp>\n"}, "base/bad.cpp:1: base includes")
expect("spaces", {"base/bad.cpp": '  #  include   "sluice/comm/t.hpp"\n'}, "base/bad.cpp:1: base includes")
expect("device code", {"kernels/cuda/bad.cu": '#include "sluice/runtime/r.cpp"\n'}, "kernels/cuda/bad.cu:1: kernels")
expect("relative", {"base/bad.cpp": '#include "a.hpp"\n'}, 'base/bad.cpp:1: "a.hpp" must be written')
expect("no such file", {"base/bad.cpp": '#include "sluice/base/none.hpp"\n'}, "base/bad.cpp:1: sluice/base/none.hpp is no")
expect("comments do not count", {"base/ok.cpp": '// #include "sluice/comm/t.hpp"\n/*\n#include "sluice/comm/t.hpp"\n*/\n'},
       None)
expect("cycle", {"base/x.hpp": '#include "sluice/base/y.hpp"\n', "base/y.hpp": '#include "sluice/base/z.hpp"\n',
                 "base/z.hpp": '\n#include "sluice/base/x.hpp"\n'},
       "base/z.hpp:2: include cycle: base/x.hpp -> base/y.hpp -> base/z.hpp -> base/x.hpp")
expect("self", {"base/x.hpp": '#include "sluice/base/x.hpp"\n'}, "base/x.hpp:1: include cycle: base/x.hpp -> base/x.hpp")
status, output = run({})
if status != 1 or "no sources" not in output:
    sys.exit(f"an empty tree must be a problem, got status {status} and\n{output}")
