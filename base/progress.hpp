// How far a job is, on standard error: one line that is written over on a terminal, a few log lines (info) elsewhere.
// One rank prints; which one is the caller's choice.
//
// Thread-safety: one thread. Blocks on standard error only.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "sluice/base/clock.hpp"
#include "sluice/base/log.hpp"

namespace sluice {

class Progress {
 public:
  // what: first word of the line ("train"). total: steps of the whole job, at least 1.
  Progress(std::string what, std::int64_t total, bool terminal = stderr_is_terminal());
  // Removes the line that is written over.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // After step `done` of `total`: prints "train step 30 of 300 <text()>" when it is time to. On a terminal that is ten
  // times a second; elsewhere at the first and the last step, each tenth of the job, and every 30 s. The last step's
  // line stays. `text` is called only for a line that is printed.
  void update(std::int64_t done, const std::function<std::string()>& text,
              Clock::time_point now = Clock::now());

 private:
  std::string what_;
  std::int64_t total_;
  bool terminal_;
  std::int64_t last_tenth_ = -1;  // -1: nothing printed yet
  Clock::time_point last_time_{};
};

}  // namespace sluice
