#!/usr/bin/env python3
"""Sluice from Python with ctypes and NumPy alone: libsluice.so, no binding, no compiler.

usage: numpy_layer.py [PATH OF libsluice.so]

Four ranks are threads of this process and play two nodes. Shown and checked against a dense NumPy reference:
  1. a layer with two micro-batches in flight, whose backward passes run in the other order
  2. the dispatcher with experts written in NumPy, in both layouts of rows, forward and backward
"""
import ctypes
import pathlib
import sys
import threading

try:
    import numpy as np
except ImportError:
    print("skipped: this Python has no NumPy")
    sys.exit(77)

RANKS, NODES, EXPERTS, HIDDEN, FFN = 4, 2, 7, 16, 24
TOKENS = [11, 0, 19, 5]  # of each rank: ranks need not have as many, or any

# ---- the C interface, as far as it is used here: include/sluice/sluice.h ------------------------------------------------

i32, i64, u8, f32, ptr, size = (ctypes.c_int32, ctypes.c_int64, ctypes.c_uint8, ctypes.c_float, ctypes.c_void_p,
                                ctypes.c_size_t)


class Versioned(ctypes.Structure):
    """A structure that begins with its size; what is not given is zero, its default."""

    def __init__(self, **members):
        super().__init__(struct_size=ctypes.sizeof(self), **members)


class Matrix(ctypes.Structure):
    _fields_ = [("data", ptr), ("rows", i64), ("cols", i64), ("row_stride", i64), ("dtype", i32), ("reserved", i32)]


class Topology(Versioned):
    _fields_ = [("struct_size", size), ("num_ranks", i32), ("num_nodes", i32), ("node_of_rank", ptr),
                ("in_node_bytes_per_s", ctypes.c_double), ("across_nodes_bytes_per_s", ctypes.c_double),
                ("in_node_latency_ns", i64), ("across_nodes_latency_ns", i64)]


class Placement(Versioned):
    _fields_ = [("struct_size", size), ("num_experts", i32), ("num_slots", i32), ("slot_expert", ptr),
                ("slot_rank", ptr), ("slot_local_index", ptr), ("expert_kind", ptr), ("version", ctypes.c_uint64)]


class Routing(Versioned):
    CSR, TOP_K, MULTI_HOT = range(3)
    _fields_ = [("struct_size", size), ("format", i32), ("k", i32), ("num_tokens", i64), ("num_weights", i64),
                ("row_ptr", ptr), ("expert", ptr), ("map", ptr), ("weight", ptr)]


class Received(Versioned):
    _fields_ = [("struct_size", size), ("num_rows", i64), ("num_routes", i64), ("source_ptr", ptr), ("token", ptr),
                ("route_ptr", ptr), ("slot", ptr), ("weight", ptr), ("position_of_route", ptr)]


class LayerOptions(Versioned):
    _fields_ = [("struct_size", size), ("hidden", i64), ("ffn", i64)] + [
        (name, i32) for name in ("activation", "dtype", "wire_dtype", "combine_dtype", "save", "schedule", "exchange",
                                 "num_chunks")]


class DispatcherOptions(Versioned):
    RANK_ROWS, EXPERT_ROWS = range(2)
    _fields_ = [("struct_size", size), ("hidden", i64), ("alignment", i64)] + [
        (name, i32) for name in ("dtype", "wire_dtype", "combine_dtype", "layout", "exchange", "reserved")]


class ExpertWeights(Versioned):
    _fields_ = [("struct_size", size), ("w1", Matrix), ("w2", Matrix), ("grad_w1", ptr), ("grad_w2", ptr)]


