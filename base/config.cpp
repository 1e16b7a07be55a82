#include "sluice/base/config.hpp"

// toml++ 3.3 asserts what a broken file can break ("[" and then a line end), and where NDEBUG is set promises it to the
// optimiser. A broken file is to be an error.
#undef NDEBUG
namespace {
struct BrokenToml {};
void broken_toml() {
  throw BrokenToml();
}
}  // namespace
#define TOML_ASSERT(condition) ((condition) ? void() : broken_toml())
#include <toml++/toml.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "sluice/base/config_schema.hpp"
#include "sluice/base/error.hpp"
#include "sluice/base/hash.hpp"

extern char** environ;

namespace sluice {

namespace schema = config_schema;

namespace {

// How far an environment variable of no known section may be from a key and still be taken for a slip of it.
constexpr std::size_t kMaxSlips = 2;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Error(ErrorCode::kInvalidConfig, str(parts...));
}

std::size_t index_of(const schema::Row& row) {
  return static_cast<std::size_t>(&row - schema::rows().data());
}

// "; did you mean train.steps?" or a list of what there is.
std::string hint_for_key(std::string_view section, std::string_view name) {
  std::vector<std::string_view> in_section;
  std::vector<std::string_view> names;
  for (const schema::Row& row : schema::rows()) {
    if (row.section() != section) continue;
    in_section.push_back(row.key);
    names.push_back(row.name());
  }
  if (const std::string_view meant = schema::did_you_mean(name, names); !meant.empty())
    return str("; did you mean ", section, ".", meant, "?");
  for (const schema::Row& row : schema::rows())
    if (row.name() == name) return str("; did you mean ", row.key, "?");
  std::string out = str("; keys of ", section, ":");
  for (std::size_t i = 0; i < names.size(); ++i) out += str(i ? ", " : " ", names[i]);
  return out;
}

std::string hint_for_section(std::string_view section) {
  std::vector<std::string_view> names;
  for (const schema::Section& s : schema::sections()) names.push_back(s.name);
  if (const std::string_view meant = schema::did_you_mean(section, names); !meant.empty())
    return str("; did you mean ", meant, "?");
  std::string out = "; sections:";
  for (std::size_t i = 0; i < names.size(); ++i) out += str(i ? ", " : " ", names[i]);
  return out;
}

bool is_section(std::string_view name) {
  for (const schema::Section& s : schema::sections())
    if (s.name == name) return true;
  return false;
}

// The row of "section.key", or an error that begins with `where`.
const schema::Row& row_of(std::string_view key, std::string_view where) {
  if (const schema::Row* row = schema::find(key)) return *row;
  const std::size_t dot = key.find('.');
  if (dot == std::string_view::npos)
    fail(where, ": ", schema::quoted(key), " is not a key: keys are written section.key",
         hint_for_section(key));
  const std::string_view section = key.substr(0, dot);
  if (!is_section(section))
    fail(where, ": unknown section ", schema::quoted(section), hint_for_section(section));
  fail(where, ": unknown key ", schema::quoted(key), hint_for_key(section, key.substr(dot + 1)));
}

// ---- file
// ------------------------------------------------------------------------------------------------------------

std::string read_file(const std::filesystem::path& path) {
  const std::string name = path.string();
  std::error_code ec;
  Require(!std::filesystem::is_directory(path, ec), ErrorCode::kIo, name,
          ": is a directory, not a configuration file");
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(name.c_str(), "rb"), &std::fclose);
  if (!file) {
    const int error = errno;
    throw Error(error == ENOENT ? ErrorCode::kNotFound : ErrorCode::kIo,
                str(name, ": cannot be opened: ", std::strerror(error)));
  }
  // One byte more than allowed tells a file that is too large, also where the size is not known (a pipe).
  std::string text(kMaxConfigFileBytes + 1, '\0');
  const std::size_t size = std::fread(text.data(), 1, text.size(), file.get());
  Require(std::ferror(file.get()) == 0, ErrorCode::kIo, name, ": cannot be read: ", std::strerror(errno));
  if (size > kMaxConfigFileBytes)
    fail(name, ": is larger than ", kMaxConfigFileBytes, " bytes; a configuration is a small TOML text");
  text.resize(size);
  return text;
}

