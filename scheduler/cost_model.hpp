// The cost model: what ops of a template take on a machine, from a profile of it. A profile is measured
// (`sluice info --probe`) or declared (a configuration's [machine] and [topology]); it says which.
//
// A cost is a piecewise-linear curve through measured points, so a prediction is never further from a measurement than
// the curve bends between two of its points. Latency, the sender's cost of a message and its time on the link are
// curves of their own, because schedules hide them differently.
//
// Everything here is a pure function: ranks with the same profile and the same counts come to the same costs.
// Thread-safety: plain data. Errors: parse_profile and validate throw kInvalidConfig naming the profile, the field and
// the value; a cost that a profile cannot tell (an unknown GEMM shape) throws kNotFound naming what to measure.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sluice/base/dtype.hpp"
#include "sluice/scheduler/plan.hpp"
#include "sluice/scheduler/template.hpp"

namespace sluice {

// Time over an amount of work: straight lines through the points, the first value before them, the slope of the last
// piece behind them. No points: 0 everywhere.
class Curve {
 public:
  struct Point {
    double at = 0;  // bytes or rows
    double us = 0;
    friend bool operator==(const Point&, const Point&) = default;
  };

  Curve() = default;
  explicit Curve(std::vector<Point> points) : points_(std::move(points)) {}
  // us = fixed_us + at / per_us
  static Curve line(double fixed_us, double per_us);

  double operator()(double at) const;
  const std::vector<Point>& points() const { return points_; }
  bool empty() const { return points_.empty(); }
  // Throws kInvalidConfig naming `what`: no points (unless allowed), a value that is negative or no number, points not
  // ascending, time that falls while work grows.
  void validate(std::string_view what, bool may_be_empty) const;
  friend bool operator==(const Curve&, const Curve&) = default;

 private:
  std::vector<Point> points_;
};

// Samples with noise to a curve: equal places become their median, then the nearest (least squares) times that never
// fall (pool adjacent violators).
Curve fit_curve(std::vector<Curve::Point> samples);

// One class of links, as a sender and a receiver see a message of so many bytes.
struct LinkProfile {
  Curve occupied;         // us that the link, outwards here and inwards there, belongs to the message
  double latency_us = 0;  // and then until the peer sees it
  Curve send;             // us of the sending rank's processor
  Curve receive;          // us of the receiving rank's processor
  friend bool operator==(const LinkProfile&, const LinkProfile&) = default;
};

enum class LinkClass : std::uint8_t { kInNode, kAcrossNodes };
std::string_view to_string(LinkClass link) noexcept;

enum class GemmKind : std::uint8_t { kForward, kDgrad, kWgrad };
std::string_view to_string(GemmKind kind) noexcept;

// Weights are [out_cols, in_cols]; forward is rows x in_cols -> rows x out_cols.
struct GemmShape {
  GemmKind kind = GemmKind::kForward;
  std::int64_t in_cols = 0;
  std::int64_t out_cols = 0;
  DType dtype = DType::kF32;
  std::int32_t threads = 1;
  friend bool operator==(const GemmShape&, const GemmShape&) = default;
};
std::string describe(const GemmShape& shape);

// The time of one group over its rows. A grouped GEMM is the sum over its groups and the cost of one call.
struct GemmProfile {
  GemmShape shape;
  Curve rows;
  friend bool operator==(const GemmProfile&, const GemmProfile&) = default;
};

// For declared machines: a group takes the larger of its arithmetic and of touching its weights once.
struct GemmRoofline {
  double flops_per_s = 0;
  double memory_bytes_per_s = 0;
  friend bool operator==(const GemmRoofline&, const GemmRoofline&) = default;
};

// How a transport's links behave when several messages want them.
enum class LinkModel : std::uint8_t {
  kCalendar,  // booked when put: starts when both ends' bookings end (emulated links of transport local)
  kQueue,     // messages leave one after the other, and a receiver takes them in the order in which they left
};
std::string_view to_string(LinkModel model) noexcept;

// Who posts puts while a rank computes, and on whose time.
enum class Posting : std::uint8_t {
  kCaller,  // the computing thread, between ops
  kThread,  // a progress thread that shares the rank's cores: at once, and the compute op takes that much longer
  kOwnCore,  // something of its own: a core to spare, or a device
};
std::string_view to_string(Posting posting) noexcept;

struct MachineProfile {
  static constexpr std::int32_t kVersion = 1;

