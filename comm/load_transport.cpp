// Gives a transport by its name: finds and loads its module where it has one. Modules stay loaded until the process ends: a message passing library
// cannot be taken out of a process again.
#include <dlfcn.h>
#include <link.h>

#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "sluice/comm/process_transport.hpp"
#include "sluice/comm/transport.hpp"
#include "sluice/comm/transport_module.hpp"

namespace sluice::comm {
namespace {

namespace fs = std::filesystem;

// The folder of the program or shared library that contains this code.
fs::path own_folder() {
  Dl_info info{};
  link_map* map = nullptr;
  std::error_code ignored;
  if (dladdr1(reinterpret_cast<const void*>(&own_folder), &info, reinterpret_cast<void**>(&map),
              RTLD_DL_LINKMAP) != 0 &&
      map != nullptr && map->l_name != nullptr && map->l_name[0] != '\0')
    return fs::canonical(map->l_name, ignored).parent_path();
  // The program itself has no name in its link map, and its argv[0] may be relative to a folder left since.
  return fs::read_symlink("/proc/self/exe", ignored).parent_path();
}

}  // namespace

std::string find_transport_module(std::string_view name) {
  const std::string file = str("libsluice_comm_", name, ".so");
  Require(!name.empty() && name.find('/') == std::string_view::npos, ErrorCode::kInvalidArgument, "\"", name,
          "\" is not the name of a transport");
  const fs::path folder = own_folder();
  fs::path found;
  for (const fs::path& candidate : {folder / file, folder / "../lib/sluice" / file,
                                    folder / "lib/sluice" / file, folder / "sluice" / file}) {
    std::error_code ignored;
    if (!fs::exists(candidate, ignored)) continue;
    found = candidate;
    break;
  }
  Require(!found.empty(), ErrorCode::kNotSupported, "transport ", name, " is not there: no ", file, " in ",
          folder.string(),
          " or beside it in lib/sluice; build Sluice with its option on, or choose another transport");
  return found.string();
}

void* load_module_symbol(std::string_view name, const char* symbol) {
  const std::string found = find_transport_module(name);
  // UCX writes its warnings to standard output, where reports go, unless told otherwise before it is loaded.
  setenv("UCX_LOG_FILE", "stderr", 0);
  void* module = dlopen(found.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (module == nullptr) {
    const char* why = dlerror();
    throw Error(ErrorCode::kNotSupported,
                str("cannot load ", found, ": ", why ? why : "unknown reason", "; install what it needs"));
  }
  void* out = dlsym(module, symbol);
  Require(out != nullptr, ErrorCode::kNotSupported, found, " has no ", symbol,
          "; it belongs to another version of Sluice");
  return out;
}

std::unique_ptr<Transport> load_transport(std::string_view name, const Topology* topology_override,
                                          const JoinOptions& options) {
  if (is_process_transport(name)) return join_group(name, topology_override, options);
  auto* make = reinterpret_cast<MakeTransport*>(load_module_symbol(name, kMakeTransportSymbol));
  return std::unique_ptr<Transport>(make(topology_override));
}

}  // namespace sluice::comm
