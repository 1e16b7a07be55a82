#include "sluice/base/config_schema.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <type_traits>

#include "sluice/base/error.hpp"

namespace sluice::config_schema {

namespace {

#define SLUICE_MEMBER(path) (+[](Config & config) -> auto& { return config.path; })
#define SLUICE_ENUM(path)                                                                   \
  EnumMember {                                                                              \
    [](const Config& config) { return static_cast<std::size_t>(config.path); },             \
        [](Config& config, std::size_t value) {                                             \
          config.path = static_cast<std::remove_reference_t<decltype(config.path)>>(value); \
        }                                                                                   \
  }

using Text = std::string_view;
constexpr std::array<Text, 3> kActivations = {"swiglu", "gelu", "relu"};
constexpr std::array<Text, 2> kDTypes = {"f32", "bf16"};
constexpr std::array<Text, 3> kWireDTypes = {"f32", "bf16", "rows"};
constexpr std::array<Text, 7> kRoutingPolicies = {
    "relu", "softmax_topk", "sigmoid_topk", "node_limited", "bounded_regret", "moepp", "etr"};
constexpr std::array<Text, 3> kRegretBases = {"softmax_topk", "sigmoid_topk", "node_limited"};
constexpr std::array<Text, 2> kRegretScopes = {"rank", "node"};
constexpr std::array<Text, 3> kEtrChoices = {"auto", "token", "both"};
constexpr std::array<Text, 2> kEtrQuotas = {"global", "local"};
constexpr std::array<Text, 2> kDeals = {"random", "by_position"};
constexpr std::array<Text, 3> kChainResiduals = {"none", "inner", "outer"};
constexpr std::array<Text, 2> kReluVariants = {"paper", "official"};
constexpr std::array<Text, 2> kPlacementPolicies = {"contiguous", "file"};
constexpr std::array<Text, 9> kTransports = {"local",   "shm", "tcp",    "ucx", "shm+tcp",
                                             "shm+ucx", "mpi", "nvlink", "nccl"};
constexpr std::array<Text, 3> kProgressModes = {"auto", "inline", "thread"};
constexpr std::array<Text, 5> kSchedulePolicies = {"sequential", "pipelined", "by-source", "hierarchical",
                                                   "auto"};
constexpr std::array<Text, 2> kExchanges = {"gateway", "direct"};
constexpr std::array<Text, 4> kLogLevels = {"error", "warn", "info", "debug"};
constexpr std::array<Text, 2> kOnFailure = {"stop", "shrink"};
constexpr std::array<Text, 2> kDevices = {"cpu", "cuda"};
constexpr std::array<Text, 2> kSaves = {"rows", "activations"};

constexpr std::int32_t kMaxRanks = 65536;

constexpr Range at_least(double min) {
  return {.min = min};
}
constexpr Range between(double min, double max) {
  return {.min = min, .max = max};
}
constexpr Range above(double min) {
  return {.min = min, .min_open = true};
}
constexpr Range above_to_below(double min, double max) {
  return {.min = min, .max = max, .min_open = true, .max_open = true};
}
constexpr Range from_to_below(double min, double max) {
  return {.min = min, .max = max, .max_open = true};
}

constexpr std::array kSections = {
    Section{"model",
            "The shape of the model: a byte-level n-gram language model with mixture-of-experts blocks."},
    Section{"routing", "Which experts a token visits, and with what weight."},
    Section{"placement", "Which rank holds which expert."},
    Section{"topology",
            "How many ranks there are, which of them share a node, and what the links between them do."},
    Section{"comm", "Moving rows between ranks."},
    Section{"schedule", "The order of the work of one layer. Never changes a result."},
    Section{"machine",
            "What a machine that nobody measured is said to do, for predictions (docs/simulator.md); its "
            "links are those "
            "of topology. A measured profile (schedule.profile) takes the place of it."},
    Section{"runtime", "What a rank does on its own: threads, log, memory, files."},
    Section{"train", "`sluice train`: the job, the optimizer (AdamW) and the text."},
    Section{"bench", "`sluice bench`: one layer, measured."},
};

const Row kRows[] = {
    // ---- model ----
    {.key = "model.num_layers",
     .member = SLUICE_MEMBER(model.num_layers),
     .unit = "layers",
     .range = between(1, 1024),
     .default_text = "2",
     .kind = Kind::kSemantic,
     .doc = "Mixture-of-experts blocks, each with a residual connection."},
    {.key = "model.num_experts",
     .member = SLUICE_MEMBER(model.num_experts),
     .unit = "experts",
     .range = between(1, 65536),
     .default_text = "16",
     .kind = Kind::kSemantic,
     .doc =
         "Experts of a layer, all kinds together. Ids: those with weights first, then zero, copy, constant."},
    {.key = "model.hidden",
     .member = SLUICE_MEMBER(model.hidden),
     .unit = "columns",
     .range = between(1, 65536),
     .default_text = "64",
     .kind = Kind::kSemantic,
     .doc = "Width of a token's row."},
    {.key = "model.ffn",
     .member = SLUICE_MEMBER(model.ffn),
     .unit = "columns",
     .range = between(1, 262144),
     .default_text = "128",
     .kind = Kind::kSemantic,
     .doc = "Inner width of an expert."},
    {.key = "model.activation",
     .member = SLUICE_ENUM(model.activation),
     .allowed = kActivations,
     .default_text = "swiglu",
     .kind = Kind::kSemantic,
     .doc = "swiglu is gated: W2 (silu(W1 x) * (W3 x)). gelu (tanh form) and relu are not: W2 f(W1 x)."},
    {.key = "model.context",
     .member = SLUICE_MEMBER(model.context),
     .unit = "bytes",
     .range = between(1, 256),
     .default_text = "8",
     .kind = Kind::kSemantic,
     .doc = "Last bytes of the text that the next byte is told from."},
    {.key = "model.embed",
     .member = SLUICE_MEMBER(model.embed),
     .unit = "columns",
     .range = between(1, 65536),
     .default_text = "32",
     .kind = Kind::kSemantic,
     .doc = "Width of a byte's embedding."},
    {.key = "model.dtype",
     .member = SLUICE_ENUM(model.dtype),
     .allowed = kDTypes,
     .default_text = "f32",
     .kind = Kind::kSemantic,
     .doc = "Of rows and expert weights in memory. Sums, gate weights and master weights are f32 always."},
    {.key = "model.zero_experts",
     .member = SLUICE_MEMBER(model.zero_experts),
     .unit = "experts",
     .range = between(0, 65536),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc = "Of num_experts, how many give 0. They cost nothing and never touch the wire."},
    {.key = "model.copy_experts",
     .member = SLUICE_MEMBER(model.copy_experts),
     .unit = "experts",
     .range = between(0, 65536),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc = "Of num_experts, how many give their input back."},
    {.key = "model.constant_experts",
     .member = SLUICE_MEMBER(model.constant_experts),
     .unit = "experts",
     .range = between(0, 65536),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc =
         "Of num_experts, how many give a1 x + a2 v, with v a trained vector and [a1, a2] = softmax(W_c x) "
         "(MoE++, arXiv 2410.07348)."},
    {.key = "model.chain_iterations",
     .member = SLUICE_MEMBER(model.chain_iterations),
     .unit = "iterations",
     .range = between(1, 64),
     .default_text = "1",
     .kind = Kind::kSemantic,
     .doc = "How often a block applies its experts to the same tokens (Chain-of-Experts, docs/chain.md). "
            "routing.top_k is that of one iteration: for the expert calls of a plain layer with K, set K / "
            "chain_iterations."},
    {.key = "model.chain_residual",
     .member = SLUICE_ENUM(model.chain_residual),
     .allowed = kChainResiduals,
     .default_text = "none",
     .kind = Kind::kSemantic,
     .doc = "inner: each iteration adds its input to its output. outer: the chain adds its input to its last "
            "output. The residual of the block itself is there always."},
    {.key = "model.chain_shared_gate",
     .member = SLUICE_MEMBER(model.chain_shared_gate),
     .default_text = "false",
     .kind = Kind::kSemantic,
     .doc = "One gate for all iterations of a layer, instead of one each."},
    {.key = "model.shared_ffn",
     .member = SLUICE_MEMBER(model.shared_ffn),
     .unit = "columns",
     .range = between(0, 262144),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc = "Inner width of the shared expert that every token visits in every iteration; 0: none. Several "
            "shared experts are one of their widths together."},
    {.key = "model.gate_residual",
     .member = SLUICE_MEMBER(model.gate_residual),
     .default_text = "false",
     .kind = Kind::kSemantic,
     .doc = "Scores of a layer add a trained matrix times the token's scores at the layer before (MoE++'s "
            "pathway-aware router): z_l = W_l x + W_g,l z_(l-1)."},

    // ---- routing ----
    {.key = "routing.policy",
     .member = SLUICE_ENUM(routing.policy),
     .allowed = kRoutingPolicies,
     .default_text = "relu",
     .kind = Kind::kSemantic,
     .doc =
         "relu: the weight is relu(score), any number of experts a token (ReMoE, arXiv 2412.14711). "
         "softmax_topk, sigmoid_topk: the top_k highest scores. node_limited: sigmoid_topk within the best "
         "top_groups of num_groups groups (DeepSeek-V3). bounded_regret: regret_base, its choice swapped for "
         "nearer experts within regret_epsilon. moepp: softmax_topk over experts of all kinds with their "
         "capacities (MoE++). etr: Expert-Token Resonance, by fixed affinities in place of a trained gate. "
         "docs/selection.md."},
    {.key = "routing.top_k",
     .member = SLUICE_MEMBER(routing.top_k),
     .unit = "experts per token",
     .range = between(1, 65536),
     .default_text = "2",
     .kind = Kind::kSemantic,
     .doc =
         "Experts a token visits; for relu the mean that the adaptive L1 term steers to; for etr the most."},
    {.key = "routing.renormalize",
     .member = SLUICE_MEMBER(routing.renormalize),
     .default_text = "true",
     .kind = Kind::kSemantic,
     .doc =
         "Top-k policies and etr: weights of a token are divided by their sum. moepp has a rule of its own."},
    {.key = "routing.pre_softmax",
     .member = SLUICE_MEMBER(routing.pre_softmax),
     .default_text = "true",
     .kind = Kind::kSemantic,
     .doc =
         "softmax_topk: softmax over all experts before the choice; false: over the chosen ones after it."},
    {.key = "routing.route_scale",
     .member = SLUICE_MEMBER(routing.route_scale),
     .range = above(0),
     .default_text = "1.0",
     .kind = Kind::kSemantic,
     .doc = "Top-k policies and etr: factor of every weight, applied last."},
    {.key = "routing.relu_variant",
     .member = SLUICE_ENUM(routing.relu_variant),
     .allowed = kReluVariants,
     .default_text = "paper",
     .kind = Kind::kSemantic,
     .doc = "relu: how lambda adapts and the L1 term is normed, as in the paper's formulas or as in its "
            "published "
            "code (no division by the number of layers; lambda falls at exact equality)."},
    {.key = "routing.relu_lambda0",
     .member = SLUICE_MEMBER(routing.relu_lambda0),
     .range = between(0, 1),
     .default_text = "1e-8",
     .kind = Kind::kSemantic,
     .doc = "relu: coefficient of the L1 term at the first step; 0 turns the term off."},
    {.key = "routing.relu_alpha",
     .member = SLUICE_MEMBER(routing.relu_alpha),
     .range = between(1, 10),
     .default_text = "1.2",
     .kind = Kind::kSemantic,
     .doc = "relu: lambda is multiplied or divided by this after a step; 1 keeps it fixed."},
    {.key = "routing.relu_load_balanced",
     .member = SLUICE_MEMBER(routing.relu_load_balanced),
     .default_text = "true",
     .kind = Kind::kSemantic,
     .doc = "relu: the L1 term of an expert is weighted with its share of the load."},
    {.key = "routing.aux_loss",
     .member = SLUICE_MEMBER(routing.aux_loss),
     .range = between(0, 1e6),
     .default_text = "0.0",
     .kind = Kind::kSemantic,
     .doc = "Coefficient of the load-balancing loss: softmax_topk (Switch Transformer, arXiv 2101.03961), "
            "node_limited (DeepSeek-V3's, over the batch), moepp (heterogeneous), etr (LocMoE's); 0 is off."},
    {.key = "routing.z_loss",
     .member = SLUICE_MEMBER(routing.z_loss),
     .range = between(0, 1e6),
     .default_text = "0.0",
     .kind = Kind::kSemantic,
     .doc = "softmax_topk: coefficient of the router z-loss (ST-MoE, arXiv 2202.08906); 0 is off."},
    {.key = "routing.bias_update",
     .member = SLUICE_MEMBER(routing.bias_update),
     .range = between(0, 1),
     .default_text = "0.001",
     .kind = Kind::kSemantic,
     .doc = "sigmoid_topk, node_limited: after a step the bias of an expert that has fewer routes than the "
            "mean, over "
            "all ranks, rises by this, of one that has more falls (arXiv 2408.15664). It acts on the choice "
            "only. "
            "0: no bias."},
    {.key = "routing.num_groups",
     .member = SLUICE_MEMBER(routing.num_groups),
     .unit = "groups",
     .range = between(0, 65536),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc = "node_limited: groups of consecutive experts, as many in each; 0: one a node of the topology."},
    {.key = "routing.top_groups",
     .member = SLUICE_MEMBER(routing.top_groups),
     .unit = "groups",
     .range = between(1, 65536),
     .default_text = "1",
     .kind = Kind::kSemantic,
     .doc = "node_limited: groups in which a token may choose."},
    {.key = "routing.regret_base",
     .member = SLUICE_ENUM(routing.regret_base),
     .allowed = kRegretBases,
     .default_text = "softmax_topk",
     .kind = Kind::kSemantic,
     .doc = "bounded_regret: the router whose choice is swapped. Its own keys hold."},
    {.key = "routing.regret_epsilon",
     .member = SLUICE_MEMBER(routing.regret_epsilon),
     .range = between(0, 1e6),
     .default_text = "0.05",
     .kind = Kind::kSemantic,
     .doc = "bounded_regret: what all swaps of a token may lose together, in the score by which the base "
            "chooses "
            "(a probability, or sigmoid plus bias). 0: ties only."},
    {.key = "routing.regret_scope",
     .member = SLUICE_ENUM(routing.regret_scope),
     .allowed = kRegretScopes,
     .default_text = "rank",
     .kind = Kind::kSemantic,
     .doc = "bounded_regret: node: swaps save crossings between nodes. rank: and, with what is left of the "
            "bound, "
            "between ranks of the own node."},
    {.key = "routing.locality_loss",
     .member = SLUICE_MEMBER(routing.locality_loss),
     .range = between(0, 1e6),
     .default_text = "0.0",
     .kind = Kind::kSemantic,
     .doc = "softmax_topk (bounded_regret on it, too), etr: coefficient mu of LocMoE's locality loss (arXiv "
            "2401.13920), which draws tokens to experts of their own node; 0 is off. No value is published."},
    {.key = "routing.locality_epsilon",
     .member = SLUICE_MEMBER(routing.locality_epsilon),
     .range = {.min = 0, .max = 1, .min_open = true, .max_open = true},
     .default_text = "0.05",
     .kind = Kind::kSemantic,
     .doc = "Locality loss: share of a token's probability that the localised distribution leaves to other "
            "nodes. "
            "Our choice: the paper does not define that distribution."},
    {.key = "routing.capacity_factor",
     .member = SLUICE_MEMBER(routing.capacity_factor),
     .range = between(0, 1e6),
     .default_text = "1.1",
     .kind = Kind::kSemantic,
     .doc = "moepp, etr: routes that an expert takes in training, over an even share; what is beyond is "
            "dropped. "
            "0: no limit."},
    {.key = "routing.moepp_tau",
     .member = SLUICE_MEMBER(routing.moepp_tau),
     .range = {.min = 0, .max = 1, .min_open = true},
     .default_text = "0.75",
     .kind = Kind::kSemantic,
     .doc = "moepp: share of an expert with weights over one without, in capacity and balance loss; less "
            "sends more "
            "tokens to experts that cost nothing."},
    {.key = "routing.etr_tau",
     .member = SLUICE_MEMBER(routing.etr_tau),
     .range = between(0, 1e6),
     .default_text = "0.0",
     .kind = Kind::kSemantic,
     .doc = "etr: a token takes experts, best first, until their affinities sum to this, at most top_k; 0: "
            "one. The "
            "paper does not publish its value."},
    {.key = "routing.etr_temperature",
     .member = SLUICE_MEMBER(routing.etr_temperature),
     .range = above(0),
     .default_text = "1.0",
     .kind = Kind::kSemantic,
     .doc = "etr: weights are softmax(affinity / this). Our choice: the paper says softmax alone, which is "
            "nearly flat "
            "over cosines."},
    {.key = "routing.etr_delta_max",
     .member = SLUICE_MEMBER(routing.etr_delta_max),
     .range = between(0, 1),
     .default_text = "0.0",
     .kind = Kind::kSemantic,
     .doc = "etr: an expert's capacity is at least exp(hidden d^2 / (2 - d^2)) / num_experts with d this; 0: "
            "no such "
            "bound."},
    {.key = "routing.etr_choice",
     .member = SLUICE_ENUM(routing.etr_choice),
     .allowed = kEtrChoices,
     .default_text = "auto",
     .kind = Kind::kSemantic,
     .doc = "etr: token: an expert takes the first tokens that chose it. both: it takes those of highest "
            "affinity. auto: "
            "the first, then the second once affinities separate tokens well; a switch a layer."},
    {.key = "routing.etr_quota",
     .member = SLUICE_ENUM(routing.etr_quota),
     .allowed = kEtrQuotas,
     .default_text = "global",
     .kind = Kind::kSemantic,
     .doc = "etr: global: capacity is of all ranks' tokens, exactly, by offer and accept. local: each rank "
            "fills its own "
            "share: no exchange, another result."},
    {.key = "routing.etr_switch_on",
     .member = SLUICE_MEMBER(routing.etr_switch_on),
     .range = between(0, 1e6),
     .default_text = "1.0",
     .kind = Kind::kSemantic,
     .doc = "etr, auto: experts choose too once the smoothed crowding 2 T q / C is at most this. Our choice, "
            "as the "
            "estimate of q is."},
    {.key = "routing.etr_switch_off",
     .member = SLUICE_MEMBER(routing.etr_switch_off),
     .range = between(0, 1e6),
     .default_text = "1.25",
     .kind = Kind::kSemantic,
     .doc = "etr, auto: back to token choice when it is above this; at least etr_switch_on."},
    {.key = "routing.etr_switch_decay",
     .member = SLUICE_MEMBER(routing.etr_switch_decay),
     .range = from_to_below(0, 1),
     .default_text = "0.9",
     .kind = Kind::kSemantic,
     .doc = "etr, auto: share of the old value in the smoothed crowding, a step."},

    // ---- placement ----
    {.key = "placement.policy",
     .member = SLUICE_ENUM(placement.policy),
     .allowed = kPlacementPolicies,
     .default_text = "contiguous",
     .kind = Kind::kSemantic,
     .doc = "contiguous: experts in order of their ids, the first ones on rank 0. file: as placement.file "
            "says."},
    {.key = "placement.file",
     .member = SLUICE_MEMBER(placement.file),
     .unit = "path",
     .default_text = "",
     .kind = Kind::kSemantic,
     .doc = "Placement that `sluice place --out` wrote (docs/placement.md), for placement.policy = file: one "
            "for each "
            "layer of the model, or one for all. sluice bench takes the one of bench.replay_layer."},
    {.key = "placement.slots_per_rank",
     .member = SLUICE_MEMBER(placement.slots_per_rank),
     .unit = "experts",
     .range = between(0, 65536),
     .default_text = "[]",
     .kind = Kind::kSemantic,
     .doc = "Experts with weights that each rank holds, one number a rank; 0 is a rank without experts. "
            "Empty: as even as possible."},

    // ---- topology ----
    {.key = "topology.ranks",
     .member = SLUICE_MEMBER(topology.ranks),
     .unit = "ranks",
     .range = between(0, kMaxRanks),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc = "Ranks of the job; 0: as many as the nodes name or the launcher starts."},
    {.key = "topology.nodes",
     .member = SLUICE_MEMBER(topology.nodes),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc =
         "Which ranks share a node: the ranks of each, [[0,1],[2,3]]; or \"2x2\", 2 nodes of 2 ranks; or 2, "
         "that many equal nodes; or 0, discovered. What is declared overrides what is discovered, on every "
         "transport, and reports say so."},
    {.key = "topology.in_node_bytes_per_s",
     .member = SLUICE_MEMBER(topology.in_node_bytes_per_s),
     .unit = "bytes/s",
     .range = between(0, 1e15),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc = "Declared bandwidth between ranks of one node, each way of each rank; transport local slows its "
            "copies "
            "down to it (reports say emulated). 0: not limited."},
    {.key = "topology.in_node_latency_us",
     .member = SLUICE_MEMBER(topology.in_node_latency_us),
     .unit = "us",
     .range = between(0, 1e6),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc = "Declared latency between ranks of one node, emulated likewise. 0: none added."},
    {.key = "topology.across_nodes_bytes_per_s",
     .member = SLUICE_MEMBER(topology.across_nodes_bytes_per_s),
     .unit = "bytes/s",
     .range = between(0, 1e15),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc = "Declared bandwidth between ranks of different nodes, emulated likewise. 0: not limited."},
    {.key = "topology.across_nodes_latency_us",
     .member = SLUICE_MEMBER(topology.across_nodes_latency_us),
     .unit = "us",
     .range = between(0, 1e6),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc = "Declared latency between ranks of different nodes, emulated likewise. 0: none added."},

    // ---- comm ----
    {.key = "comm.transport",
     .member = SLUICE_MEMBER(comm.transport),
     .allowed = kTransports,
     .default_text = "local",
     .kind = Kind::kSemantic,
     .doc =
         "local: ranks are threads of one process. Else they are processes that sluice launch, torchrun, "
         "mpirun or "
         "srun started (docs/transports.md): shm: of one host, over shared memory; tcp: of any hosts; "
         "ucx: over "
         "UCX; shm+tcp, shm+ucx: shared memory within a node, the other between nodes; mpi: over MPI, "
         "started by "
         "mpirun or srun. nvlink, nccl: rows stay on the ranks' GPUs and travel from GPU to GPU, each rank "
         "with one "
         "of its own: nvlink by stores into the memory of GPUs of the same host, nccl by NCCL, also between "
         "hosts; "
         "everything else goes over shm+tcp. Both need runtime.device = cuda and model.dtype = bf16."},
    {.key = "comm.timeout_ms",
     .member = SLUICE_MEMBER(comm.timeout_ms),
     .unit = "ms",
     .range = between(1, 86400000),
     .default_text = "30000",
     .kind = Kind::kAgreed,
     .doc = "A wait for another rank that lasts longer ends the job with an error that names the rank."},
    {.key = "comm.rendezvous",
     .member = SLUICE_MEMBER(comm.rendezvous),
     .default_text = "",
     .kind = Kind::kLocal,
     .doc = "HOST:PORT at rank 0's host where the processes of a job meet; empty: where the launcher says, "
            "or on "
            "one host by themselves. Needs comm.secret_file."},
    {.key = "comm.secret_file",
     .member = SLUICE_MEMBER(comm.secret_file),
     .default_text = "",
     .kind = Kind::kLocal,
     .doc = "File of mode 0600 with the job's secret, which a process must know to join; empty: the "
            "launcher's."},
    {.key = "comm.wire_dtype",
     .member = SLUICE_ENUM(comm.wire_dtype),
     .allowed = kWireDTypes,
     .default_text = "rows",
     .kind = Kind::kSemantic,
     .doc = "Of rows on their way to experts, forward and backward; rows: as model.dtype."},
    {.key = "comm.combine_dtype",
     .member = SLUICE_ENUM(comm.combine_dtype),
     .allowed = kWireDTypes,
     .default_text = "rows",
     .kind = Kind::kSemantic,
     .doc = "Of partial sums on their way home, forward and backward; rows: as model.dtype."},
    {.key = "comm.deterministic",
     .member = SLUICE_MEMBER(comm.deterministic),
     .default_text = "true",
     .kind = Kind::kSemantic,
     .doc =
         "Sums over ranks have one fixed order, so runs are bit-identical; false lets a vendor's collective "
         "choose."},

    // ---- schedule ----
    {.key = "schedule.policy",
     .member = SLUICE_ENUM(schedule.policy),
     .allowed = kSchedulePolicies,
     .default_text = "sequential",
     .kind = Kind::kAgreed,
     .doc =
         "sequential: dispatch, experts, combine one after the other. pipelined: rows in equal chunks, one "
         "computes while the next travels. by-source: and own rows compute while remote rows travel, remote "
         "rows' results go home first. hierarchical: and remote rows apart by level. auto: policy and "
         "chunks are chosen plan by plan by the cost model, from schedule.profile or else from a measurement "
         "at the start. All give the same "
         "bits."},
    {.key = "schedule.num_chunks",
     .member = SLUICE_MEMBER(schedule.num_chunks),
     .unit = "chunks",
     .range = between(1, 256),
     .default_text = "2",
     .kind = Kind::kAgreed,
     .doc = "Parts into which the rows of one transfer are cut; a sequential schedule has 1."},
    {.key = "schedule.chain_chunks",
     .member = SLUICE_MEMBER(schedule.chain_chunks),
     .unit = "chunks",
     .range = between(1, 256),
     .default_text = "1",
     .kind = Kind::kAgreed,
     .doc = "Parts into which a chain's tokens are cut: an iteration of one part overlaps with the transfers "
            "of another. With the official variant of relu a chain has 1."},
    {.key = "schedule.exchange",
     .member = SLUICE_ENUM(schedule.exchange),
     .allowed = kExchanges,
     .default_text = "gateway",
     .kind = Kind::kAgreed,
     .doc = "gateway: a row crosses to a node once and one rank there hands it on. direct: a row is sent to "
            "each "
            "rank that needs it."},

    {.key = "schedule.profile",
     .member = SLUICE_MEMBER(schedule.profile),
     .unit = "path",
     .default_text = "",
     .kind = Kind::kAgreed,
     .doc = "Machine profile that `sluice info --probe -o FILE` wrote: what predictions are made from. Rank "
            "0 reads it. "
            "Empty: what machine and topology declare."},

    // ---- machine ----
    {.key = "machine.name",
     .member = SLUICE_MEMBER(machine.name),
     .default_text = "",
     .kind = Kind::kAgreed,
     .doc = "What the declared machine is called in reports."},
    {.key = "machine.source",
     .member = SLUICE_MEMBER(machine.source),
     .default_text = "",
     .kind = Kind::kAgreed,
     .doc = "Where the declared figures come from; reports print it."},
    {.key = "machine.gemm_flops_per_s",
     .member = SLUICE_MEMBER(machine.gemm_flops_per_s),
     .unit = "flops/s",
     .range = between(0, 1e18),
     .default_text = "0",
     .kind = Kind::kAgreed,
     .doc = "Declared arithmetic of a rank's expert GEMMs. 0: not declared."},
    {.key = "machine.memory_bytes_per_s",
     .member = SLUICE_MEMBER(machine.memory_bytes_per_s),
     .unit = "bytes/s",
     .range = between(0, 1e15),
     .default_text = "0",
     .kind = Kind::kAgreed,
     .doc = "Declared memory bandwidth of a rank: packing, reducing, and the least time of an expert's "
            "weights. 0: not "
            "declared."},
    {.key = "machine.op_us",
     .member = SLUICE_MEMBER(machine.op_us),
     .unit = "us",
     .range = between(0, 1e6),
     .default_text = "0",
     .kind = Kind::kAgreed,
     .doc = "Declared cost of starting any op, such as a kernel launch."},
    {.key = "machine.message_us",
     .member = SLUICE_MEMBER(machine.message_us),
     .unit = "us",
     .range = between(0, 1e6),
     .default_text = "0",
     .kind = Kind::kAgreed,
     .doc = "Declared time for which any message holds its link besides its bytes."},

    // ---- runtime ----
    {.key = "runtime.device",
     .member = SLUICE_ENUM(runtime.device),
     .allowed = kDevices,
     .default_text = "cpu",
     .kind = Kind::kLocal,
     .doc =
         "Where experts are computed: cpu, or cuda: a GPU of the node, taken in turns by its ranks; results "
         "agree with the CPU's within rounding. Between ranks rows then go through the node's memory, unless "
         "comm.transport is nvlink or nccl."},
    {.key = "runtime.threads_per_rank",
     .member = SLUICE_MEMBER(runtime.threads_per_rank),
     .unit = "threads",
     .range = between(1, 1024),
     .default_text = "1",
     .kind = Kind::kLocal,
     .doc = "Threads that compute for one rank."},
    {.key = "runtime.log_level",
     .member = SLUICE_ENUM(runtime.log_level),
     .allowed = kLogLevels,
     .default_text = "info",
     .kind = Kind::kLocal,
     .doc = "Lines less important than this are not printed."},
    {.key = "runtime.save",
     .member = SLUICE_ENUM(runtime.save),
     .allowed = kSaves,
     .default_text = "activations",
     .kind = Kind::kLocal,
     .doc = "What forward keeps for backward: activations (the inner rows of the experts), or rows only, and "
            "inner "
            "rows are computed again: less memory, more work, the same bits."},
    {.key = "runtime.progress",
     .member = SLUICE_ENUM(runtime.progress),
     .allowed = kProgressModes,
     .default_text = "auto",
     .kind = Kind::kLocal,
     .doc =
         "Who moves transfers along while a rank computes. auto: a thread where the transport needs the "
         "host's "
         "attention and a core is left for it; inline: the computing thread, between ops; thread: a thread "
         "of each rank."},
    {.key = "runtime.timeline",
     .member = SLUICE_MEMBER(runtime.timeline),
     .unit = "path",
     .default_text = "",
     .kind = Kind::kLocal,
     .doc = "File for a timeline of train and bench: Chrome trace JSON (opens in Perfetto), or a page for "
            "any browser "
            "if it ends in .html; empty: none."},

    // ---- train ----
    {.key = "train.steps",
     .member = SLUICE_MEMBER(train.steps),
     .unit = "steps",
     .range = between(1, 1e9),
     .default_text = "300",
     .kind = Kind::kSemantic,
     .doc = "Optimizer steps; the learning rate falls to its end by then."},
    {.key = "train.seed",
     .member = SLUICE_MEMBER(train.seed),
     .range = between(0, 9007199254740992.0),
     .default_text = "1",
     .kind = Kind::kSemantic,
     .doc = "Of the weights and of the order of the text."},
    {.key = "train.tokens_per_step",
     .member = SLUICE_MEMBER(train.tokens_per_step),
     .unit = "tokens",
     .range = between(1, 1e9),
     .default_text = "2048",
     .kind = Kind::kSemantic,
     .doc = "Tokens of one step over all ranks; which tokens does not depend on the number of ranks."},
    {.key = "train.learning_rate",
     .member = SLUICE_MEMBER(train.learning_rate),
     .range = between(0, 10),
     .default_text = "3e-3",
     .kind = Kind::kSemantic,
     .doc = "Highest learning rate."},
    {.key = "train.warmup_steps",
     .member = SLUICE_MEMBER(train.warmup_steps),
     .unit = "steps",
     .range = between(0, 1e9),
     .default_text = "20",
     .kind = Kind::kSemantic,
     .doc = "The learning rate rises linearly over these steps, then falls as a cosine. A job with fewer "
            "steps ends "
            "while it rises."},
    {.key = "train.min_learning_rate_ratio",
     .member = SLUICE_MEMBER(train.min_learning_rate_ratio),
     .range = between(0, 1),
     .default_text = "0.1",
     .kind = Kind::kSemantic,
     .doc = "Learning rate of the last step as a share of the highest."},
    {.key = "train.weight_decay",
     .member = SLUICE_MEMBER(train.weight_decay),
     .range = between(0, 10),
     .default_text = "0.01",
     .kind = Kind::kSemantic,
     .doc = "Decoupled weight decay (arXiv 1711.05101)."},
    {.key = "train.beta1",
     .member = SLUICE_MEMBER(train.beta1),
     .range = from_to_below(0, 1),
     .default_text = "0.9",
     .kind = Kind::kSemantic,
     .doc = "AdamW: decay of the mean of the gradient."},
    {.key = "train.beta2",
     .member = SLUICE_MEMBER(train.beta2),
     .range = from_to_below(0, 1),
     .default_text = "0.95",
     .kind = Kind::kSemantic,
     .doc = "AdamW: decay of the mean of its square."},
    {.key = "train.epsilon",
     .member = SLUICE_MEMBER(train.epsilon),
     .range = above(0),
     .default_text = "1e-8",
     .kind = Kind::kSemantic,
     .doc = "AdamW: added to the root of the mean square."},
    {.key = "train.grad_clip",
     .member = SLUICE_MEMBER(train.grad_clip),
     .range = at_least(0),
     .default_text = "1.0",
     .kind = Kind::kSemantic,
     .doc = "Gradients are scaled down to this norm over all parameters; 0: never."},
    {.key = "train.heldout_fraction",
     .member = SLUICE_MEMBER(train.heldout_fraction),
     .range = above_to_below(0, 1),
     .default_text = "0.1",
     .kind = Kind::kSemantic,
     .doc = "Share of the text, in blocks spread over it, that is never trained on and on which heldout_bpb "
            "is measured."},
    {.key = "train.deal",
     .member = SLUICE_ENUM(train.deal),
     .allowed = kDeals,
     .default_text = "random",
     .kind = Kind::kSemantic,
     .doc =
         "Which rank is home to which of a step's tokens, the same tokens either way. random: as drawn, so "
         "every rank has all kinds of text. by_position: in order of their place in the text, so that the "
         "first rank has its beginning; where kinds of text follow one another each node trains on its own."},
    {.key = "train.text",
     .member = SLUICE_MEMBER(train.text),
     .unit = "path",
     .default_text = "",
     .kind = Kind::kLocal,
     .doc = "File with the text to train on, or a directory whose text files are taken; `--text` is the "
            "same. Empty: the sources this program was built from, else the current directory."},
    {.key = "train.max_text_bytes",
     .member = SLUICE_MEMBER(train.max_text_bytes),
     .unit = "bytes",
     .range = between(1024, 1e12),
     .default_text = "67108864",
     .kind = Kind::kSemantic,
     .doc = "Of a longer text only the first so many bytes are used."},
    {.key = "train.report",
     .member = SLUICE_MEMBER(train.report),
     .unit = "path",
     .default_text = "",
     .kind = Kind::kLocal,
     .doc = "File for the report (JSON) at the end, which rank 0 writes beside what it prints; empty: none."},
    {.key = "train.checkpoint_dir",
     .member = SLUICE_MEMBER(train.checkpoint_dir),
     .unit = "path",
     .default_text = "",
     .kind = Kind::kAgreed,
     .doc =
         "Folder for checkpoints, which all ranks must see; empty: none are saved. `sluice train --resume` "
         "goes on from the newest (docs/faults.md)."},
    {.key = "train.checkpoint_every",
     .member = SLUICE_MEMBER(train.checkpoint_every),
     .unit = "steps",
     .range = between(0, 1e9),
     .default_text = "100",
     .kind = Kind::kAgreed,
     .doc = "A checkpoint is saved after so many steps, and after the last; 0: after the last only."},
    {.key = "train.checkpoint_keep",
     .member = SLUICE_MEMBER(train.checkpoint_keep),
     .unit = "checkpoints",
     .range = between(1, 1e6),
     .default_text = "2",
     .kind = Kind::kAgreed,
     .doc = "So many checkpoints are kept, the newest; older ones are deleted."},
    {.key = "train.on_failure",
     .member = SLUICE_ENUM(train.on_failure),
     .allowed = kOnFailure,
     .default_text = "stop",
     .kind = Kind::kAgreed,
     .doc = "When a rank is lost. stop: the job ends with an error that names it. shrink: the ranks that are "
            "left form "
            "a new group, go back to the newest checkpoint and go on; needs train.checkpoint_dir and a "
            "transport whose "
            "ranks survive the loss of one (local, shm, tcp; not mpi)."},

    // ---- bench ----
    {.key = "bench.tokens_per_rank",
     .member = SLUICE_MEMBER(bench.tokens_per_rank),
     .unit = "tokens",
     .range = between(0, 1e8),
     .default_text = "1024",
     .kind = Kind::kSemantic,
     .doc = "Tokens whose home is a rank."},
    {.key = "bench.top_k",
     .member = SLUICE_MEMBER(bench.top_k),
     .unit = "experts per token",
     .range = between(1, 65536),
     .default_text = "2",
     .kind = Kind::kSemantic,
     .doc = "Experts that each token visits, all different."},
    {.key = "bench.skew",
     .member = SLUICE_MEMBER(bench.skew),
     .range = between(0, 10),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc = "Experts are drawn with probability proportional to 1 / (id + 1)^skew; 0: uniform."},
    {.key = "bench.popularity",
     .member = SLUICE_MEMBER(bench.popularity),
     .unit = "path",
     .default_text = "",
     .kind = Kind::kSemantic,
     .doc = "File with one number an expert, separated by white space: experts are drawn with probability "
            "proportional to it, in place of bench.skew. Counts of a real model are such numbers."},
    {.key = "bench.replay",
     .member = SLUICE_MEMBER(bench.replay),
     .unit = "path",
     .default_text = "",
     .kind = Kind::kSemantic,
     .doc = "Recorded routing (docs/trace.md) in place of drawn one: a rank has the tokens of its source "
            "where the trace "
            "has as many sources as there are ranks, else tokens are dealt in turn. tokens_per_rank, top_k, "
            "skew and "
            "popularity have no effect then."},
    {.key = "bench.replay_layer",
     .member = SLUICE_MEMBER(bench.replay_layer),
     .range = between(0, 65535),
     .default_text = "0",
     .kind = Kind::kSemantic,
     .doc = "Layer of the trace that bench.replay names."},
    {.key = "bench.iterations",
     .member = SLUICE_MEMBER(bench.iterations),
     .unit = "runs",
     .range = between(1, 1e6),
     .default_text = "20",
     .kind = Kind::kSemantic,
     .doc = "Measured pairs of a scheduled and a sequential run."},
    {.key = "bench.warmup",
     .member = SLUICE_MEMBER(bench.warmup),
     .unit = "runs",
     .range = between(0, 1e6),
     .default_text = "3",
     .kind = Kind::kSemantic,
     .doc = "Pairs before these that are not counted."},
    {.key = "bench.seed",
     .member = SLUICE_MEMBER(bench.seed),
     .range = between(0, 9007199254740992.0),
     .default_text = "1",
     .kind = Kind::kSemantic,
     .doc = "Of rows, weights and routing."},
};

#undef SLUICE_MEMBER
#undef SLUICE_ENUM

template <typename... Parts>
[[noreturn]] void fail(std::string_view where, const Parts&... parts) {
  throw Error(ErrorCode::kInvalidConfig, str(where, ": ", parts...));
}

// "integer in 0..4 (ranks)": what the row wants, for errors.
std::string wanted(const Row& row) {
  std::string out = type_text(row);
  if (const std::string allowed = allowed_text(row); !allowed.empty()) out += str(" (", allowed, ")");
  return out;
}

bool in_range(const Range& range, double value) {
  return (range.min_open ? value > range.min : value >= range.min) &&
         (range.max_open ? value < range.max : value <= range.max);
}

// The whole of `text` as a decimal number.
template <typename Number>
std::errc parse_number(std::string_view text, Number& out) {
  const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), out);
  if (ec != std::errc{}) return ec;
  return end == text.data() + text.size() ? std::errc{} : std::errc::invalid_argument;
}