def load(path):
    lib = ctypes.CDLL(path)
    for name in ("sluice_version", "sluice_status_name", "sluice_last_error_message"):
        getattr(lib, name).restype = ctypes.c_char_p
    out, ref = ctypes.POINTER(ptr), ctypes.c_void_p
    functions = {
        "group_create_local": [ref, ref, out],
        "group_take_runtime": [ptr, i32, out],
        "runtime_abort": [ptr, ctypes.c_char_p],
        "layer_create": [ptr, ref, ref, out],
        "layer_set_weights": [ptr, ref, i32],
        "layer_plan": [ptr, ref, ptr, out],
        "layer_forward": [ptr, ptr, ref, ref, ptr, out],
        "layer_backward": [ptr, ptr, ref, ref, ptr, i64, ptr],
        "dispatcher_create": [ptr, ref, ref, out],
        "dispatcher_plan": [ptr, ref, ptr, out],
        "dispatcher_dispatch": [ptr, ptr, ref, ptr, out],
        "dispatcher_rows": [ptr, ptr, ref],
        "dispatcher_layout": [ptr, ptr, out, out],
        "dispatcher_combine": [ptr, ptr, ref, ref, ptr],
        "dispatcher_combine_backward": [ptr, ptr, ref, ref, ptr],
        "dispatcher_dispatch_backward": [ptr, ptr, ref, ptr, i64, ref, ptr, i64, ptr],
        "plan_get_received": [ptr, ref],
        "plan_explain": [ptr, i64, ptr, size, ptr],
    }
    for name, argtypes in functions.items():
        function = getattr(lib, "sluice_" + name)
        function.argtypes, function.restype = argtypes, i32
    for name in ("group", "runtime", "layer", "dispatcher", "plan", "context"):
        function = getattr(lib, f"sluice_{name}_destroy")
        function.argtypes, function.restype = [ptr], None
    return lib


class Api:
    """Calls that raise when they fail, and handles that are destroyed when nothing refers to them any more."""

    def __init__(self, path):
        self.lib = load(path)

    def call(self, name, *arguments):
        status = getattr(self.lib, "sluice_" + name)(
            *[ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments])
        if status != 0:
            kind = self.lib.sluice_status_name(status).decode()
            raise RuntimeError(f"{name}: {kind}: {self.lib.sluice_last_error_message().decode()}")

    def make(self, kind, name, *arguments):
        handle = ptr()
        self.call(name, *arguments, ctypes.byref(handle))
        return Handle(self.lib, kind, handle)


class Handle:
    def __init__(self, lib, kind, handle):
        self._as_parameter_ = handle
        self._destroy = getattr(lib, f"sluice_{kind}_destroy")

    def destroy(self):
        if self._as_parameter_:
            self._destroy(self._as_parameter_)
            self._as_parameter_ = ptr()

    __del__ = destroy


def address(array):
    assert array is None or array.flags.c_contiguous
    return None if array is None else array.ctypes.data


def matrix(array):
    assert array.dtype == np.float32 and array.ndim == 2
    return Matrix(address(array), *array.shape, 0, 0, 0)


def view(pointer, count, dtype):
    """The library's memory as an array, not copied."""
    if count == 0:
        return np.empty(0, dtype)
    raw = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(pointer)
    return np.frombuffer(raw, dtype)


# ---- reference ----------------------------------------------------------------------------------------------------------


def expert_forward(w1, w2, x):
    """E(x) = W2 (silu(W1 x) * (W3 x)), w1 = [W1; W3]; rows of x. Returns the output and what backward needs."""
    z = x @ w1.T
    gate, up = z[:, :FFN], z[:, FFN:]
    s = 1 / (1 + np.exp(-gate))
    a = gate * s * up
    return a @ w2.T, (x, gate, up, s, a)


def expert_backward(w1, w2, saved, dout):
    """dx, dw1, dw2 of rows, given the derivative of the output."""
    x, gate, up, s, a = saved
    u = dout @ w2
    dz = np.concatenate([u * up * (s + gate * s * (1 - s)), u * gate * s], axis=1)
    return dz @ w1, dz.T @ x, dout.T @ a


def reference(experts, x, dy, weight):
    """Dense: weight [tokens, experts], NaN where there is no route. y, dx, dw [tokens, experts], gradients."""
    y, dx = np.zeros_like(x, np.float64), np.zeros_like(x, np.float64)
    dw = np.zeros(weight.shape)
    grads = []
    for e, (w1, w2) in enumerate(experts):
        t = np.flatnonzero(~np.isnan(weight[:, e]))
        w = weight[t, e][:, None].astype(np.float64)
        out, saved = expert_forward(w1.astype(np.float64), w2.astype(np.float64), x[t].astype(np.float64))
        y[t] += w * out
        dw[t, e] = (dy[t] * out).sum(axis=1)
        d, g1, g2 = expert_backward(w1.astype(np.float64), w2.astype(np.float64), saved, w * dy[t])
        dx[t] += d
        grads.append((g1, g2))
    return y, dx, dw, grads


