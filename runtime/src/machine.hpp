// This machine, for reports.
#pragma once

#include <cstdint>
#include <string>

namespace sluice {

std::string cpu_name();  // "AMD EPYC ...", or "unknown processor"
std::int64_t physical_memory_bytes();

}  // namespace sluice