// The line at which the parser meets what it asserts not to: it reads forwards, so every longer part fails, too.
std::size_t broken_line(std::string_view text) {
  std::vector<std::size_t> ends;  // of the lines
  for (std::size_t at = 0; at < text.size(); ++at)
    if (text[at] == '\n' || at + 1 == text.size()) ends.push_back(at + 1);
  const auto breaks = [&](std::size_t end) {
    try {
      (void)toml::parse(text.substr(0, end));
    } catch (const toml::parse_error&) {
    } catch (const BrokenToml&) {
      return true;
    }
    return false;
  };
  std::size_t low = 0, high = ends.size() - 1;  // the last does
  while (low < high) {
    const std::size_t middle = (low + high) / 2;
    if (breaks(ends[middle]))
      high = middle;
    else
      low = middle + 1;
  }
  return low + 1;
}

std::string_view type_name(const toml::node& node) {
  switch (node.type()) {
    case toml::node_type::table:
      return "a table";
    case toml::node_type::array:
      return "an array";
    case toml::node_type::string:
      return "a string";
    case toml::node_type::integer:
      return "an integer";
    case toml::node_type::floating_point:
      return "a floating-point number";
    case toml::node_type::boolean:
      return "a boolean";
    case toml::node_type::date:
      return "a date";
    case toml::node_type::time:
      return "a time";
    case toml::node_type::date_time:
      return "a date-time";
    case toml::node_type::none:
      break;
  }
  return "nothing";
}

class FileReader {
 public:
  // `name` stands for the file in errors and sources.
  FileReader(LoadedConfig& loaded, std::string_view name) : loaded_(loaded), name_(name) {}

  void read(std::string_view text) {
    if (const std::size_t nul = text.find('\0'); nul != std::string_view::npos)
      fail(name_, ": is not a text: byte ", nul, " is NUL; a configuration is a TOML text");
    if (text.find_first_not_of(" \t\r\n") == std::string_view::npos)
      fail(name_, ": is empty; for defaults alone give no file, or one with a comment");
    toml::table root;
    try {
      root = toml::parse(text, name_);
    } catch (const toml::parse_error& e) {
      fail(at(e.source()), ": ", e.description());
    } catch (const BrokenToml&) {
      fail(name_, ":", broken_line(text), ":1: is no TOML; look at the section head or key of this line");
    }
    for (const auto& [key, node] : root) {
      const std::string_view section = key.str();
      if (!is_section(section)) {
        if (node.is_table())
          fail(at(key.source()), ": unknown section ", schema::quoted(section), hint_for_section(section));
        fail(at(key.source()), ": key ", schema::quoted(section), " is in no section",
             hint_for_stray(section));
      }
      const toml::table* table = node.as_table();
      if (!table)
        fail(at(node.source()), ": ", section, " is ", type_name(node), "; it is a section: write [", section,
             "]");
      for (const auto& [name, value] : *table) {
        const schema::Row* row = schema::find(str(section, ".", name.str()));
        if (!row)
          fail(at(name.source()), ": unknown key ", schema::quoted(str(section, ".", name.str())),
               hint_for_key(section, name.str()));
        set(*row, value);
      }
    }
  }

 private:
  std::string at(const toml::source_region& region) const {
    return str(name_, ":", region.begin.line, ":", region.begin.column);
  }

  static std::string hint_for_stray(std::string_view name) {
    for (const schema::Row& row : schema::rows())
      if (row.name() == name) return str("; did you mean ", row.key, "?");
    return hint_for_section(name);
  }

  [[noreturn]] void wrong_type(const schema::Row& row, const toml::node& node,
                               std::string_view more = "") const {
    const std::string allowed = schema::allowed_text(row);
    fail(at(node.source()), ": ", row.key, " is ", type_name(node), "; must be ", schema::type_text(row),
         allowed.empty() ? "" : str(" (", allowed, ")"), more);
  }

  std::vector<std::int64_t> integers(const schema::Row& row, const toml::array& array) const {
    std::vector<std::int64_t> out;
    for (const toml::node& item : array) {
      if (!item.is_integer()) wrong_type(row, item, str("; this is item ", out.size()));
      out.push_back(item.as_integer()->get());
    }
    return out;
  }

