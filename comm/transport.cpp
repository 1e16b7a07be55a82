#include "sluice/comm/transport.hpp"

namespace sluice::comm {

Status Transport::wait(const WaitSpec& spec) {
  advanced();
  while (true) {
    if (!aborted()) {
      if (signal(spec.channel, spec.signal) >= spec.value) break;
      if (progress()) continue;
      if (idle_work_ && idle_work_()) continue;
    }
    if (Status status = idle({&spec, 1}); !status.ok()) return status;
  }
  advanced();
  return {};
}

Survivors Transport::survivors(std::chrono::nanoseconds) {
  throw Error(ErrorCode::kNotSupported,
              str("transport ", name(),
                  " cannot form a group of the survivors; relaunch the job from its checkpoint"));
}

Status Transport::wait_for_puts(std::uint32_t channel, std::uint64_t num_puts) {
  while (puts_completed(channel) < num_puts) {
    if (!aborted() && (progress() || (idle_work_ && idle_work_()))) continue;
    if (Status status = idle({}); !status.ok()) return status;
  }
  return {};
}

}  // namespace sluice::comm
