#!/usr/bin/env python3
"""A Mixture-of-Experts layer between GPUs from PyTorch: libsluice.so through ctypes, torch tensors where they are.

usage: sluice launch -n RANKS -- python3 torch_layer.py [PATH OF libsluice.so] [nvlink|nccl]

Every rank has its own tokens and its share of the experts. Shown, and checked against the same layer written in torch:
  1. routings of any number of experts a token, as an autograd function, over two batches whose gradients add up
  2. a routing that is none, and one with more routes than there is room for: refused by name, and the next batch works
"""
import ctypes
import pathlib
import sys

try:
    import torch
except ImportError:
    print("skipped: this Python has no PyTorch")
    sys.exit(77)
if not torch.cuda.is_available():
    print("skipped: no GPU")
    sys.exit(77)

EXPERTS, HIDDEN, FFN, TOKENS, MOST_ROUTES = 6, 128, 192, 300, 4

# ---- the C interface, as far as it is used here: include/sluice/sluice.h ------------------------------------------------

i32, i64, f64, ptr, size = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p, ctypes.c_size_t
SWIGLU, CUDA = 0, 1


class Versioned(ctypes.Structure):
    """A structure that begins with its size; what is not given is zero, its default."""

    def __init__(self, **members):
        super().__init__(struct_size=ctypes.sizeof(self), **members)


class RuntimeOptions(Versioned):
    _fields_ = [("struct_size", size), ("timeout_ms", i64), ("threads_per_rank", i32), ("reserved", i32),
                ("allocate", ptr), ("deallocate", ptr), ("user", ptr), ("device", i32), ("reserved2", i32)]


class Placement(Versioned):
    _fields_ = [("struct_size", size), ("num_experts", i32), ("num_slots", i32), ("slot_expert", ptr),
                ("slot_rank", ptr), ("slot_local_index", ptr), ("expert_kind", ptr), ("version", ctypes.c_uint64)]


class GpuLayerOptions(Versioned):
    _fields_ = [("struct_size", size), ("hidden", i64), ("ffn", i64), ("max_tokens", i64), ("imbalance", f64),
                ("max_routes_of_token", i32), ("activation", i32), ("schedule", i32), ("training", i32)]


def load(path):
    lib = ctypes.CDLL(path)
    for name in ("sluice_status_name", "sluice_last_error_message"):
        getattr(lib, name).restype = ctypes.c_char_p
    functions = {
        "runtime_create": [ctypes.c_char_p, ptr, ptr, ctypes.POINTER(ptr)],
        "gpu_layer_create": [ptr, ptr, ptr, ctypes.POINTER(ptr)],
        "gpu_layer_set_weights": [ptr] * 5,
        "gpu_layer_plan": [ptr, ptr, ptr, ptr, i64, ptr],
        "gpu_layer_forward": [ptr, ptr, ptr, i32, ptr],
        "gpu_layer_backward": [ptr, ptr, ptr, ptr, i32, ptr],
        "gpu_layer_wait": [ptr, ptr],
    }
    for name, argtypes in functions.items():
        function = getattr(lib, "sluice_" + name)
        function.argtypes, function.restype = argtypes, i32
    for name in ("runtime_rank", "runtime_num_ranks", "runtime_gpu", "gpu_layer_num_local_experts"):
        function = getattr(lib, "sluice_" + name)
        function.argtypes, function.restype = [ptr], i32
    for name in ("runtime", "gpu_layer"):
        function = getattr(lib, f"sluice_{name}_destroy")
        function.argtypes, function.restype = [ptr], None
    return lib


class Api:
    """Calls that raise when they fail."""

    def __init__(self, path):
        self.lib = load(path)

    def __call__(self, name, *arguments):
        status = getattr(self.lib, "sluice_" + name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{self.lib.sluice_status_name(status).decode()}: "
                               f"{self.lib.sluice_last_error_message().decode()}")


def stream():
    return torch.cuda.current_stream().cuda_stream


# ---- the layer ----------------------------------------------------------------------------------------------------------