  void set(const schema::Row& row, const toml::node& node) {
    const std::string where = at(node.source());
    Config& config = loaded_.config;
    const bool is_nodes = std::holds_alternative<schema::Member<NodesSpec>>(row.member);
    const bool is_text = std::holds_alternative<schema::Member<std::string>>(row.member) ||
                         std::holds_alternative<schema::EnumMember>(row.member);
    const bool is_integer = std::holds_alternative<schema::Member<std::int32_t>>(row.member) ||
                            std::holds_alternative<schema::Member<std::int64_t>>(row.member);
    if (const auto* text = node.as_string(); text && (is_text || is_nodes)) {
      schema::set_from_text(row, config, text->get(), where);
    } else if (const auto* integer = node.as_integer(); integer && (is_integer || is_nodes)) {
      schema::set_integer(row, config, integer->get(), where);
    } else if (std::holds_alternative<schema::Member<double>>(row.member) && node.is_number()) {
      schema::set_number(row, config, *node.value<double>(), where);
    } else if (const auto* member = std::get_if<schema::Member<bool>>(&row.member);
               member && node.is_boolean()) {
      (*member)(config) = node.as_boolean()->get();
    } else if (const auto* list = node.as_array();
               list && std::holds_alternative<schema::Member<std::vector<std::int32_t>>>(row.member)) {
      schema::set_list(row, config, integers(row, *list), where);
    } else if (list && is_nodes) {
      std::vector<std::vector<std::int64_t>> lists;
      for (const toml::node& item : *list) {
        if (!item.is_array()) wrong_type(row, item, str("; this is item ", lists.size()));
        lists.push_back(integers(row, *item.as_array()));
      }
      schema::set_node_lists(row, config, lists, where);
    } else {
      wrong_type(row, node, node.is_string() ? "; numbers and booleans are written without quotes" : "");
    }
    loaded_.set_source(row.key, {ConfigSource::Kind::kFile, where});
  }

  LoadedConfig& loaded_;
  std::string_view name_;
};

// ---- environment and --set
// -------------------------------------------------------------------------------------------

void apply_environment(LoadedConfig& loaded, const ConfigEnvironment& environment) {
  std::vector<std::string> names;
  for (const schema::Row& row : schema::rows()) names.push_back(schema::environment_name(row.key));
  const std::vector<std::string_view> candidates(names.begin(), names.end());
  for (const auto& [name, value] : environment) {
    if (!name.starts_with("SLUICE_")) continue;
    const auto found = std::find(names.begin(), names.end(), name);
    if (found != names.end()) {
      const schema::Row& row = schema::rows()[static_cast<std::size_t>(found - names.begin())];
      schema::set_from_text(row, loaded.config, value, str("environment ", name));
      loaded.set_source(row.key, {ConfigSource::Kind::kEnvironment, name});
      continue;
    }
    // Other SLUICE_ variables belong to launchers and tests; but one that begins with a section's name, or is
    // a slip or two away from a key, was meant as a key.
    bool in_section = false;
    for (const schema::Section& section : schema::sections()) {
      in_section = in_section || name.starts_with(schema::environment_name(section.name) + "_");
    }
    const std::string_view meant = in_section ? schema::did_you_mean(name, candidates)
                                              : schema::did_you_mean(name, candidates, kMaxSlips);
    if (in_section || !meant.empty())
      fail("environment ", name, ": unknown key",
           meant.empty() ? std::string("; docs/config.md lists the keys")
                         : str("; did you mean ", meant, "?"));
  }
}

void apply_sets(LoadedConfig& loaded, std::span<const std::string> sets) {
  std::vector<std::string_view> seen;
  for (const std::string& text : sets) {
    const std::string where = str("--set ", schema::quoted(text));
    const std::size_t equals = text.find('=');
    if (equals == std::string::npos) fail(where, ": must be section.key=value");
    const schema::Row& row = row_of(std::string_view(text).substr(0, equals), where);
    if (std::find(seen.begin(), seen.end(), row.key) != seen.end())
      fail(where, ": ", row.key, " is set twice; give one --set for it");
    seen.push_back(row.key);
    schema::set_from_text(row, loaded.config, std::string_view(text).substr(equals + 1), where);
    loaded.set_source(row.key, {ConfigSource::Kind::kCommandLine, "--set"});
  }
}

