#include <mpi.h>

#include <algorithm>
#include <vector>

#include "raw_link.hpp"
#include "sluice/base/clock.hpp"

namespace sluice::bench {
namespace {

// MPI was initialised by a transport of this process that is gone. Errors end the job, as is MPI's default.
class RawMpi final : public RawLink {
 public:
  explicit RawMpi(RawBuffers buffers) : buffers_(buffers) { MPI_Comm_rank(MPI_COMM_WORLD, &me_); }
  std::string name() const override { return "MPI_Send and MPI_Isend"; }
  bool needs_all() const override { return true; }
  double ping_us(int pings) override {
    MPI_Barrier(MPI_COMM_WORLD);
    const auto begin = Clock::now();
    for (int i = 0; i < pings && me_ <= 1; ++i) {
      if (me_ == 0) MPI_Send(buffers_.source.data(), 8, MPI_BYTE, 1, 0, MPI_COMM_WORLD);
      MPI_Recv(buffers_.sink.data(), 8, MPI_BYTE, 1 - me_, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
      if (me_ == 1) MPI_Send(buffers_.source.data(), 8, MPI_BYTE, 0, 0, MPI_COMM_WORLD);
    }
    return to_us(Clock::now() - begin) / (2 * pings);
  }
  double stream_us(std::size_t bytes, std::size_t count) override {
    const int size = static_cast<int>(bytes);
    std::vector<MPI_Request> requests(me_ <= 1 ? count : 0);
    char done = 0;
    const auto at = [&](std::size_t i) { return i * bytes % buffers_.sink.size(); };
    if (me_ == 1)
      for (std::size_t i = 0; i < count; ++i)
        MPI_Irecv(buffers_.sink.data() + at(i), size, MPI_BYTE, 0, 1, MPI_COMM_WORLD, &requests[i]);
    MPI_Barrier(MPI_COMM_WORLD);
    const auto begin = Clock::now();
    if (me_ == 0)
      for (std::size_t i = 0; i < count; ++i)
        MPI_Isend(buffers_.source.data() + at(i), size, MPI_BYTE, 1, 1, MPI_COMM_WORLD, &requests[i]);
    MPI_Waitall(static_cast<int>(requests.size()), requests.data(), MPI_STATUSES_IGNORE);
    if (me_ == 1) MPI_Send(&done, 1, MPI_BYTE, 0, 2, MPI_COMM_WORLD);
    if (me_ == 0) MPI_Recv(&done, 1, MPI_BYTE, 1, 2, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    return to_us(Clock::now() - begin);
  }

 private:
  RawBuffers buffers_;
  int me_ = 0;
};

}  // namespace

std::unique_ptr<RawLink> make_raw_mpi(RawBuffers buffers) {
  return std::make_unique<RawMpi>(buffers);
}

}  // namespace sluice::bench