class Layer:
    """E(x) = W2 (silu(W1 x) * (W3 x)); w1 holds W1 above W3. This rank's experts: bf16 weights, fp32 gradients."""

    def __init__(self, api, runtime, w1, w2):
        self.api, self.handle, self.w1, self.w2 = api, ptr(), w1, w2
        self.grad_w1, self.grad_w2 = torch.empty_like(w1, dtype=torch.float32), torch.empty_like(w2, dtype=torch.float32)
        self.first = True  # of a step: gradients are written, the next ones added
        ranks = api.lib.sluice_runtime_num_ranks(runtime)
        slots = (i32 * EXPERTS)(*range(EXPERTS))
        places = (i32 * EXPERTS)(*[e * ranks // EXPERTS for e in range(EXPERTS)])
        placement = Placement(num_experts=EXPERTS, num_slots=EXPERTS, slot_expert=ctypes.addressof(slots),
                              slot_rank=ctypes.addressof(places))
        options = GpuLayerOptions(hidden=HIDDEN, ffn=FFN, max_tokens=TOKENS, max_routes_of_token=MOST_ROUTES,
                                  activation=SWIGLU, training=1)
        api("gpu_layer_create", runtime, ctypes.byref(placement), ctypes.byref(options), ctypes.byref(self.handle))
        api("gpu_layer_set_weights", self.handle, w1.data_ptr(), w2.data_ptr(), self.grad_w1.data_ptr(),
            self.grad_w2.data_ptr())

    def plan(self, row_ptr, expert, weight):
        self.routing = (row_ptr, expert, weight)  # kept as long as the plan
        self.api("gpu_layer_plan", self.handle, row_ptr.data_ptr(), expert.data_ptr(), weight.data_ptr(),
                 row_ptr.numel() - 1, stream())

    def wait(self):
        self.api("gpu_layer_wait", self.handle, stream())

    def destroy(self):
        self.api.lib.sluice_gpu_layer_destroy(self.handle)


class Experts(torch.autograd.Function):
    """y[t] = sum of weight * E(x[t]) over the routes of token t."""

    @staticmethod
    def forward(ctx, layer, x, row_ptr, expert, weight):
        y = torch.empty_like(x)
        layer.plan(row_ptr, expert, weight.detach())
        layer.api("gpu_layer_forward", layer.handle, x.data_ptr(), y.data_ptr(), 1, stream())
        ctx.layer, ctx.like = layer, (x, weight)
        return y

    @staticmethod
    def backward(ctx, dy):
        layer, (x, weight) = ctx.layer, ctx.like
        dy, dx, dweight = dy.contiguous(), torch.empty_like(x), torch.empty_like(weight)
        layer.api("gpu_layer_backward", layer.handle, dy.data_ptr(), dx.data_ptr(), dweight.data_ptr(),
                  1 if layer.first else 0, stream())
        layer.first = False
        return None, dx, None, None, dweight


# ---- the same in torch, and batches that every rank can draw for every rank ---------------------------------------------


def draw(rank, batch):
    """Tokens with 0..MOST_ROUTES routes; of the second batch rank 0 has none."""
    g = torch.Generator().manual_seed(100 * batch + rank)
    tokens = 0 if (rank, batch) == (0, 1) else TOKENS - 13 * rank
    scores = torch.rand(tokens, EXPERTS, generator=g)
    counts = torch.randint(0, MOST_ROUTES + 1, (tokens, 1), generator=g)
    chosen = scores.argsort(dim=1).argsort(dim=1) < counts
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)])
    expert = chosen.nonzero()[:, 1].to(torch.int32)
    weight = torch.rand(expert.numel(), generator=g)
    x, dy = torch.randn(2, tokens, HIDDEN, generator=g).bfloat16()
    return [t.cuda() for t in (x, dy, row_ptr, expert, weight)]


def dense(x, row_ptr, expert, weight, w1, w2):
    tokens = torch.repeat_interleave(torch.arange(x.shape[0], device="cuda"), row_ptr.diff())
    y = torch.zeros(x.shape, device="cuda", dtype=torch.float64)
    for e in range(EXPERTS):
        routes = (expert == e).nonzero()[:, 0]
        gate, up = (x[tokens[routes]] @ w1[e].T).chunk(2, dim=1)
        out = (torch.nn.functional.silu(gate) * up) @ w2[e].T
        y = y.index_add(0, tokens[routes], weight[routes, None] * out)
    return y


