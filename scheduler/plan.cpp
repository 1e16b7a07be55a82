#include "sluice/scheduler/plan.hpp"

#include <algorithm>

namespace sluice {
namespace {

template <typename... Parts>
void expect(bool condition, const Parts&... parts) {
  Require(condition, ErrorCode::kInternal, "plan: ", str(parts...));
}

// Segments tile the list without gaps; peers (or sources) ascend.
template <typename List>
void check_segments(const List& list, std::string_view name, std::int32_t num_chunks) {
  std::int64_t row = 0, route = 0;
  for (const Segment& seg : list.segments) {
    expect(seg.num_rows > 0 && seg.num_routes >= seg.num_rows, name, " segment to ", seg.peer, " has ",
           seg.num_rows, " rows and ", seg.num_routes, " routes");
    expect(seg.row_begin == row && seg.route_begin == route, name, " segment of peer ", seg.peer, " source ",
           seg.source, " does not follow the one before it");
    row += seg.num_rows;
    route += seg.num_routes;
  }
  expect(row == list.num_rows() && route == list.num_routes(), name, " segments cover ", row, " rows of ",
         list.num_rows());
  const auto stride = static_cast<std::size_t>(num_chunks) + 1;
  expect(list.chunk_row.size() == list.segments.size() * stride, name, " chunk table has ",
         list.chunk_row.size());
  for (std::size_t i = 0; i < list.segments.size(); ++i)
    for (std::size_t c = 0; c < stride; ++c) {
      const Segment& seg = list.segments[i];
      const std::int32_t r = list.chunk_row[i * stride + c], q = list.chunk_route[i * stride + c];
      const std::int32_t r0 = c ? list.chunk_row[i * stride + c - 1] : seg.row_begin;
      const std::int32_t q0 = c ? list.chunk_route[i * stride + c - 1] : seg.route_begin;
      const bool last = c + 1 == stride;
      expect(r >= r0 && q >= q0 && (c > 0 || (r == r0 && q == q0)) &&
                 (!last || (r == seg.row_begin + seg.num_rows && q == seg.route_begin + seg.num_routes)),
             name, " chunk ", c, " of segment ", i, " starts at row ", r, " route ", q);
    }
}

// ptr is ascending from 0 to `total`.
template <typename Ptr>
void check_ptr(const Ptr& ptr, std::size_t size, std::int64_t total, std::string_view name) {
  expect(ptr.size() == size, name, " has ", ptr.size(), " entries, must be ", size);
  for (std::size_t i = 0; i + 1 < size; ++i) expect(ptr[i] <= ptr[i + 1], name, " falls at ", i);
  expect(ptr[0] == 0 && ptr[size - 1] == total, name, " ends at ", ptr[size - 1], ", must be ", total);
}

// Every value of 0..n-1 once.
void check_permutation(std::span<const std::int32_t> values, std::int64_t n, std::string_view name) {
  expect(static_cast<std::int64_t>(values.size()) == n, name, " has ", values.size(), " entries, must be ",
         n);
  std::vector<char> seen(static_cast<std::size_t>(n), 0);
  for (const std::int32_t v : values) {
    expect(v >= 0 && v < n && !seen[static_cast<std::size_t>(v)], name, " holds ", v,
           " twice or out of range");
    seen[static_cast<std::size_t>(v)] = 1;
  }
}

}  // namespace

Traffic& Traffic::operator+=(const Traffic& other) {
  rows_same_rank += other.rows_same_rank;
  rows_in_node += other.rows_in_node;
  rows_across_nodes += other.rows_across_nodes;
  flat_rows_in_node += other.flat_rows_in_node;
  flat_rows_across_nodes += other.flat_rows_across_nodes;
  routes_everywhere += other.routes_everywhere;
  return *this;
}

void Plan::validate() const {
  const std::int32_t num_stage_rows = num_tokens + recv1.num_rows();
  const std::int32_t num_stage_routes = num_routes + recv1.num_routes();
  check_segments(send1, "send1", options.num_chunks);
  check_segments(recv1, "recv1", options.num_chunks);
  check_segments(send2, "send2", options.num_chunks);
  check_segments(recv2, "recv2", options.num_chunks);
  check_ptr(recv1.route_ptr, static_cast<std::size_t>(recv1.num_rows()) + 1, recv1.num_routes(),
            "recv1.route_ptr");
  check_ptr(recv2.route_ptr, static_cast<std::size_t>(recv2.num_rows()) + 1, recv2.num_routes(),
            "recv2.route_ptr");
  for (const std::int32_t t : send1.row) expect(t >= 0 && t < num_tokens, "send1 row ", t);
  for (const std::int32_t r : send2.row) expect(r >= 0 && r < num_stage_rows, "send2 row ", r);

  // Each own route leaves exactly once (hop 1, hop 2 or nowhere), each received one exactly once over hop 2.
  std::vector<std::int32_t> uses(static_cast<std::size_t>(num_stage_routes), 0);
  for (const std::int32_t q : send1.route) {
    expect(q >= 0 && q < num_routes, "send1 route ", q);
    ++uses[static_cast<std::size_t>(q)];
  }
  for (const std::int32_t q : everywhere.route) {
    expect(q >= 0 && q < num_routes, "everywhere route ", q);
    ++uses[static_cast<std::size_t>(q)];
  }
  for (const std::int32_t q : send2.route) {
    expect(q >= 0 && q < num_stage_routes, "send2 route ", q);
    ++uses[static_cast<std::size_t>(q)];
  }
  for (std::size_t q = 0; q < uses.size(); ++q)
    expect(uses[q] == 1, "stage route ", q, " leaves ", uses[q], " times");

  const std::int64_t positions = num_positions();
  check_ptr(group_ptr,
            static_cast<std::size_t>(options.num_blocks()) * static_cast<std::size_t>(num_local_slots) + 1,
            positions, "group_ptr");
  check_ptr(slot_ptr, static_cast<std::size_t>(num_local_slots) + 1, positions, "slot_ptr");
  check_permutation(position_of_route, positions, "position_of_route");
  if (options.num_blocks() > 1) check_permutation(wgrad_position, positions, "wgrad_position");
  for (std::int32_t row = 0; row < recv2.num_rows(); ++row)
    for (std::int64_t q = recv2.route_ptr[static_cast<std::size_t>(row)];
         q < recv2.route_ptr[static_cast<std::size_t>(row) + 1]; ++q) {
      const auto p = static_cast<std::size_t>(position_of_route[static_cast<std::size_t>(q)]);
      expect(expert_row[p] == row, "position ", p, " holds row ", expert_row[p], ", must be ", row);
      bool in_slot = false;
      for (std::int32_t b = 0; b < options.num_blocks(); ++b) {
        const auto g =
            static_cast<std::size_t>(b * num_local_slots + recv2.slot[static_cast<std::size_t>(q)]);
        in_slot |=
            static_cast<std::int64_t>(p) >= group_ptr[g] && static_cast<std::int64_t>(p) < group_ptr[g + 1];
      }
      expect(in_slot, "position ", p, " is not in slot ", recv2.slot[static_cast<std::size_t>(q)]);
    }

  check_ptr(own_partial_ptr, static_cast<std::size_t>(num_tokens) + 1, num_own_partials, "own_partial_ptr");
  check_ptr(partial_ptr, static_cast<std::size_t>(num_own_partials + recv1.num_rows()) + 1, send2.num_rows(),
            "partial_ptr");
  check_permutation(partial_position, send2.num_rows(), "partial_position");
  check_ptr(home_ptr, static_cast<std::size_t>(num_tokens) + 1, num_home_rows(), "home_ptr");
  check_permutation(home_position, num_home_rows(), "home_position");
}

std::string Plan::explain(std::int64_t row_bytes) const {
  const auto line = [&](std::string_view level, std::int64_t rows, std::int64_t flat) {
    std::string out = str("  ", level, ": ", rows, " rows, ", rows * row_bytes, " bytes");
    if (flat > 0) out += str("; flat without de-duplication ", flat, " rows, ", flat * row_bytes, " bytes");
    return out + "\n";
  };
  std::string out =
      str("plan of rank ", rank.value, ": ", num_tokens, " tokens, ", num_routes, " routes, exchange ",
          options.exchange == Exchange::kGateway ? "gateway" : "direct", ", ", options.num_chunks,
          options.num_chunks == 1 ? " chunk, " : " chunks, ", num_parts(options.split),
          num_parts(options.split) == 1 ? " part\n" : " parts by source\n");
  out += line("same rank", traffic.rows_same_rank, 0);
  out += line("in node", traffic.rows_in_node, traffic.flat_rows_in_node);
  out += line("across nodes", traffic.rows_across_nodes, traffic.flat_rows_across_nodes);
  if (traffic.routes_everywhere > 0) out += str("  no wire: ", traffic.routes_everywhere, " routes\n");
  out += str("  handed on as gateway: ", recv1.num_rows(), " rows\n");
  out += str("  experts here: ", num_local_slots, " slots, ", recv2.num_rows(), " rows, ", num_positions(),
             " routes\n");
  return out;
}

std::int64_t Plan::capacity_bytes() const {
  std::size_t bytes = 0;
  const auto add = [&](const auto&... arrays) { ((bytes += arrays.capacity_bytes()), ...); };
  add(send1.row, send1.route, send1.chunk_row, send1.chunk_route, send2.row, send2.route, send2.chunk_row,
      send2.chunk_route);
  for (const ReceiveList* list : {&recv1, &recv2})
    add(list->token, list->route_ptr, list->slot, list->weight, list->chunk_row, list->chunk_route);
  add(group_ptr, expert_row, expert_weight, position_of_route, slot_ptr, wgrad_position, wgrad_row,
      own_partial_ptr, partial_ptr, partial_position, home_ptr, home_position, everywhere.token,
      everywhere.expert, everywhere.route, everywhere.weight);
  return static_cast<std::int64_t>(bytes);
}

}  // namespace sluice
