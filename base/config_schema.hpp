// The schema table of the configuration: one row a key. Everything that knows about keys - loading, printing,
// documentation, JSON schema, hashes - reads this table; nothing repeats it. Only base/config*.cpp need this
// header.
//
// Thread-safety: constant data.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "sluice/base/config.hpp"

namespace sluice::config_schema {

enum class Kind : std::uint8_t { kSemantic, kAgreed, kLocal };
std::string_view to_string(Kind kind);

// How to reach a value; the alternative is the key's type, so type and member cannot disagree.
template <typename T>
using Member = T& (*)(Config&);
// An enum whose enumerators count from 0 in the order of the row's `allowed`.
struct EnumMember {
  std::size_t (*get)(const Config&);
  void (*set)(Config&, std::size_t);
};
using AnyMember =
    std::variant<Member<std::int32_t>, Member<std::int64_t>, Member<double>, Member<bool>,
                 Member<std::string>, EnumMember, Member<std::vector<std::int32_t>>, Member<NodesSpec>>;

// Closed range of numbers (for lists: of each item); `above` and `below` leave an end out.
struct Range {
  double min = -std::numeric_limits<double>::infinity();
  double max = std::numeric_limits<double>::infinity();
  bool min_open = false;
  bool max_open = false;
};

struct Row {
  std::string_view key;  // "section.key"
  AnyMember member;
  std::string_view unit = "";                      // "" where there is none
  Range range = {};                                // numbers only
  std::span<const std::string_view> allowed = {};  // enums and closed sets of texts
  std::string_view default_text;
  Kind kind;
  std::string_view doc;

  std::string_view section() const { return key.substr(0, key.find('.')); }
  std::string_view name() const { return key.substr(key.find('.') + 1); }
};

struct Section {
  std::string_view name;
  std::string_view doc;
};

std::span<const Section> sections();
std::span<const Row> rows();  // grouped by section, in the order of sections()
// nullptr when there is none.
const Row* find(std::string_view key);
// "SLUICE_SECTION_KEY" for "section.key"
std::string environment_name(std::string_view key);

// "integer", "number", "true or false", "text", "one of ...", "list of integers", "nodes"
std::string type_text(const Row& row);
// "1..1024", "above 0, at most 1", "a, b or c"; "" where everything of the type is allowed
std::string allowed_text(const Row& row);

// The value in its text form: what set_from_text reads back to the same value.
std::string value_text(const Row& row, const Config& config);
// Converts the whole of `text` and checks range and allowed values. Throws kInvalidConfig; `where` begins the
// message.
void set_from_text(const Row& row, Config& config, std::string_view text, std::string_view where);

// Typed setters for values that a file gave with a type; the checks of set_from_text.
void set_integer(const Row& row, Config& config, std::int64_t value, std::string_view where);
void set_number(const Row& row, Config& config, double value, std::string_view where);
void set_list(const Row& row, Config& config, const std::vector<std::int64_t>& value, std::string_view where);
void set_node_lists(const Row& row, Config& config, const std::vector<std::vector<std::int64_t>>& value,
                    std::string_view where);

// `text` in quotes with control characters escaped, cut when long: fit for one line of an error.
std::string quoted(std::string_view text);
// The candidate nearest to `word` by edit distance (insert, delete, replace, swap neighbours), or "" when
// none is near enough to be meant: at most `max_distance` edits, and a third of the letters.
std::string_view did_you_mean(std::string_view word, std::span<const std::string_view> candidates,
                              std::size_t max_distance = 64);

}  // namespace sluice::config_schema
