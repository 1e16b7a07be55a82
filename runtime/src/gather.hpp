// Bytes of all ranks on rank 0, for reports and checks. Collective; blocks with the Runtime's deadline; allocates.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "sluice/runtime.hpp"

namespace sluice {

// Rank 0 gets the bytes of every rank, in order of ranks; others get an empty list. Sizes may differ.
std::vector<std::string> gather_to_root(Runtime& runtime, std::string_view mine, std::string_view phase);

}  // namespace sluice
