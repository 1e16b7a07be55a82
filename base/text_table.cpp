#include "sluice/base/text_table.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "sluice/base/error.hpp"

namespace sluice {

namespace {

// Characters, not bytes: continuation bytes of UTF-8 take no place.
std::size_t width(std::string_view text) {
  return static_cast<std::size_t>(std::count_if(
      text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

bool is_number(std::string_view text) {
  if (text.empty() || text == "-") return true;
  if (text.front() == '-' || text.front() == '+') text.remove_prefix(1);
  return !text.empty() && text.front() >= '0' && text.front() <= '9';
}

}  // namespace

TextTable::TextTable(std::vector<std::string> header) : header_(std::move(header)) {
  Require(!header_.empty(), ErrorCode::kInvalidArgument, "a table needs at least one column");
}

TextTable& TextTable::add_row(std::vector<std::string> cells) {
  Require(cells.size() <= header_.size(), ErrorCode::kInvalidArgument, "a table row has ", cells.size(),
          " cells, but the header has ", header_.size());
  cells.resize(header_.size());
  rows_.push_back(std::move(cells));
  return *this;
}

TextTable& TextTable::add_rule() {
  rows_.emplace_back();
  return *this;
}

std::size_t TextTable::num_rows() const {
  return static_cast<std::size_t>(
      std::count_if(rows_.begin(), rows_.end(), [](const auto& row) { return !row.empty(); }));
}

std::string TextTable::to_string() const {
  std::vector<std::size_t> widths;
  std::vector<bool> to_the_right(header_.size(), num_rows() > 0);
  for (const std::string& cell : header_) widths.push_back(width(cell));
  std::size_t total = 2 * (header_.size() - 1);
  for (std::size_t c = 0; c < header_.size(); ++c) {
    for (const auto& row : rows_) {
      if (row.empty()) continue;
      widths[c] = std::max(widths[c], width(row[c]));
      to_the_right[c] = to_the_right[c] && is_number(row[c]);
    }
    total += widths[c];
  }
  std::string out;
  const auto add_line = [&](const std::vector<std::string>& cells) {
    std::string line;
    for (std::size_t c = 0; c < cells.size(); ++c) {
      const std::string padding(widths[c] - width(cells[c]), ' ');
      line += str(c ? "  " : "", to_the_right[c] ? padding : "", cells[c], to_the_right[c] ? "" : padding);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  };
  const std::string rule(total, '-');
  add_line(header_);
  out += rule + "\n";
  for (const auto& row : rows_) {
    if (row.empty())
      out += rule + "\n";
    else
      add_line(row);
  }
  return out;
}

std::string fixed(double value, int decimals) {
  if (!std::isfinite(value)) return "-";
  std::array<char, 400> buffer;  // the largest double has 309 digits before the point
  const int size = std::snprintf(buffer.data(), buffer.size(), "%.*f", std::clamp(decimals, 0, 60), value);
  return std::string(buffer.data(), static_cast<std::size_t>(size));
}

std::string bytes_text(std::int64_t bytes) {
  constexpr std::array<std::string_view, 5> kUnits = {"KiB", "MiB", "GiB", "TiB", "PiB"};
  const double magnitude = std::abs(static_cast<double>(bytes));
  if (magnitude < 1024) return str(bytes, " B");
  double value = static_cast<double>(bytes);
  std::size_t unit = 0;
  for (value /= 1024; std::abs(value) >= 1024 && unit + 1 < kUnits.size(); value /= 1024) ++unit;
  return str(fixed(value, 2), " ", kUnits[unit]);
}

std::string grouped(std::int64_t value) {
  const std::string digits = std::to_string(value);
  const std::size_t first = digits.front() == '-' ? 1 : 0;
  std::string out;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > first && (digits.size() - i) % 3 == 0) out += ' ';
    out += digits[i];
  }
  return out;
}

}  // namespace sluice