LoadedConfig load(const std::string* text, std::string_view name, std::span<const std::string> sets,
                  const ConfigEnvironment& environment) {
  LoadedConfig loaded;
  if (text) FileReader(loaded, name).read(*text);
  apply_environment(loaded, environment);
  apply_sets(loaded, sets);
  validate(loaded);
  return loaded;
}

}  // namespace

// ---- public
// ----------------------------------------------------------------------------------------------------------

LoadedConfig::LoadedConfig() : sources_(schema::rows().size()) {}

const ConfigSource& LoadedConfig::source(std::string_view key) const {
  return sources_[index_of(row_of(key, "source of a value"))];
}

void LoadedConfig::set_source(std::string_view key, ConfigSource source) {
  sources_[index_of(row_of(key, source.text))] = std::move(source);
}

void LoadedConfig::set(std::string_view key, std::string_view text, ConfigSource source) {
  schema::set_from_text(row_of(key, source.text), config, text, source.text);
  set_source(key, std::move(source));
}

ConfigEnvironment process_environment() {
  ConfigEnvironment out;
  for (char** entry = environ; entry && *entry; ++entry) {
    const std::string_view text = *entry;
    const std::size_t equals = text.find('=');
    if (text.starts_with("SLUICE_") && equals != std::string_view::npos)
      out.emplace_back(text.substr(0, equals), text.substr(equals + 1));
  }
  return out;
}

LoadedConfig load_config(const std::optional<std::filesystem::path>& file, std::span<const std::string> sets,
                         const ConfigEnvironment& environment) {
  if (!file) return load(nullptr, "", sets, environment);
  const std::string text = read_file(*file);
  return load(&text, file->string(), sets, environment);
}

LoadedConfig parse_config(std::string_view text, std::string_view name, std::span<const std::string> sets,
                          const ConfigEnvironment& environment) {
  const std::string copy(text);
  return load(&copy, name, sets, environment);
}