std::int64_t integer_from_text(const Row& row, std::string_view text, std::string_view where) {
  std::int64_t value = 0;
  const std::errc ec = parse_number(text, value);
  if (ec == std::errc::result_out_of_range)
    fail(where, row.key, " is ", quoted(text), ", which is too large; must be ", wanted(row));
  if (ec != std::errc{}) fail(where, row.key, " is ", quoted(text), "; must be ", wanted(row));
  return value;
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  return text;
}

// Splits "a,b,[c,d]" at the commas that are in no bracket. An empty text has no items.
std::vector<std::string_view> split_items(std::string_view text) {
  std::vector<std::string_view> items;
  if (trimmed(text).empty()) return items;
  int depth = 0;
  std::size_t begin = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '[') ++depth;
    if (text[i] == ']') --depth;
    if (text[i] == ',' && depth == 0) {
      items.push_back(trimmed(text.substr(begin, i - begin)));
      begin = i + 1;
    }
  }
  items.push_back(trimmed(text.substr(begin)));
  return items;
}

// The inside of "[...]".
std::string_view list_body(const Row& row, std::string_view whole, std::string_view text,
                           std::string_view where) {
  text = trimmed(text);
  if (text.size() < 2 || text.front() != '[' || text.back() != ']')
    fail(where, row.key, " is ", quoted(whole), "; must be ", wanted(row));
  return text.substr(1, text.size() - 2);
}

