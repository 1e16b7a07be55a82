// Bytes of all ranks on rank 0, rank 0's on all, and one error for all. Collective; blocks with the Runtime's deadline;
// allocates.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "sluice/base/error.hpp"
#include "sluice/runtime.hpp"

namespace sluice {

// Rank 0 gets the bytes of every rank, in order of ranks; others get an empty list. Sizes may differ.
std::vector<std::string> gather_to_root(Runtime& runtime, std::string_view mine, std::string_view phase);

// Rank 0's text on all ranks. Throws kDisagreement when it announces more than max_bytes; `what` names the text.
std::string text_of_root(Runtime& runtime, std::string text, std::size_t max_bytes, std::string_view what,
                         std::string_view phase);

// Throws on all ranks the error of the lowest rank that has one; returns when none has. For work that every rank does
// alone and that must succeed everywhere.
void agree_on_success(Runtime& runtime, const Status& mine, std::string_view phase);

}  // namespace sluice