void validate(const LoadedConfig& loaded) {
  const Config& c = loaded.config;
  // "routing.top_k 20 (from --set)"
  const auto named = [&](std::string_view key) {
    const schema::Row& row = row_of(key, "validate");
    return str(key, " ", schema::value_text(row, c), " (from ", loaded.source(key).text, ")");
  };

  if (c.routing.top_k > c.model.num_experts)
    fail(named("routing.top_k"), " is more than ", named("model.num_experts"),
         "; a token cannot visit more experts than there are");
  if (c.bench.top_k > c.model.num_experts)
    fail(named("bench.top_k"), " is more than ", named("model.num_experts"),
         "; a token cannot visit more experts than there are");

  const std::int64_t num_cheap =
      std::int64_t{c.model.zero_experts} + c.model.copy_experts + c.model.constant_experts;
  if (num_cheap >= c.model.num_experts) {
    std::string parts;
    for (const std::string_view key : {"model.zero_experts", "model.copy_experts", "model.constant_experts"})
      if (schema::value_text(row_of(key, "validate"), c) != "0")
        parts += str(parts.empty() ? "" : " and ", named(key));
    fail(parts, " leave no expert with weights of ", named("model.num_experts"), "; at least one is needed");
  }

  using Policy = Config::Routing::Policy;
  const bool swapping = c.routing.policy == Policy::kBoundedRegret;
  // Whose keys hold.
  const Policy router =
      !swapping                                                            ? c.routing.policy
      : c.routing.regret_base == Config::Routing::RegretBase::kSoftmaxTopK ? Policy::kSoftmaxTopK
      : c.routing.regret_base == Config::Routing::RegretBase::kSigmoidTopK ? Policy::kSigmoidTopK
                                                                           : Policy::kNodeLimited;
  const std::string router_named =
      named("routing.policy") + (swapping ? str(" on ", named("routing.regret_base")) : std::string());
  if (c.routing.aux_loss > 0 && (router == Policy::kRelu || router == Policy::kSigmoidTopK))
    fail(named("routing.aux_loss"), " has no meaning with ", router_named,
         "; relu and sigmoid_topk balance the load in other ways");
  if (c.routing.z_loss > 0 && router != Policy::kSoftmaxTopK)
    fail(named("routing.z_loss"), " has no meaning with ", router_named, "; only softmax_topk has this loss");
  if (c.routing.locality_loss > 0 && router != Policy::kSoftmaxTopK && router != Policy::kEtr)
    fail(named("routing.locality_loss"), " has no meaning with ", router_named,
         "; softmax_topk and etr have this loss");
  if (router == Policy::kNodeLimited && c.routing.num_groups > 0) {
    if (c.model.num_experts % c.routing.num_groups != 0)
      fail(named("model.num_experts"), " do not divide into ", named("routing.num_groups"),
           "; choose a divisor of the number of experts");
    if (c.routing.top_groups > c.routing.num_groups)
      fail(named("routing.top_groups"), " is more than ", named("routing.num_groups"));
    if (c.routing.top_k > c.model.num_experts / c.routing.num_groups * c.routing.top_groups)
      fail(named("routing.top_k"), " is more than the experts of ", named("routing.top_groups"), " of ",
           named("routing.num_groups"), " groups of ", named("model.num_experts"));
  }
  if (router == Policy::kEtr) {
    if (c.model.hidden % c.model.num_experts != 0)
      fail(named("model.hidden"), " is not a multiple of ", named("model.num_experts"),
           "; etr's affinities (GrAP) give each expert an equal slice of the row");
    if (c.routing.etr_switch_off < c.routing.etr_switch_on)
      fail(named("routing.etr_switch_off"), " is less than ", named("routing.etr_switch_on"),
           "; the switch back must not come first");
    if (c.model.gate_residual)
      fail(named("model.gate_residual"), " has no meaning with ", named("routing.policy"),
           ", which has no trained gate");
  }
  if (c.model.gate_residual && c.model.chain_iterations > 1)
    fail(named("model.gate_residual"), " with ", named("model.chain_iterations"),
         ": scores are carried from layer to layer, a chain has several in one");

  if (c.train.on_failure == Config::Train::OnFailure::kShrink && c.train.checkpoint_dir.empty())
    fail(named("train.on_failure"),
         " goes back to a checkpoint, but train.checkpoint_dir is empty; name a folder");

  const std::int32_t node_ranks = c.topology.nodes.num_ranks();
  if (c.topology.ranks > 0 && node_ranks > 0 && node_ranks != c.topology.ranks)
    fail(named("topology.nodes"), " names ", node_ranks, " ranks, but ", named("topology.ranks"),
         "; they must be equal, or topology.ranks 0");
  if (c.topology.ranks > 0 && c.topology.nodes.declared() && node_ranks == 0 &&
      c.topology.ranks % c.topology.nodes.num_nodes != 0)
    fail(named("topology.ranks"), " is not a multiple of ", named("topology.nodes"),
         "; list the ranks of each node instead, as in [[0,1],[2]]");

  const bool from_file = c.placement.policy == Config::Placement::Policy::kFile;
  if (from_file != !c.placement.file.empty())
    fail(named("placement.policy"), " and ", named("placement.file"),
         " do not go together: policy = \"file\" needs a file, and nothing else takes one");
  const std::vector<std::int32_t>& slots = c.placement.slots_per_rank;
  if (from_file && !slots.empty())
    fail(named("placement.slots_per_rank"), " has no meaning with ", named("placement.policy"),
         "; the file says what every rank holds");
  if (!slots.empty()) {
    const std::int32_t ranks = configured_ranks(c);
    if (ranks > 0 && static_cast<std::int32_t>(slots.size()) != ranks)
      fail(named("placement.slots_per_rank"), " lists ", slots.size(), " ranks, but there are ", ranks, ": ",
           named(c.topology.ranks > 0 ? "topology.ranks" : "topology.nodes"));
    std::int64_t sum = 0;
    for (const std::int32_t n : slots) sum += n;
    // contiguous holds each expert once; a policy with replicas may have more room than that.
    if (sum < c.model.num_ffn_experts() ||
        (c.placement.policy == Config::Placement::Policy::kContiguous && sum != c.model.num_ffn_experts()))
      fail(named("placement.slots_per_rank"), " has room for ", sum, " experts, but ",
           c.model.num_ffn_experts(), " have weights: ", named("model.num_experts"), " with ",
           named("placement.policy"));
  }

  if (c.comm.transport != "local") {
    for (const std::string_view key :
         {"topology.in_node_bytes_per_s", "topology.in_node_latency_us", "topology.across_nodes_bytes_per_s",
          "topology.across_nodes_latency_us"}) {
      if (loaded.source(key).kind != ConfigSource::Kind::kDefault &&
          schema::value_text(row_of(key, "validate"), c) != "0")
        fail(named(key), " declares a link to emulate, but ", named("comm.transport"),
             " has real links; only transport local emulates");
    }
  }
}