std::vector<std::int64_t> list_from_text(const Row& row, std::string_view whole, std::string_view text,
                                         std::string_view where) {
  std::vector<std::int64_t> values;
  for (const std::string_view item : split_items(list_body(row, whole, text, where))) {
    std::int64_t value = 0;
    if (parse_number(item, value) != std::errc{})
      fail(where, row.key, " is ", quoted(whole), ", where ", quoted(item), " is not an integer; must be ",
           wanted(row));
    values.push_back(value);
  }
  return values;
}

std::string ints_text(std::span<const std::int32_t> values) {
  std::string out = "[";
  for (std::size_t i = 0; i < values.size(); ++i) out += str(i ? ", " : "", values[i]);
  return out + "]";
}

void set_nodes_from_text(const Row& row, Config& config, std::string_view text, std::string_view where) {
  NodesSpec& nodes = std::get<Member<NodesSpec>>(row.member)(config);
  const std::string_view body = trimmed(text);
  if (!body.empty() && body.front() == '[') {
    std::vector<std::vector<std::int64_t>> lists;
    for (const std::string_view item : split_items(list_body(row, text, body, where)))
      lists.push_back(list_from_text(row, text, item, where));
    set_node_lists(row, config, lists, where);
    return;
  }
  const std::size_t x = text.find('x');
  if (x == std::string_view::npos) {
    set_integer(row, config, integer_from_text(row, text, where), where);
    return;
  }
  std::int32_t num_nodes = 0;
  std::int32_t ranks_per_node = 0;
  if (parse_number(text.substr(0, x), num_nodes) != std::errc{} ||
      parse_number(text.substr(x + 1), ranks_per_node) != std::errc{} || num_nodes < 1 ||
      ranks_per_node < 1 || std::int64_t{num_nodes} * ranks_per_node > kMaxRanks)
    fail(where, row.key, " is ", quoted(text), "; must be ", wanted(row));
  nodes = {.num_nodes = num_nodes, .ranks_per_node = ranks_per_node, .lists = {}};
}

