#include "sluice/comm/host.hpp"

#include <hwloc.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>

#include "sluice/base/error.hpp"

namespace sluice::comm {
namespace {

std::string link_target(const char* path) {
  char text[256] = "";
  const ssize_t n = ::readlink(path, text, sizeof text - 1);
  return n > 0 ? std::string(text, static_cast<std::size_t>(n)) : std::string();
}

struct Closer {
  void operator()(hwloc_topology* t) const { hwloc_topology_destroy(t); }
  void operator()(hwloc_bitmap_s* b) const { hwloc_bitmap_free(b); }
};
using Bitmap = std::unique_ptr<hwloc_bitmap_s, Closer>;

std::string list_of(const Bitmap& bitmap) {
  char* text = nullptr;
  if (hwloc_bitmap_list_asprintf(&text, bitmap.get()) < 0) return {};
  std::string out = text;
  std::free(text);
  return out;
}

std::int32_t count(hwloc_topology_t machine, hwloc_obj_type_t type) {
  return std::max(0, hwloc_get_nbobjs_by_type(machine, type));
}

}  // namespace

std::string host_name() {
  char name[256] = "";
  return ::gethostname(name, sizeof name - 1) == 0 ? name : "unknown";
}

std::string host_identity() {
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  struct stat shm {};
  const bool has_shm = ::stat("/dev/shm", &shm) == 0;
  return str(boot, " ", host_name(), " ", link_target("/proc/self/ns/net"), " ",
             link_target("/proc/self/ns/ipc"), " ", has_shm ? static_cast<std::int64_t>(shm.st_dev) : -1);
}

HostDescription describe_host() {
  hwloc_topology_t raw = nullptr;
  const bool made = hwloc_topology_init(&raw) == 0;
  const std::unique_ptr<hwloc_topology, Closer> machine(made ? raw : nullptr);
  const bool loaded = machine && hwloc_topology_load(machine.get()) == 0;
  Require(loaded, ErrorCode::kNotSupported, "hwloc cannot read this machine: ", std::strerror(errno),
          "; see /sys, and HWLOC_XMLFILE");
  HostDescription out;
  out.packages = count(machine.get(), HWLOC_OBJ_PACKAGE);
  out.cores = count(machine.get(), HWLOC_OBJ_CORE);
  out.threads = count(machine.get(), HWLOC_OBJ_PU);
  out.numa_nodes = count(machine.get(), HWLOC_OBJ_NUMANODE);
  if (const hwloc_obj_t l3 = hwloc_get_obj_by_type(machine.get(), HWLOC_OBJ_L3CACHE, 0))
    out.l3_bytes = static_cast<std::int64_t>(l3->attr->cache.size);
  const Bitmap own(hwloc_bitmap_alloc());
  const Bitmap numa(hwloc_bitmap_alloc());
  Require(own && numa, ErrorCode::kOutOfMemory, "no memory for a set of cores");
  // A system that does not say may run it anywhere.
  if (hwloc_get_cpubind(machine.get(), own.get(), HWLOC_CPUBIND_PROCESS) != 0)
    hwloc_bitmap_copy(own.get(), hwloc_topology_get_topology_cpuset(machine.get()));
  hwloc_bitmap_and(own.get(), own.get(), hwloc_topology_get_topology_cpuset(machine.get()));
  hwloc_cpuset_to_nodeset(machine.get(), own.get(), numa.get());
  out.own_threads = list_of(own);
  out.own_numa_nodes = list_of(numa);
  for (std::int32_t c = 0; c < out.cores; ++c) {
    const hwloc_obj_t core = hwloc_get_obj_by_type(machine.get(), HWLOC_OBJ_CORE, static_cast<unsigned>(c));
    out.num_own_cores += hwloc_bitmap_intersects(core->cpuset, own.get()) ? 1 : 0;
  }
  return out;
}

}  // namespace sluice::comm