std::int32_t NodesSpec::num_ranks() const {
  if (lists.empty()) return num_nodes * ranks_per_node;
  std::size_t ranks = 0;
  for (const auto& list : lists) ranks += list.size();
  return static_cast<std::int32_t>(ranks);
}

std::int32_t configured_ranks(const Config& config) {
  return config.topology.ranks > 0 ? config.topology.ranks : config.topology.nodes.num_ranks();
}

Topology configured_topology(const Config& config, std::int32_t num_ranks) {
  const NodesSpec& nodes = config.topology.nodes;
  Require(nodes.num_ranks() == 0 || nodes.num_ranks() == num_ranks, ErrorCode::kInvalidConfig,
          "topology.nodes names ", nodes.num_ranks(), " ranks, but the job has ", num_ranks,
          "; start as many ranks, or declare the nodes of these");
  Topology topology = nodes.lists.empty()
                          ? Topology::uniform(num_ranks, nodes.declared() ? nodes.num_nodes : 1)
                          : Topology(nodes.lists);
  topology.set_declared(nodes.declared());
  const auto speed = [](double bytes_per_s, double latency_us) {
    return LinkSpeed{bytes_per_s,
                     std::chrono::nanoseconds(static_cast<std::int64_t>(latency_us * 1e3 + 0.5))};
  };
  topology.in_node = speed(config.topology.in_node_bytes_per_s, config.topology.in_node_latency_us);
  topology.across_nodes =
      speed(config.topology.across_nodes_bytes_per_s, config.topology.across_nodes_latency_us);
  return topology;
}

namespace {
std::vector<KeyValue> values_of_kind(const Config& config, schema::Kind kind) {
  std::vector<KeyValue> out;
  for (const schema::Row& row : schema::rows())
    if (row.kind == kind) out.push_back({std::string(row.key), schema::value_text(row, config)});
  return out;
}
}  // namespace

std::vector<KeyValue> semantic_values(const Config& config) {
  return values_of_kind(config, schema::Kind::kSemantic);
}
std::vector<KeyValue> agreed_values(const Config& config) {
  return values_of_kind(config, schema::Kind::kAgreed);
}

std::vector<std::string> differing_keys(std::span<const KeyValue> a, std::span<const KeyValue> b) {
  std::vector<std::string> out;
  const auto missing_or_other = [](const KeyValue& entry, std::span<const KeyValue> others,
                                   bool compare_value) {
    for (const KeyValue& other : others)
      if (other.key == entry.key) return compare_value && other.value != entry.value;
    return true;
  };
  for (const KeyValue& entry : a)
    if (missing_or_other(entry, b, true)) out.push_back(entry.key);
  for (const KeyValue& entry : b)
    if (missing_or_other(entry, a, false)) out.push_back(entry.key);
  return out;
}

std::uint64_t semantic_hash(const Config& config, std::span<const std::string_view> only_sections) {
  for (const std::string_view section : only_sections)
    Require(is_section(section), ErrorCode::kInvalidArgument, "semantic_hash: no section ",
            schema::quoted(section));
  Hasher h;
  for (const schema::Row& row : schema::rows()) {
    const bool wanted = only_sections.empty() || std::find(only_sections.begin(), only_sections.end(),
                                                           row.section()) != only_sections.end();
    if (wanted && row.kind == schema::Kind::kSemantic)
      h.add_text(row.key).add_text(schema::value_text(row, config));
  }
  return h.value();
}

}  // namespace sluice
