// Runs ranks of a GPU group as processes (forked before CUDA is touched) or as threads of this process, on one host.
// Rank r uses device r modulo the number of devices, unless it asks for another. Blocking calls have a deadline: a rank that
// dies takes nobody along.
#pragma once

#include <cuda_runtime_api.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "sluice/comm/cuda/bootstrap.hpp"

namespace sluice::gpu_ranks {

inline constexpr int kMaxRanks = 64;
inline constexpr std::size_t kSlotBytes = 16384;

// Memory that all ranks share.
struct Meeting {
  std::atomic<std::uint32_t> arrived{0}, round{0};
  alignas(64) unsigned char slots[kMaxRanks][kSlotBytes];
};

class Rank {
 public:
  Rank(Meeting& meeting, int rank, int num_ranks) : rank(rank), num_ranks(num_ranks), meeting_(meeting) {}
  const int rank, num_ranks;
  int device = 0, num_devices = 1;

  void barrier(std::chrono::seconds deadline = std::chrono::seconds(100)) {
    const std::uint32_t now = meeting_.round.load();
    if (meeting_.arrived.fetch_add(1) + 1 == static_cast<std::uint32_t>(num_ranks)) {
      meeting_.arrived.store(0);
      meeting_.round.store(now + 1);
      return;
    }
    const auto end = std::chrono::steady_clock::now() + deadline;
    while (meeting_.round.load() == now) {
      if (std::chrono::steady_clock::now() > end)
        throw std::runtime_error("a rank did not come to the barrier");
      std::this_thread::yield();
    }
  }
  void all_gather(const void* mine, void* all, std::size_t bytes) {
    for (std::size_t at = 0; at < bytes; at += kSlotBytes) {
      const std::size_t part = bytes - at < kSlotBytes ? bytes - at : kSlotBytes;
      std::memcpy(meeting_.slots[rank], static_cast<const char*>(mine) + at, part);
      barrier();
      for (int r = 0; r < num_ranks; ++r)
        std::memcpy(static_cast<char*>(all) + static_cast<std::size_t>(r) * bytes + at, meeting_.slots[r],
                    part);
      barrier();
    }
  }
  comm::cuda::Bootstrap bootstrap() {
    return {rank, num_ranks,
            [this](const void* mine, void* all, std::size_t bytes) { all_gather(mine, all, bytes); }};
  }
  // Of some ranks, ascending, this one among them; messages call them by their ranks here. Each of its gathers is one of
  // the whole meeting: all ranks make groups of the same sizes, and the same calls of them in the same order.
  comm::cuda::Bootstrap bootstrap_of(const std::vector<int>& members) {
    const auto place = std::find(members.begin(), members.end(), rank) - members.begin();
    return {static_cast<int>(place), static_cast<int>(members.size()),
            [this, members](const void* mine, void* all, std::size_t bytes) {
              std::vector<unsigned char> whole(static_cast<std::size_t>(num_ranks) * bytes);
              all_gather(mine, whole.data(), bytes);
              for (std::size_t i = 0; i < members.size(); ++i)
                std::memcpy(static_cast<unsigned char*>(all) + i * bytes,
                            whole.data() + static_cast<std::size_t>(members[i]) * bytes, bytes);
            },
            members};
  }
  void use_device() { use_device(rank); }
  void use_device(int wanted) {
    if (cudaGetDeviceCount(&num_devices) != cudaSuccess || num_devices == 0)
      throw std::runtime_error("no CUDA device");
    device = wanted % num_devices;
    if (cudaSetDevice(device) != cudaSuccess) throw std::runtime_error("cudaSetDevice failed");
  }

 private:
  Meeting& meeting_;
};

inline Meeting* make_meeting() {
  void* memory = mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return new (memory) Meeting;
}

// Devices of this machine, counted in a process of its own, so that the caller may still fork.
inline int count_devices() {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    _exit(count);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

// Exit statuses of the ranks (minus the signal where one ended it). `body` returns 0 when all is well; what it throws is
// printed and counts as 1. What is left after the deadline, or 25 s after the first rank that did not end with 0, is
// killed.
inline std::vector<int> run_processes(int num_ranks, const std::function<int(Rank&)>& body,
                                      std::chrono::seconds deadline) {
  Meeting* meeting = make_meeting();
  std::fflush(nullptr);
  std::vector<pid_t> children;
  for (int r = 0; r < num_ranks; ++r) {
    const pid_t child = fork();
    if (child == 0) {
      int result = 1;
      try {
        Rank rank(*meeting, r, num_ranks);
        result = body(rank);
      } catch (const std::exception& e) {
        std::fprintf(stderr, "rank %d: %s\n", r, e.what());
      }
      std::fflush(nullptr);
      _exit(result);
    }
    children.push_back(child);
  }
  std::vector<int> results(static_cast<std::size_t>(num_ranks), -1000);
  auto end = std::chrono::steady_clock::now() + deadline;
  int left = num_ranks;
  while (left > 0) {
    for (std::size_t r = 0; r < children.size(); ++r) {
      int status = 0;
      if (results[r] != -1000 || waitpid(children[r], &status, WNOHANG) != children[r]) continue;
      results[r] = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
      --left;
      if (results[r] != 0) end = std::min(end, std::chrono::steady_clock::now() + std::chrono::seconds(25));
    }
    if (left > 0 && std::chrono::steady_clock::now() > end) {
      for (std::size_t r = 0; r < children.size(); ++r)
        if (results[r] == -1000) kill(children[r], SIGKILL);
    }
    if (left > 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  munmap(meeting, sizeof(Meeting));
  return results;
}
inline std::vector<int> run_threads(int num_ranks, const std::function<int(Rank&)>& body) {
  Meeting* meeting = make_meeting();
  std::vector<int> results(static_cast<std::size_t>(num_ranks), 1);
  std::vector<std::thread> threads;
  for (int r = 0; r < num_ranks; ++r) {
    threads.emplace_back([&, r] {
      try {
        Rank rank(*meeting, r, num_ranks);
        results[static_cast<std::size_t>(r)] = body(rank);
      } catch (const std::exception& e) {
        std::fprintf(stderr, "rank %d: %s\n", r, e.what());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  munmap(meeting, sizeof(Meeting));
  return results;
}

}  // namespace sluice::gpu_ranks