  std::string name;
  bool measured = false;  // else declared
  std::string date;       // of the measurement
  std::string device;     // processor name
  std::int32_t cores = 0;
  std::string transport;
  std::string source;  // where declared values come from

  LinkModel link_model = LinkModel::kQueue;
  Posting posting = Posting::kCaller;
  LinkProfile in_node, across_nodes;
  std::vector<GemmProfile> gemms;
  std::optional<GemmRoofline> roofline;  // for shapes without a curve
  double gemm_call_us = 0;               // of a grouped GEMM, whatever its groups
  // us over bytes read and written
  Curve gather;
  Curve reduce;
  Curve activation_backward;
  double op_us = 0;  // the executor's cost of starting any op

  const LinkProfile& link(LinkClass link) const {
    return link == LinkClass::kInNode ? in_node : across_nodes;
  }
  // Of one grouped GEMM. group_rows: [groups]; groups without rows cost nothing. All empty: 0.
  double gemm_us(const GemmShape& shape, std::span<const double> group_rows) const;

  void validate() const;
  std::string to_json() const;
  // Of the machine: device, cores, transport. Warn when it is not that of the machine a profile is used on.
  std::uint64_t machine_hash() const;
  // Of everything: part of what ranks agree on.
  std::uint64_t hash() const;
  friend bool operator==(const MachineProfile&, const MachineProfile&) = default;
};

std::uint64_t machine_hash(std::string_view device, std::int32_t cores, std::string_view transport);

// The text form is one JSON object (docs/simulator.md). `name` stands for the file in errors. Unknown fields, missing
// ones and trailing text are errors.
MachineProfile parse_profile(std::string_view text, std::string_view name);

// What the cost of a pass depends on besides counts.
struct LayerShape {
  std::int64_t hidden = 0;
  std::int64_t ffn = 0;
  std::int64_t pre_cols = 0;  // columns of the pre-activation: 2 * ffn where gated
  DType dtype = DType::kF32;
  DType wire_dtype = DType::kF32;
  DType combine_dtype = DType::kF32;
  bool recompute = false;  // backward computes the pre-activation again (save = rows)
  std::int32_t threads = 1;

  std::int64_t row_bytes() const { return hidden * static_cast<std::int64_t>(size_of(wire_dtype)); }
  std::int64_t sum_bytes() const { return hidden * static_cast<std::int64_t>(size_of(combine_dtype)); }
  // The GEMM of an op: forward 1 and 2, dgrad 2 and 1, wgrad 2 and 1.
  GemmShape gemm1(GemmKind kind) const { return {kind, hidden, pre_cols, dtype, threads}; }
  GemmShape gemm2(GemmKind kind) const { return {kind, ffn, hidden, dtype, threads}; }
};

// The work of one op of one rank (plan_summary.hpp tells it).
struct OpWork {
  std::vector<double> group_rows;  // of expert GEMMs: rows of each local slot
  double rows = 0;                 // of activation backward
  double bytes = 0;                // of row work: read and written; of puts: sent
  double num_messages = 0;         // of puts

  void clear();
};

struct OpCost {
  double compute_us = 0;  // of the rank's processor, puts included
  double link_us = 0;     // puts: how long the link is held
  double latency_us = 0;  // puts
  double receive_us = 0;  // puts: of the peer's processor
};

OpCost op_cost(const MachineProfile& profile, const LayerShape& layer, PassKind pass, const Op& op,
               const OpWork& work);

}  // namespace sluice