// Optimal string alignment distance.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<std::size_t>> d(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) d[i][0] = i;
  for (std::size_t j = 0; j <= b.size(); ++j) d[0][j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    for (std::size_t j = 1; j <= b.size(); ++j) {
      d[i][j] =
          std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  }
  return d[a.size()][b.size()];
}

template <typename... Cases>
struct Overloaded : Cases... {
  using Cases::operator()...;
};
template <typename... Cases>
Overloaded(Cases...) -> Overloaded<Cases...>;

}  // namespace

std::string_view to_string(Kind kind) {
  switch (kind) {
    case Kind::kSemantic:
      return "semantic";
    case Kind::kAgreed:
      return "agreed";
    case Kind::kLocal:
      return "local";
  }
  return "unknown kind";
}

std::span<const Section> sections() {
  return kSections;
}
std::span<const Row> rows() {
  return kRows;
}

const Row* find(std::string_view key) {
  for (const Row& row : kRows)
    if (row.key == key) return &row;
  return nullptr;
}

std::string environment_name(std::string_view key) {
  std::string out = "SLUICE_";
  for (const char c : key)
    out += c == '.' ? '_' : (c >= 'a' && c <= 'z') ? static_cast<char>(c - 'a' + 'A') : c;
  return out;
}

std::string type_text(const Row& row) {
  return std::visit(
      Overloaded{[](Member<std::int32_t>) { return "an integer"; },
                 [](Member<std::int64_t>) { return "an integer"; }, [](Member<double>) { return "a number"; },
                 [](Member<bool>) { return "true or false"; },
                 [&](Member<std::string>) { return row.allowed.empty() ? "a text" : "one of"; },
                 [](EnumMember) { return "one of"; },
                 [](Member<std::vector<std::int32_t>>) { return "a list of integers"; },
                 [](Member<NodesSpec>) {
                   return "nodes: lists of ranks [[0,1],[2,3]], \"2x2\" (nodes x ranks of each) or a "
                          "number of equal nodes";
                 }},
      row.member);
}