def check(what, got, want):
    error = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item() if want.numel() else 0.0
    if not error <= 0.02:
        sys.exit(f"{what} is off by {error} of its norm")
    return error


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else str(pathlib.Path(__file__).parent.parent / "build/release/libsluice.so")
    link = sys.argv[2] if len(sys.argv) > 2 else "nvlink"
    api, runtime = Api(path), ptr()
    options = RuntimeOptions(device=CUDA, timeout_ms=20000)
    api("runtime_create", link.encode(), None, ctypes.byref(options), ctypes.byref(runtime))
    rank, ranks = api.lib.sluice_runtime_rank(runtime), api.lib.sluice_runtime_num_ranks(runtime)
    torch.cuda.set_device(api.lib.sluice_runtime_gpu(runtime))
    g = torch.Generator().manual_seed(7)
    all_w1 = (torch.randn(EXPERTS, 2 * FFN, HIDDEN, generator=g) * HIDDEN**-0.5).bfloat16().cuda()
    all_w2 = (torch.randn(EXPERTS, HIDDEN, FFN, generator=g) * FFN**-0.5).bfloat16().cuda()
    mine = [e for e in range(EXPERTS) if e * ranks // EXPERTS == rank]
    layer = Layer(api, runtime, all_w1[mine].contiguous(), all_w2[mine].contiguous())
    layer.grad_w1.fill_(float("nan"))
    layer.grad_w2.fill_(float("nan"))

    worst = 0.0
    want_w1 = all_w1.double().requires_grad_()
    want_w2 = all_w2.double().requires_grad_()
    for batch in range(2):
        x, dy, row_ptr, expert, weight = draw(rank, batch)
        x.requires_grad_()
        weight.requires_grad_()
        y = Experts.apply(layer, x, row_ptr, expert, weight)
        y.backward(dy)
        layer.wait()
        for r in range(ranks):  # weight gradients are of all ranks' tokens
            xr, dyr, row_ptr_r, expert_r, weight_r = draw(r, batch)
            xd, wd = xr.double().requires_grad_(), weight_r.double().requires_grad_()
            want = dense(xd, row_ptr_r, expert_r, wd, want_w1, want_w2)
            want.backward(dyr.double())
            if r == rank:
                for what, got, wanted in (("y", y, want), ("dx", x.grad, xd.grad), ("dweight", weight.grad, wd.grad)):
                    worst = max(worst, check(what, got.detach(), wanted.detach()))
    worst = max(worst, check("the gradient of w1", layer.grad_w1, want_w1.grad[mine]))
    worst = max(worst, check("the gradient of w2", layer.grad_w2, want_w2.grad[mine]))

    # Bad routings: every rank makes the plan, rank 0's is none.
    x, dy, row_ptr, expert, weight = draw(rank, 0)
    twice = expert.clone()
    if rank == 0:
        twice[row_ptr[(row_ptr.diff() >= 2).nonzero()[0, 0]] + 1] = EXPERTS
    many = torch.arange(TOKENS + 1, device="cuda") * EXPERTS
    all_experts = torch.arange(EXPERTS, dtype=torch.int32, device="cuda").repeat(TOKENS)
    for what, bad in ((f"expert {EXPERTS}; 0..{EXPERTS - 1} exist", (row_ptr, twice, weight)),
                      ("there is room for", (many, all_experts, torch.ones(TOKENS * EXPERTS, device="cuda"))
                       if rank == 0 else (row_ptr, expert, weight))):
        y = torch.full((bad[0].numel() - 1, HIDDEN), float("nan"), device="cuda", dtype=torch.bfloat16)
        rows = torch.zeros_like(y)
        layer.plan(*bad)
        api("gpu_layer_forward", layer.handle, rows.data_ptr(), y.data_ptr(), 0, stream())
        try:
            layer.wait()
            if rank == 0:
                sys.exit(f"a bad routing was not refused ({what})")
        except RuntimeError as e:
            if rank != 0 or what not in str(e):
                sys.exit(f"rank {rank} reported: {e}")
    # And the group goes on.
    y = torch.full_like(x, float("nan"))
    layer.plan(row_ptr, expert, weight)
    api("gpu_layer_forward", layer.handle, x.data_ptr(), y.data_ptr(), 0, stream())
    layer.wait()
    worst = max(worst, check("y afterwards", y, dense(x.double(), row_ptr, expert, weight.double(), all_w1.double(),
                                                      all_w2.double())))
    layer.destroy()
    api.lib.sluice_runtime_destroy(runtime)
    print(f"rank {rank} of {ranks} over {link}: like torch's layer, within {worst:.4f} of the norm")


if __name__ == "__main__":
    main()
