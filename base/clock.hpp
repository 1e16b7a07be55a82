// Time: one steady clock, deadlines as points of it. "No deadline" is std::nullopt, never a magic number.
#pragma once

#include <chrono>
#include <optional>

namespace sluice {

using Clock = std::chrono::steady_clock;
using Deadline = std::optional<Clock::time_point>;

inline Deadline deadline_after(std::chrono::nanoseconds span) {
  return Clock::now() + span;
}
inline bool passed(const Deadline& deadline) {
  return deadline && Clock::now() >= *deadline;
}

inline double to_us(Clock::duration span) {
  return std::chrono::duration<double, std::micro>(span).count();
}
inline double to_ms(Clock::duration span) {
  return std::chrono::duration<double, std::milli>(span).count();
}

}  // namespace sluice