std::string allowed_text(const Row& row) {
  std::string out;
  if (!row.allowed.empty()) {
    for (const std::string_view text : row.allowed) out += str(out.empty() ? "" : ", ", text);
    return out;
  }
  const Range& r = row.range;
  const bool integer = !std::holds_alternative<Member<double>>(row.member);
  const bool has_min = std::isfinite(r.min);
  const bool has_max = std::isfinite(r.max);
  const auto number = [&](double value) {
    return integer ? str(static_cast<std::int64_t>(value)) : str(value);
  };
  if (has_min && has_max && !r.min_open && !r.max_open) return str(number(r.min), "..", number(r.max));
  if (has_min) out += str(r.min_open ? "above " : "at least ", number(r.min));
  if (has_max) out += str(out.empty() ? "" : ", ", r.max_open ? "below " : "at most ", number(r.max));
  return out;
}

std::string value_text(const Row& row, const Config& config) {
  // The accessors give references to change; reading through them changes nothing.
  Config& values = const_cast<Config&>(config);
  return std::visit(
      Overloaded{[&](EnumMember member) { return std::string(row.allowed[member.get(config)]); },
                 [&](Member<std::string> member) { return member(values); },
                 [&](Member<std::vector<std::int32_t>> member) { return ints_text(member(values)); },
                 [&](Member<NodesSpec> member) {
                   const NodesSpec& nodes = member(values);
                   if (nodes.lists.empty())
                     return nodes.ranks_per_node > 0 ? str(nodes.num_nodes, "x", nodes.ranks_per_node)
                                                     : str(nodes.num_nodes);
                   std::string out = "[";
                   for (const auto& ranks : nodes.lists)
                     out += str(out.size() > 1 ? ", " : "", ints_text(ranks));
                   return out + "]";
                 },
                 [&](auto member) { return str(member(values)); }},
      row.member);
}

