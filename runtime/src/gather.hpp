// Bytes of all ranks on rank 0, rank 0's on all, one error for all, and what small numbers of all ranks come to. Collective; blocks with the Runtime's deadline;
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

// The largest of all ranks' values, element by element; the same number of values on every rank. To a nanosecond.
// double [n]
std::vector<double> largest_of_ranks(Runtime& runtime, const std::vector<double>& mine_us,
                                     std::string_view phase);

// What to say where a machine has fewer cores than its ranks have compute threads (times would tell of their queue);
// empty where each has its own. Machines are told apart by their running kernel: namespaces share its cores.
std::string shared_cores_note(Runtime& runtime, int threads_per_rank, std::string_view phase);

}  // namespace sluice
