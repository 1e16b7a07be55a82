#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "sluice/base/config_schema.hpp"
#include "sluice/base/error.hpp"

namespace sluice {

namespace schema = config_schema;

namespace {

using Json = nlohmann::ordered_json;

template <typename T>
bool holds(const schema::Row& row) {
  return std::holds_alternative<schema::Member<T>>(row.member);
}
bool is_enum(const schema::Row& row) {
  return std::holds_alternative<schema::EnumMember>(row.member);
}

// A TOML basic string.
std::string toml_string(std::string_view text) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\')
      out += str("\\", c);
    else if (u < 0x20 || u == 0x7f)
      out += str("\\u00", kHex[u >> 4], kHex[u & 15]);
    else
      out += c;
  }
  return out + "\"";
}

// A value in its text form as TOML; JSON is the same for all types there are, but for the escapes of strings.
std::string toml_value(const schema::Row& row, const std::string& text) {
  const bool is_string = holds<std::string>(row) || is_enum(row) ||
                         (holds<NodesSpec>(row) && text.find('x') != std::string::npos);
  return is_string ? toml_string(text) : text;
}

Json json_value(const schema::Row& row, const std::string& text) {
  if (holds<std::string>(row) || is_enum(row)) return text;
  if (holds<double>(row)) return std::stod(text);
  if (holds<NodesSpec>(row) && text.find('x') != std::string::npos) return text;
  return Json::parse(text);
}

std::string dump(const Json& json) {
  return json.dump(2, ' ', false, Json::error_handler_t::replace);
}

std::string json_type(const schema::Row& row) {
  if (holds<bool>(row)) return "boolean";
  if (holds<double>(row)) return "number";
  if (holds<std::string>(row) || is_enum(row)) return "string";
  return "integer";
}

void add_range(Json& json, const schema::Range& range, bool integer) {
  const auto number = [&](double value) {
    return integer ? Json(static_cast<std::int64_t>(value)) : Json(value);
  };
  if (std::isfinite(range.min)) json[range.min_open ? "exclusiveMinimum" : "minimum"] = number(range.min);
  if (std::isfinite(range.max)) json[range.max_open ? "exclusiveMaximum" : "maximum"] = number(range.max);
}

Json json_schema_of(const schema::Row& row) {
  Json json;
  json["description"] = row.doc;
  if (holds<NodesSpec>(row)) {
    const Json rank = {{"type", "integer"}, {"minimum", 0}};
    const Json node = {{"type", "array"}, {"minItems", 1}, {"items", rank}};
    json["oneOf"] = Json::array({Json{{"type", "integer"}, {"minimum", 0}},
                                 Json{{"type", "string"}, {"pattern", "^[1-9][0-9]*x[1-9][0-9]*$"}},
                                 Json{{"type", "array"}, {"minItems", 1}, {"items", node}}});
  } else if (holds<std::vector<std::int32_t>>(row)) {
    json["type"] = "array";
    json["items"] = {{"type", "integer"}};
    add_range(json["items"], row.range, true);
  } else {
    json["type"] = json_type(row);
    add_range(json, row.range, !holds<double>(row));
    if (!row.allowed.empty()) json["enum"] = row.allowed;
  }
  json["default"] = json_value(row, std::string(row.default_text));
  if (!row.unit.empty()) json["x-unit"] = row.unit;
  json["x-kind"] = to_string(row.kind);
  return json;
}

// Text for a cell of a Markdown table.
std::string cell(std::string_view text) {
  std::string out;
  for (const char c : text) out += c == '|' ? std::string("\\|") : std::string(1, c);
  return out;
}

std::string type_cell(const schema::Row& row) {
  if (holds<NodesSpec>(row)) return "nodes";
  if (holds<std::vector<std::int32_t>>(row)) return str("list of integers, each ", schema::allowed_text(row));
  if (holds<bool>(row)) return "true or false";
  if (!row.allowed.empty()) {
    std::string out;
    for (const std::string_view text : row.allowed) out += str(out.empty() ? "`" : ", `", text, "`");
    return out;
  }
  if (holds<std::string>(row)) return "text";
  return str(holds<double>(row) ? "number, " : "integer, ", schema::allowed_text(row));
}

}  // namespace