void set_integer(const Row& row, Config& config, std::int64_t value, std::string_view where) {
  if (const auto* nodes = std::get_if<Member<NodesSpec>>(&row.member)) {
    if (value < 0 || value > kMaxRanks) fail(where, row.key, " is ", value, "; must be ", wanted(row));
    (*nodes)(config) = {.num_nodes = static_cast<std::int32_t>(value), .ranks_per_node = 0, .lists = {}};
    return;
  }
  if (!in_range(row.range, static_cast<double>(value)))
    fail(where, row.key, " is ", value, "; must be ", wanted(row));
  if (const auto* small = std::get_if<Member<std::int32_t>>(&row.member))
    (*small)(config) = static_cast<std::int32_t>(value);
  else
    std::get<Member<std::int64_t>>(row.member)(config) = value;
}

void set_number(const Row& row, Config& config, double value, std::string_view where) {
  if (!std::isfinite(value) || !in_range(row.range, value))
    fail(where, row.key, " is ", value, "; must be ", wanted(row));
  // -0 becomes 0: they are one value, and must be one text and one hash.
  std::get<Member<double>>(row.member)(config) = value + 0.0;
}

void set_list(const Row& row, Config& config, const std::vector<std::int64_t>& value,
              std::string_view where) {
  std::vector<std::int32_t> out;
  for (std::size_t i = 0; i < value.size(); ++i) {
    if (!in_range(row.range, static_cast<double>(value[i])))
      fail(where, row.key, "[", i, "] is ", value[i], "; must be ", wanted(row));
    out.push_back(static_cast<std::int32_t>(value[i]));
  }
  std::get<Member<std::vector<std::int32_t>>>(row.member)(config) = std::move(out);
}