def check(what, got, want, tolerance=2e-5):
    error = np.abs(got - want).max(initial=0) / max(1.0, np.abs(want).max(initial=0))
    if not error <= tolerance:  # a NaN is no success
        raise AssertionError(f"{what}: off by {error:.3g}, allowed {tolerance:.1g}")
    return error


# ---- the ranks ----------------------------------------------------------------------------------------------------------


class Batch:
    """One micro-batch of all ranks: a ragged routing, 0 to 4 experts a token, weights in a dense array."""

    def __init__(self, rng):
        self.begin = np.concatenate([[0], np.cumsum(TOKENS)])
        n = self.begin[-1]
        self.x = rng.standard_normal((n, HIDDEN)).astype(np.float32)
        self.dy = rng.standard_normal((n, HIDDEN)).astype(np.float32)
        self.weight = np.full((n, EXPERTS), np.nan, np.float32)
        for t in range(n):
            chosen = rng.permutation(EXPERTS)[:rng.integers(0, 5)]
            self.weight[t, chosen] = rng.random(len(chosen))

    def of(self, rank):
        rows = slice(self.begin[rank], self.begin[rank + 1])
        return self.x[rows], self.dy[rows], self.weight[rows]


def csr(weight):
    """The routing of dense weights as a ragged list; also where each route lies in the dense array."""
    routed = ~np.isnan(weight)
    arrays = {"row_ptr": np.concatenate([[0], np.cumsum(routed.sum(axis=1))]).astype(np.int64),
              "expert": np.nonzero(routed)[1].astype(np.int32), "weight": weight[routed]}
    return Routing(format=Routing.CSR, num_tokens=len(weight), num_weights=len(arrays["weight"]),
                   **{k: address(v) for k, v in arrays.items()}), arrays, np.flatnonzero(routed)


def top_k(weight, k=4):
    """The same as arrays [tokens, k], experts in any order, -1 for none."""
    order = np.argsort(-np.nan_to_num(weight, nan=-1), axis=1)[:, :k]
    w = np.take_along_axis(weight, order, axis=1)
    arrays = {"expert": np.where(np.isnan(w), -1, order).astype(np.int32), "weight": np.nan_to_num(w)}
    index = order + np.arange(len(weight))[:, None] * EXPERTS
    return Routing(format=Routing.TOP_K, k=k, num_tokens=len(weight), num_weights=w.size,
                   **{k: address(v) for k, v in arrays.items()}), arrays, index.ravel()


class Experts:
    """Where experts live, rank by rank, and their weights."""

    def __init__(self, rng):
        self.weights = [((rng.standard_normal((2 * FFN, HIDDEN)) / np.sqrt(HIDDEN)).astype(np.float32),
                         (rng.standard_normal((HIDDEN, FFN)) / np.sqrt(FFN)).astype(np.float32)) for _ in range(EXPERTS)]
        # Any placement will do; this one leaves rank 1 without experts.
        self.slot_rank = np.array([0, 2, 3, 2, 0, 3, 2], np.int32)
        self.slot_expert = np.arange(EXPERTS, dtype=np.int32)
        self.placement = Placement(num_experts=EXPERTS, num_slots=EXPERTS, slot_expert=address(self.slot_expert),
                                   slot_rank=address(self.slot_rank))

    def of(self, rank):
        return [int(e) for e in self.slot_expert[self.slot_rank == rank]]