std::string effective_text(const LoadedConfig& loaded) {
  std::string out;
  for (const schema::Section& section : schema::sections()) {
    std::vector<std::pair<std::string, std::string>> lines;  // assignment, source
    std::size_t width = 0;
    for (const schema::Row& row : schema::rows()) {
      if (row.section() != section.name) continue;
      lines.emplace_back(str(row.name(), " = ", toml_value(row, schema::value_text(row, loaded.config))),
                         loaded.source(row.key).text);
      width = std::max(width, lines.back().first.size());
    }
    out += str(out.empty() ? "[" : "\n[", section.name, "]\n");
    // A path in a source may hold anything; it must not end the comment.
    for (auto& [assignment, source] : lines) {
      std::replace_if(
          source.begin(), source.end(),
          [](char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7f; }, '?');
      out += str(assignment, std::string(width - assignment.size(), ' '), "  # ", source, "\n");
    }
  }
  return out;
}

std::string effective_json(const LoadedConfig& loaded) {
  Json json;
  for (const schema::Row& row : schema::rows()) {
    json[std::string(row.section())][std::string(row.name())] = {
        {"value", json_value(row, schema::value_text(row, loaded.config))},
        {"source", loaded.source(row.key).text}};
  }
  return dump(json);
}

std::string config_json_schema() {
  Json json;
  json["$schema"] = "https://json-schema.org/draft/2020-12/schema";
  json["title"] = "Sluice configuration";
  json["type"] = "object";
  json["additionalProperties"] = false;
  for (const schema::Section& section : schema::sections()) {
    Json& out = json["properties"][std::string(section.name)];
    out["type"] = "object";
    out["description"] = section.doc;
    out["additionalProperties"] = false;
    for (const schema::Row& row : schema::rows())
      if (row.section() == section.name) out["properties"][std::string(row.name())] = json_schema_of(row);
  }
  return dump(json);
}

std::string config_markdown() {
  std::string out =
      "# Configuration\n"
      "\n"
      "This file is generated from the schema table in `base/config_schema.cpp` by `sluice config --doc`; a "
      "test fails\n"
      "when it is stale.\n"
      "\n"
      "A configuration is a TOML file of at most 1 MiB. Values come, later ones over earlier ones, from the "
      "defaults\n"
      "below, the file, the environment (`SLUICE_SECTION_KEY`, for instance `SLUICE_TRAIN_STEPS=50`) and the "
      "command\n"
      "line (`--set section.key=value`, each key once). `sluice config` prints what results and where each "
      "value came\n"
      "from; `sluice config --schema` prints a JSON schema for editors.\n"
      "\n"
      "What is absent has its default. What is present but wrong - an unknown key, another type, out of "
      "range, twice,\n"
      "something after the value, a contradiction between two keys - is an error that names file, line and "
      "column, or\n"
      "the variable, or the `--set`. Texts in the environment and after `--set` are written bare: `relu`, "
      "`0.5`,\n"
      "`true`, `[3,1]`. Variables that begin with `SLUICE_` but not with a section's name are left to "
      "launchers.\n"
      "\n"
      "Kinds: **semantic** keys change results or the protocol and must be equal on all ranks; **agreed** "
      "keys are\n"
      "decided by rank 0 and sent to all; **local** keys may differ.\n";
  for (const schema::Section& section : schema::sections()) {
    out += str("\n## [", section.name, "]\n\n", section.doc, "\n\n",
               "| key | allowed | unit | default | kind | meaning |\n|---|---|---|---|---|---|\n");
    for (const schema::Row& row : schema::rows()) {
      if (row.section() != section.name) continue;
      out += str("| `", row.name(), "` | ", cell(type_cell(row)), " | ", row.unit, " | `",
                 toml_value(row, std::string(row.default_text)), "` | ", to_string(row.kind), " | ",
                 cell(row.doc), " |\n");
    }
  }
  return out;
}

}  // namespace sluice