void set_node_lists(const Row& row, Config& config, const std::vector<std::vector<std::int64_t>>& value,
                    std::string_view where) {
  NodesSpec nodes;
  for (const auto& ranks : value) {
    std::vector<std::int32_t>& out = nodes.lists.emplace_back();
    for (const std::int64_t rank : ranks) {
      if (rank < 0 || rank >= kMaxRanks)
        fail(where, row.key, " names rank ", rank, "; ranks must be 0..", kMaxRanks - 1);
      out.push_back(static_cast<std::int32_t>(rank));
    }
  }
  nodes.num_nodes = static_cast<std::int32_t>(nodes.lists.size());
  try {
    static_cast<void>(Topology(nodes.lists));
  } catch (const Error& e) {
    fail(where, row.key, ": ", e.message());
  }
  std::get<Member<NodesSpec>>(row.member)(config) = std::move(nodes);
}

void set_from_text(const Row& row, Config& config, std::string_view text, std::string_view where) {
  const auto choose = [&]() -> std::size_t {
    const auto found = std::find(row.allowed.begin(), row.allowed.end(), text);
    if (found == row.allowed.end()) {
      const std::string_view meant = did_you_mean(text, row.allowed);
      fail(where, row.key, " is ", quoted(text), "; must be ", wanted(row),
           meant.empty() ? "" : str("; did you mean ", meant, "?"));
    }
    return static_cast<std::size_t>(found - row.allowed.begin());
  };
  std::visit(
      Overloaded{
          [&](Member<std::int32_t>) { set_integer(row, config, integer_from_text(row, text, where), where); },
          [&](Member<std::int64_t>) { set_integer(row, config, integer_from_text(row, text, where), where); },
          [&](Member<double>) {
            double value = 0;
            const std::errc ec = parse_number(text, value);
            if (ec == std::errc::result_out_of_range)
              fail(where, row.key, " is ", quoted(text), ", which a double cannot hold; must be ",
                   wanted(row));
            if (ec != std::errc{}) fail(where, row.key, " is ", quoted(text), "; must be ", wanted(row));
            set_number(row, config, value, where);
          },
          [&](Member<bool> member) {
            if (text != "true" && text != "false")
              fail(where, row.key, " is ", quoted(text), "; must be ", wanted(row));
            member(config) = text == "true";
          },
          [&](Member<std::string> member) {
            if (!row.allowed.empty()) choose();
            if (text.find('\0') != std::string_view::npos)
              fail(where, row.key, " contains a NUL byte; must be ", wanted(row));
            member(config) = std::string(text);
          },
          [&](EnumMember member) { member.set(config, choose()); },
          [&](Member<std::vector<std::int32_t>>) {
            set_list(row, config, list_from_text(row, text, text, where), where);
          },
          [&](Member<NodesSpec>) { set_nodes_from_text(row, config, text, where); }},
      row.member);
}