def train_step(api, runtime, rank, experts, batches, results):
    layer = api.make("layer", "layer_create", runtime, experts.placement, LayerOptions(hidden=HIDDEN, ffn=FFN))
    mine = experts.of(rank)
    grads = [tuple(np.zeros_like(w) for w in experts.weights[e]) for e in mine]
    slots = (ExpertWeights * len(mine))()
    for slot, e, (g1, g2) in zip(slots, mine, grads):
        w1, w2 = experts.weights[e]
        slot.__init__(w1=matrix(w1), w2=matrix(w2), grad_w1=address(g1), grad_w2=address(g2))
    api.call("layer_set_weights", layer, slots, len(mine))

    in_flight = []
    for number, batch in enumerate(batches):
        x, dy, weight = batch.of(rank)
        routing, arrays, index = (csr, top_k)[number % 2](weight)
        plan = api.make("plan", "layer_plan", layer, routing, None)
        if rank == 0 and number == 0:
            text = ctypes.create_string_buffer(4096)
            api.call("plan_explain", plan, HIDDEN * 4, text, len(text), None)
            print(text.value.decode().rstrip())
        y = np.full_like(x, np.nan)
        context = api.make("context", "layer_forward", layer, plan, matrix(x), matrix(y), None)
        in_flight.append((number, context, dy, y, arrays["weight"].size, index))
    for number, context, dy, y, num_weights, index in reversed(in_flight):
        dx, dw = np.full_like(y, np.nan), np.full(num_weights, np.nan, np.float32)
        api.call("layer_backward", layer, context, matrix(dy), matrix(dx), address(dw), num_weights, None)
        dense = np.zeros(len(y) * EXPERTS)
        dense[index] = dw
        results[number][rank] = y, dx, dense.reshape(len(y), EXPERTS)
    for _, context, *_ in in_flight:  # the same order on every rank
        context.destroy()
    for e, g in zip(mine, grads):
        results["grads"][e] = g


def dispatch_step(api, runtime, rank, experts, batch, layout, results):
    """The layer again, its experts in NumPy."""
    alignment = 8 if layout == DispatcherOptions.EXPERT_ROWS else 0
    dispatcher = api.make("dispatcher", "dispatcher_create", runtime, experts.placement,
                          DispatcherOptions(hidden=HIDDEN, layout=layout, alignment=alignment))
    x, dy, weight = batch.of(rank)
    routing, arrays, index = csr(weight)
    plan = api.make("plan", "dispatcher_plan", dispatcher, routing, None)
    context = api.make("context", "dispatcher_dispatch", dispatcher, plan, matrix(x), None)
    mine = experts.of(rank)
    received = Received()
    api.call("plan_get_received", plan, received)
    slot = view(received.slot, received.num_routes, np.int32)

    def rows():
        m = Matrix()
        api.call("dispatcher_rows", dispatcher, context, m)
        return view(m.data, m.rows * m.cols, np.float32).reshape(m.rows, m.cols).copy()

    x_rows = rows()
    y, dx = np.full_like(x, np.nan), np.full_like(x, np.nan)
    dw = np.full(len(index), np.nan, np.float32)
    grads = [tuple(np.zeros_like(w) for w in experts.weights[e]) for e in mine]

    if layout == DispatcherOptions.EXPERT_ROWS:
        pointer = ptr()
        api.call("dispatcher_layout", dispatcher, context, ctypes.byref(pointer), None)
        begin = view(pointer.value, len(mine) + 1, np.int64)
        spans = [slice(begin[i], begin[i + 1]) for i in range(len(mine))]
        out, saved = np.zeros_like(x_rows), []
        for e, rows_of_e in zip(mine, spans):
            out[rows_of_e], s = expert_forward(*experts.weights[e], x_rows[rows_of_e])
            saved.append(s)
        api.call("dispatcher_combine", dispatcher, context, matrix(out), matrix(y), None)
        api.call("dispatcher_combine_backward", dispatcher, context, matrix(dy), matrix(out), None)
        d_rows, d_out = rows(), np.zeros_like(x_rows)  # d_rows: w * dy already
        for i, (e, rows_of_e) in enumerate(zip(mine, spans)):
            d_out[rows_of_e], g1, g2 = expert_backward(*experts.weights[e], saved[i], d_rows[rows_of_e])
            grads[i] = g1, g2
        api.call("dispatcher_dispatch_backward", dispatcher, context, matrix(d_out), None, 0, matrix(dx), address(dw),
                 dw.size, None)
    else:
        w = view(received.weight, received.num_routes, np.float32)[:, None]
        route_ptr = view(received.route_ptr, received.num_rows + 1, np.int64)
        row_of_route = np.repeat(np.arange(received.num_rows), np.diff(route_ptr))
        routes = [np.flatnonzero(slot == i) for i in range(len(mine))]
        sums, saved, outs = np.zeros_like(x_rows), [], []
        for e, q in zip(mine, routes):
            out, s = expert_forward(*experts.weights[e], x_rows[row_of_route[q]])
            sums[row_of_route[q]] += w[q] * out  # a row has one route to an expert
            saved.append(s)
            outs.append(out)
        api.call("dispatcher_combine", dispatcher, context, matrix(sums), matrix(y), None)
        api.call("dispatcher_combine_backward", dispatcher, context, matrix(dy), None, None)
        d_rows, d_sums = rows(), np.zeros_like(x_rows)
        received_dw = np.zeros(received.num_routes, np.float32)
        for i, (e, q) in enumerate(zip(mine, routes)):
            d = d_rows[row_of_route[q]]
            received_dw[q] = (d * outs[i]).sum(axis=1)
            d_x, g1, g2 = expert_backward(*experts.weights[e], saved[i], w[q] * d)
            d_sums[row_of_route[q]] += d_x
            grads[i] = g1, g2
        api.call("dispatcher_dispatch_backward", dispatcher, context, matrix(d_sums), address(received_dw),
                 received_dw.size, matrix(dx), address(dw), dw.size, None)
    dense = np.zeros(len(x) * EXPERTS)
    dense[index] = dw
    results[0][rank] = y, dx, dense.reshape(len(x), EXPERTS)
    for e, g in zip(mine, grads):
        results["grads"][e] = g


