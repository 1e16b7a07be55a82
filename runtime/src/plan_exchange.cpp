#include "sluice/runtime/src/plan_exchange.hpp"

#include "sluice/base/telemetry.hpp"
#include "sluice/runtime/src/runtime_state.hpp"

namespace sluice {
namespace {
constexpr std::string_view kPhase = "plan";
}

PlanExchange::PlanExchange(Runtime& runtime, const Placement& placement, PlanOptions options)
    : runtime_(runtime),
      placement_(placement),
      options_(options),
      builder_(runtime.rank(), runtime.topology(), placement, options) {}

void PlanExchange::require_own(const Plan& plan, std::string_view call, bool any_cut) const {
  Require(plan.rank == runtime_.rank() && plan.num_experts == placement_.num_experts &&
              plan.num_local_slots == placement_.num_slots_of(runtime_.rank()) &&
              plan.placement_version == placement_.version &&
              (any_cut ? plan.options.exchange == options_.exchange : plan.options == options_),
          ErrorCode::kInvalidArgument, call, " was given a plan of rank ", plan.rank.value, " for ",
          plan.num_experts, " experts, ", plan.num_local_slots, " slots, placement version ",
          plan.placement_version, ", in ", plan.options.num_chunks,
          " chunks; it does not fit: plans belong to the layer or dispatcher that made them");
}

// Who finds a peer's numbers wrong ends the group and names that peer; leaving in silence would put the blame on itself.
void PlanExchange::build(const RoutingView& routing, Plan& plan, std::uint64_t extra_hash,
                         const Choose& choose) {
  try {
    exchange(routing, plan, extra_hash, choose);
  } catch (const PlanDisagreement& error) {
    comm::AbortRecord record;
    record.status = error.status();
    record.culprit = error.peer();
    record.reporter = runtime_.rank();
    record.phase = kPhase;
    runtime_.transport().abort(record);
    throw;
  }
}

void PlanExchange::exchange(const RoutingView& routing, Plan& plan, std::uint64_t extra_hash,
                            const Choose& choose) {
  comm::Collectives& all = runtime_.collectives();
  SpanRecorder* recorder = runtime_.recorder();
  const auto ranks = static_cast<std::size_t>(runtime_.num_ranks());
  const auto exchanged = [&](auto&& call) {
    const Span span(recorder, "exchange_counts", "host");
    call().throw_if_error();
  };
  const auto planned = [&](auto&& call) {
    const Span span(recorder, "plan", "host");
    call();
  };

  planned([&] { builder_.begin(routing, plan, extra_hash); });
  received_.resize(builder_.summary().size() * ranks);
  exchanged([&] { return all.all_gather(builder_.summary(), received_, kPhase); });
  planned([&] {
    if (choose) {
      builder_.check_summaries(received_);
      const PlanOptions cut = choose(received_);
      builder_.set_cut(cut.num_chunks, cut.split);
    }
    builder_.take_summaries(received_);
  });

  received_.resize(builder_.counts().size());
  exchanged([&] { return all.all_to_all(builder_.counts(), received_, kPhase); });
  planned([&] { builder_.take_counts(received_); });

  received_.resize(builder_.offsets().size());
  exchanged([&] { return all.all_to_all(builder_.offsets(), received_, kPhase); });
  planned([&] { builder_.take_offsets(received_); });

  if (runtime_.topology().num_nodes() > 1 && plan.options.exchange == Exchange::kGateway)
    exchange_headers(builder_.headers1(), builder_.expected_headers1());
  else
    words_.resize(0);
  planned([&] { builder_.take_headers1(words_); });
  exchange_headers(builder_.headers2(), builder_.expected_headers2());
  planned([&] { builder_.take_headers2(words_); });
}

void PlanExchange::exchange_headers(const PlanBuilder::Headers& out,
                                    std::span<const PlanBuilder::Message> in) {
  const Span span(runtime_.recorder(), "exchange_headers", "host");
  const auto ranks = static_cast<std::size_t>(runtime_.num_ranks());
  sends_.assign(ranks, {});
  receives_.assign(ranks, {});
  for (const auto& m : out.messages)
    sends_[m.peer.index()] = std::as_bytes(
        out.words.subspan(static_cast<std::size_t>(m.word_begin), static_cast<std::size_t>(m.num_words)));
  words_.resize(in.empty() ? 0 : static_cast<std::size_t>(in.back().word_begin + in.back().num_words));
  for (const auto& m : in)
    receives_[m.peer.index()] = std::as_writable_bytes(std::span<std::int32_t>(words_).subspan(
        static_cast<std::size_t>(m.word_begin), static_cast<std::size_t>(m.num_words)));
  runtime_.collectives().all_to_all_v(sends_, receives_, kPhase).throw_if_error();
}

}  // namespace sluice
