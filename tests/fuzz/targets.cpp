#include "targets.hpp"

#include <cstring>
#include <sstream>

#include "plan_harness.hpp"
#include "sluice/base/config.hpp"
#include "sluice/comm/wire.hpp"
#include "sluice/runtime/src/trace/routing_trace.hpp"
#include "sluice/runtime/src/train/checkpoint_format.hpp"
#include "sluice/scheduler/cost_model.hpp"
#include "sluice/scheduler/placement_file.hpp"
#include "sluice/scheduler/statistics.hpp"

namespace sluice::fuzz {
namespace {

// ---- checkpoints -----------------------------------------------------------------------------------------------------

train::CheckpointManifest small_manifest() {
  train::CheckpointManifest m;
  m.nonce = 42;
  m.step = 3;
  m.seed = 7;
  m.next_token = 120;
  m.text_bytes = 6000;
  m.text_hash = 1;
  m.config_hash = 2;
  m.semantic = {{"model.hidden", "12"}, {"train.seed", "7"}};
  m.adaptive = {{1e-3}};
  m.world = "2 ranks on 1 node";
  m.shards = {{"shard-42-00000.bin", 4096}, {"shard-42-00001.bin", 2048}};
  m.sections = {{"embedding/value", "f32", 0, 64, 16, 5, 11},
                {"layer.0.expert.1.w1/m", "f32", 1, 128, 8, 12, 12},
                {"history", "f64", 0, 1024, 3, 11, 13}};
  return m;
}

// Gives the first line the size and checksum of what follows it.
void mend_manifest(std::string& text) {
  const std::size_t end = text.find('\n');
  if (end == std::string::npos) return;
  const std::string body = text.substr(end + 1);
  std::ostringstream sum;
  sum << std::hex << train::checksum(std::as_bytes(std::span(body)));
  const std::string digits = sum.str();
  text = str("sluice-checkpoint 1 ", body.size(), " ", std::string(16 - digits.size(), '0') + digits, "\n",
             body);
}

Target manifest_target() {
  return {"checkpoint_manifest",
          [](const std::string& input) {
            const train::CheckpointManifest m = train::parse_manifest(input, "fuzz");
            // What was taken can be written and read back to the same.
            const std::string text = train::to_text(m);
            Require(train::to_text(train::parse_manifest(text, "again")) == text, ErrorCode::kInternal,
                    "a manifest does not survive being written");
          },
          {train::to_text(small_manifest())},
          mend_manifest};
}

Target shard_target() {
  const train::CheckpointManifest m = small_manifest();
  const std::vector<std::byte> header = train::shard_header(m, 1, 2048);
  return {"checkpoint_shard",
          [m](const std::string& input) {
            train::check_shard_header(std::as_bytes(std::span(input)), m, 1, "fuzz");
          },
          {std::string(reinterpret_cast<const char*>(header.data()), header.size())},
          {}};
}

// ---- files of the user -----------------------------------------------------------------------------------------------

// One text a section: a whole configuration is longer than an input may be.
std::vector<std::string> sections_of(const std::string& text) {
  std::vector<std::string> out;
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t next = text.find("\n[", begin);
    const std::size_t end = next == std::string::npos ? text.size() : next + 1;
    out.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  return out;
}

Target config_target() {
  std::vector<std::string> seeds = sections_of(effective_text(LoadedConfig()));
  seeds.push_back(
      "[topology]\nnodes = [[0,1],[2]]\n[placement]\nslots_per_rank = [4, 0, "
      "12]\n[train]\nlearning_rate = 1e-3\n");
  seeds.push_back(
      "[comm]\nwire_dtype = \"bf16\"\ntimeout_ms = 5_000\n[routing]\npolicy = \"softmax_topk\"\nz_loss "
      "= 0.1\n");
  return {"config",
          [](const std::string& input) {
            const LoadedConfig loaded = parse_config(input, "fuzz");
            const std::string text = effective_text(loaded);
            Require(semantic_values(parse_config(text, "again").config) == semantic_values(loaded.config),
                    ErrorCode::kInternal, "a configuration does not survive being written");
          },
          std::move(seeds),
          {}};
}

// --set section.key=value, and the environment: a text for a key.
Target set_target() {
  return {"config_set",
          [](const std::string& input) {
            const std::vector<std::string> sets = {input};
            (void)parse_config("", "fuzz", sets);
          },
          {"topology.nodes=[[0,1],[2,3]]", "topology.nodes=2x2", "placement.slots_per_rank=[4,0,12]",
           "train.learning_rate=3e-3", "comm.deterministic=true", "train.text=a b",
           "machine.gemm_flops_per_s=1e12"},
          {}};
}

Target trace_target() {
  std::ostringstream seed;
  TraceWriter writer(seed, 2, 16);
  Routing routing;
  routing.num_experts = 16;
  routing.row_ptr = {0, 2, 2, 3};
  routing.expert = {1, 9, 3};
  routing.weight = {0.5f, 0.25f, 1.0f};
  for (std::int32_t layer = 0; layer < 2; ++layer) writer.write(layer, 0, routing);
  writer.finish();
  return {"routing_trace",
          [](const std::string& input) {
            std::istringstream in(input);
            const RoutingTrace trace = read_trace(in, "fuzz", 100'000);
            std::ostringstream out;
            TraceWriter writer(out, trace.num_layers, trace.num_experts);
            for (std::int32_t l = 0; l < trace.num_layers; ++l)
              for (std::int32_t s = 0; s < trace.num_sources(); ++s)
                writer.write(l, s, trace.layers[static_cast<std::size_t>(l)][static_cast<std::size_t>(s)]);
            writer.finish();
          },
          {seed.str(), "sluice-trace 1 layers 2 experts 16\n# c\n0 0 1:0.5 9:0.5\n0 1 3:1\n0 0\n1 0 2:1\n"},
          {}};
}

Target profile_target() {
  MachineProfile profile;
  profile.name = "declared";
  profile.roofline = GemmRoofline{1e12, 1e10};
  profile.gather = profile.reduce = profile.activation_backward = Curve::line(1, 1e4);
  profile.in_node.occupied = profile.across_nodes.occupied = Curve::line(2, 1e3);
  return {"profile",
          [](const std::string& input) { (void)parse_profile(input, "fuzz").to_json(); },
          {profile.to_json()},
          {}};
}

Target placement_target() {
  PlacementFile file;
  file.planner = "sluice";
  file.num_experts = 4;
  file.nodes = {{0}, {1}};
  file.layers = {{0, {{0, 1}, {2, 3, 0}}}, {2, {{3, 1}, {2, 0}}}};
  return {"placement_file",
          [](const std::string& input) { (void)parse_placement(input, "fuzz").to_json(); },
          {file.to_json()},
          {}};
}

Target statistics_target() {
  RoutingStatistics statistics;
  statistics.description = "drawn";
  statistics.num_experts = 3;
  statistics.tokens_of_source = {4, 2};
  LayerStatistics layer;
  layer.counts = {3, 2, 1};
  layer.coactivation = {0, 1, 0, 1, 0, 0, 0, 0, 0};
  layer.transitions = {1, 0, 0, 0, 1, 0, 0, 0, 1};
  layer.demand = {2, 1, 1, 1, 1, 0};
  statistics.layers = {layer};
  statistics.sample = {{7, 0, {0, 2}, {2}}, {9, 1, {1}, {1}}};
  return {"routing_statistics",
          [](const std::string& input) { (void)parse_statistics(input, "fuzz").to_json(); },
          {statistics.to_json(), "{\"expert_counts\": {\"0\": [1, 2, 3]}, \"top_k\": 2}"},
          {}};
}

// ---- what ranks and strangers say over sockets -----------------------------------------------------------------------

std::string text_of(const comm::wire::Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Whatever a parser takes for a message says the same once it is written and read again.
template <typename Parse>
std::function<void(const std::string&)> round_trip(Parse parse) {
  return [parse](const std::string& input) {
    const auto message = parse(std::as_bytes(std::span(input)));
    if (!message) return;
    const auto bytes = comm::wire::encode(*message);
    const auto again = parse(std::as_bytes(std::span(bytes)));
    Require(again.has_value() && comm::wire::encode(*again) == bytes, ErrorCode::kInternal,
            "a message does not survive being written");
  };
}

std::vector<Target> wire_targets() {
  namespace wire = comm::wire;
  using Bytes = std::span<const std::byte>;
  std::vector<Target> out;
  out.push_back({"wire_server_hello",
                 round_trip([](Bytes b) { return wire::parse_server_hello(b); }),
                 {text_of(wire::encode(wire::ServerHello()))},
                 {}});
  wire::ClientHello hello;
  hello.job = 7;
  hello.rank = 1;
  out.push_back({"wire_client_hello",
                 round_trip([](Bytes b) { return wire::parse_client_hello(b); }),
                 {text_of(wire::encode(hello))},
                 {}});
  out.push_back({"wire_server_reply",
                 round_trip([](Bytes b) { return wire::parse_server_reply(b); }),
                 {text_of(wire::encode(wire::ServerReply()))},
                 {}});
  std::vector<std::string> requests;
  for (const auto kind : {wire::Request::Kind::kJoin, wire::Request::Kind::kPut, wire::Request::Kind::kGather,
                          wire::Request::Kind::kLeave}) {
    wire::Request request;
    request.kind = kind;
    request.text = "card/";
    request.value = "abc";
    request.count = 3;
    request.timeout_ms = 100;
    requests.push_back(text_of(wire::encode(request)));
  }
  out.push_back({"wire_request", round_trip([](Bytes b) { return wire::parse_request(b); }), requests, {}});
  wire::Reply values, failed;
  values.kind = wire::Reply::Kind::kValues;
  values.values = {"a", "", "ccc"};
  failed.kind = wire::Reply::Kind::kFailed;
  failed.code = ErrorCode::kTimeout;
  failed.text = "ranks 1, 2 did not come";
  out.push_back(
      {"wire_reply",
       round_trip([](Bytes b) { return wire::parse_reply(b); }),
       {text_of(wire::encode(values)), text_of(wire::encode(failed)), text_of(wire::encode(wire::Reply()))},
       {}});
  wire::Card card;
  card.host = "b";
  card.host_id = "id";
  card.pid = 4711;
  card.address = "127.0.0.1";
  card.port = 4000;
  card.path = "tcp";
  out.push_back({"wire_card",
                 round_trip([](Bytes b) {
                   return wire::parse_card({reinterpret_cast<const char*>(b.data()), b.size()});
                 }),
                 {wire::encode(card)},
                 {}});
  std::vector<std::string> controls;
  for (int kind = 1; kind <= 8; ++kind) {
    wire::Control control;
    control.kind = static_cast<wire::Control::Kind>(kind);
    control.epoch = 1;
    control.number = 5;
    control.ranks = {0, 2};
    control.culprit = 2;
    control.reporter = 0;
    control.phase = "dispatch";
    control.text = "rank 0 waited";
    controls.push_back(text_of(wire::encode(control)));
  }
  out.push_back(
      {"wire_control", round_trip([](Bytes b) { return wire::parse_control(b, 4, 1); }), controls, {}});
  std::string header(wire::kDataHeaderBytes, '\0');
  wire::DataHeader data;
  data.channel = 1;
  data.bytes = 4096;
  wire::encode(data, std::as_writable_bytes(std::span(header)).first<wire::kDataHeaderBytes>());
  out.push_back({"wire_data_header",
                 [](const std::string& input) {
                   if (input.size() < wire::kDataHeaderBytes) return;
                   (void)wire::parse_data_header(
                       std::as_bytes(std::span(input)).first<wire::kDataHeaderBytes>());
                 },
                 {header},
                 {}});
  return out;
}

// ---- plan messages of peers ------------------------------------------------------------------------------------------

const testing::World& world_of(std::size_t index) {
  static const std::vector<testing::World> kWorlds = [] {
    std::vector<testing::World> out;
    std::mt19937_64 rng(5);
    for (const auto& [ranks, nodes, experts] :
         std::vector<std::array<std::int32_t, 3>>{{2, 1, 4}, {4, 2, 6}, {3, 1, 5}, {6, 3, 8}}) {
      testing::World world{Topology::uniform(ranks, nodes), {}, {}};
      // The first expert has two copies.
      std::vector<std::vector<std::int32_t>> lists(static_cast<std::size_t>(ranks));
      for (std::int32_t e = 0; e < experts; ++e) lists[static_cast<std::size_t>(e % ranks)].push_back(e);
      lists.back().push_back(0);
      world.placement = placement_from_lists(experts, lists);
      for (std::int32_t r = 0; r < ranks; ++r)
        world.routings.push_back(testing::random_routing(rng, r == 1 ? 0 : 5, experts, 0, 3));
      out.push_back(std::move(world));
    }
    return out;
  }();
  return kWorlds[index % kWorlds.size()];
}

// The input: world, cut, then records {stage, receiver, index, value} that change what a rank receives.
void run_plan(const std::string& input) {
  struct Change {
    std::uint32_t stage_and_rank, index;
    std::int64_t value;
  };
  std::size_t at = 0;
  const auto byte = [&]() -> std::uint8_t {
    return at < input.size() ? static_cast<std::uint8_t>(input[at++]) : std::uint8_t{0};
  };
  const testing::World& world = world_of(byte());
  PlanOptions options;
  options.num_chunks = 1 + byte() % 3;
  options.exchange = byte() % 2 == 0 ? Exchange::kGateway : Exchange::kDirect;
  std::vector<Change> changes;
  while (at + sizeof(Change) <= input.size() && changes.size() < 16) {
    Change change;
    std::memcpy(&change, input.data() + at, sizeof change);
    at += sizeof change;
    changes.push_back(change);
  }
  const auto num_ranks = static_cast<std::uint32_t>(world.topology.num_ranks());
  const auto tamper = [&](int stage, std::size_t rank, auto& values) {
    using Value = std::remove_reference_t<decltype(values[0])>;
    for (const Change& change : changes) {
      if (values.empty() || static_cast<int>(change.stage_and_rank % 5) != stage ||
          change.stage_and_rank / 5 % num_ranks != rank)
        continue;
      Value& value = values[change.index % values.size()];
      // Half of them near what was there. Tokens that a rank claims are kept small: so many rows would be allocated.
      const auto near = [&] {
        if constexpr (std::is_integral_v<Value>) {
          using Bits = std::make_unsigned_t<Value>;  // may go round
          return static_cast<Value>(static_cast<Bits>(value) + static_cast<Bits>(change.value % 4));
        } else {
          return value + static_cast<Value>(change.value % 4);
        }
      };
      value = change.index / 65536 % 2 == 0 ? static_cast<Value>(change.value) : near();
      const auto stride = static_cast<std::size_t>(world.placement.num_experts) + 2;
      if (stage == 0 && change.index % values.size() % stride == 0 && value > 4096)
        value = static_cast<Value>(4096);
    }
  };
  auto builders = testing::make_builders(world, options);
  std::vector<Plan> plans;
  testing::build_plans(builders, world, plans, tamper, true);
  // Lies that nobody can see, such as another weight, leave a plan that holds together.
  for (const Plan& plan : plans) (void)plan.explain(64);
}

Target plan_target() {
  std::vector<std::string> seeds;
  for (char world = 0; world < 4; ++world)
    for (char stage = 0; stage < 5; ++stage) {
      std::string seed{world, 0, 0};
      for (std::uint32_t i = 0; i < 2; ++i) {
        const std::uint32_t head[2] = {static_cast<std::uint32_t>(stage) + 5 * i, 65536 + i};
        const std::int64_t value = 1;
        seed.append(reinterpret_cast<const char*>(head), sizeof head);
        seed.append(reinterpret_cast<const char*>(&value), sizeof value);
      }
      seeds.push_back(seed);
    }
  return {"plan_messages", run_plan, seeds, {}};
}

}  // namespace

const std::vector<Target>& targets() {
  static const std::vector<Target> kTargets = [] {
    std::vector<Target> out = {manifest_target(),   shard_target(),   config_target(),
                               set_target(),        trace_target(),   placement_target(),
                               statistics_target(), profile_target(), plan_target()};
    for (Target& target : wire_targets()) out.push_back(std::move(target));
    return out;
  }();
  return kTargets;
}

}  // namespace sluice::fuzz