std::string quoted(std::string_view text) {
  constexpr std::size_t kMaxShown = 60;
  std::size_t shown = std::min(text.size(), kMaxShown);
  const auto continues_character = [&](std::size_t i) {
    return (static_cast<unsigned char>(text[i]) & 0xc0) == 0x80;
  };
  while (shown > 0 && shown < text.size() && continues_character(shown)) --shown;
  std::string out = "\"";
  for (const char c : text.substr(0, shown)) {
    if (c == '\n')
      out += "\\n";
    else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f)
      out += "?";
    else
      out += c;
  }
  if (text.size() > shown) out += "...";
  return out + "\"";
}

std::string_view did_you_mean(std::string_view word, std::span<const std::string_view> candidates,
                              std::size_t max_distance) {
  constexpr std::size_t kMaxWord = 64;  // nobody meant a key with something longer; keeps the table small
  if (word.size() > kMaxWord) return {};
  std::string_view best;
  std::size_t best_distance = 0;
  for (const std::string_view candidate : candidates) {
    const std::size_t distance = edit_distance(word, candidate);
    if (best.empty() || distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  const std::size_t third = std::max<std::size_t>(1, std::max(word.size(), best.size()) / 3);
  return best_distance <= std::min(third, max_distance) ? best : std::string_view{};
}

}  // namespace sluice::config_schema

namespace sluice {

Config::Config()
    : model(),
      routing(),
      placement(),
      topology(),
      comm(),
      schedule(),
      machine(),
      runtime(),
      train(),
      bench() {
  for (const config_schema::Row& row : config_schema::rows())
    config_schema::set_from_text(row, *this, row.default_text, "default");
}

}  // namespace sluice
