// Small aligned tables for terminal reports. Columns whose cells are all numbers are aligned to the right.
// Thread-safety: a value.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace sluice {

class TextTable {
 public:
  explicit TextTable(std::vector<std::string> header);

  // A row with fewer cells than the header is filled with empty ones; more is kInvalidArgument.
  TextTable& add_row(std::vector<std::string> cells);
  // A line between the rows so far and those to come.
  TextTable& add_rule();

  std::size_t num_rows() const;
  // Lines that end in a newline, without trailing spaces.
  std::string to_string() const;

 private:
  std::vector<std::string> header_;
  std::vector<std::vector<std::string>> rows_;  // an empty row is a rule
};

// "3.14"; "-" for what is not a number, so that a missing measurement cannot look like one.
std::string fixed(double value, int decimals);
// "512 B", "1.50 KiB", "2.00 MiB"
std::string bytes_text(std::int64_t bytes);
// "1 234 567"
std::string grouped(std::int64_t value);

}  // namespace sluice
