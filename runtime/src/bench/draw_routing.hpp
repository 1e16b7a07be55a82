// The routing of a benchmark: a function of the configuration's seed and the rank, so that any rank knows what all others
// have drawn.
#pragma once

#include "sluice/base/config.hpp"
#include "sluice/base/ids.hpp"
#include "sluice/scheduler/routing.hpp"

namespace sluice {

// bench.top_k distinct experts a token, expert e drawn with probability ~ 1 / (rank of e)^skew, where which expert has
// which rank is shuffled by the seed; or ~ the e-th number of the file bench.popularity; or the rank's share of the trace
// bench.replay. Throws kNotFound or
// kInvalidConfig naming the file and what is wrong with it.
Routing draw_routing(const Config& config, std::int32_t num_experts, RankId rank, std::int32_t num_ranks);

}  // namespace sluice