def play(api, body):
    """Every rank in a thread; ctypes lets the others run while one waits in a call."""
    group = api.make("group", "group_create_local", Topology(num_ranks=RANKS, num_nodes=NODES), None)
    runtimes = [api.make("runtime", "group_take_runtime", group, rank) for rank in range(RANKS)]
    errors = []

    def run(rank):
        try:
            body(runtimes[rank], rank)
        except Exception as error:  # the others must not wait for this rank
            errors.append((rank, error))
            api.call("runtime_abort", runtimes[rank], str(error).encode())

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        rank, error = errors[0]
        raise RuntimeError(f"rank {rank}: {error}") from error


def compare(name, experts, batches, results):
    total = [[0, 0] for _ in range(EXPERTS)]
    worst = 0
    for number, batch in enumerate(batches):
        *wanted, grads = reference(experts.weights, batch.x, batch.dy, batch.weight)
        for what, got, want in zip(("y", "dx", "dw"), zip(*results[number]), wanted):
            worst = max(worst, check(f"{name}, micro-batch {number}, {what}", np.concatenate(got), want))
        for e in range(EXPERTS):
            total[e] = [total[e][0] + grads[e][0], total[e][1] + grads[e][1]]
    for e in range(EXPERTS):
        for k in range(2):
            worst = max(worst, check(f"{name}, gradient of w{k + 1} of expert {e}", results["grads"][e][k], total[e][k]))
    print(f"{name}: agrees with the dense reference, largest error {worst:.2g}")


def new_results(num_batches):
    return {"grads": [None] * EXPERTS, **{b: [None] * RANKS for b in range(num_batches)}}


def library():
    if len(sys.argv) == 2:
        return sys.argv[1]
    root = pathlib.Path(__file__).resolve().parent.parent
    for candidate in (root / "build/release/libsluice.so", root / "lib/libsluice.so"):
        if candidate.exists():
            return str(candidate)
    return "libsluice.so"


def main():
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    api = Api(library())
    print("Sluice", api.lib.sluice_version().decode(), "with NumPy", np.__version__)
    rng = np.random.default_rng(2024)
    experts = Experts(rng)
    batches = [Batch(rng), Batch(rng)]

    results = new_results(len(batches))
    play(api, lambda runtime, rank: train_step(api, runtime, rank, experts, batches, results))
    compare("layer, two micro-batches in flight", experts, batches, results)

    for layout, name in ((DispatcherOptions.RANK_ROWS, "rank rows"), (DispatcherOptions.EXPERT_ROWS, "expert rows")):
        results = new_results(1)
        play(api, lambda runtime, rank: dispatch_step(api, runtime, rank, experts, batches[0], layout, results))
        compare(f"dispatcher, {name}, experts in NumPy", experts, batches[:1], results)


if __name__ == "__main__":
    main()
