#include "sluice/base/error.hpp"

#include <charconv>
#include <new>

namespace sluice {

std::string_view to_string(ErrorCode code) noexcept {
  switch (code) {
#define SLUICE_X(name, text, scope) \
  case ErrorCode::name:             \
    return text;
    SLUICE_ERROR_LIST(SLUICE_X)
#undef SLUICE_X
  }
  return "unknown error code";
}

Scope scope_of(ErrorCode code) noexcept {
  switch (code) {
#define SLUICE_X(name, text, scope) \
  case ErrorCode::name:             \
    return scope;
    SLUICE_ERROR_LIST(SLUICE_X)
#undef SLUICE_X
  }
  return Scope::kProcess;
}

std::string_view to_string(Scope scope) noexcept {
  switch (scope) {
    case Scope::kCall:
      return "call";
    case Scope::kContext:
      return "context";
    case Scope::kGroup:
      return "group";
    case Scope::kProcess:
      return "process";
  }
  return "unknown scope";
}

void Status::throw_if_error(std::source_location where) const {
  if (!ok()) throw Error(code, message, where);
}

Error::Error(ErrorCode code, std::string message, std::source_location where)
    : status_{code, std::move(message)},
      where_(str(where.file_name(), ":", where.line(), " (", where.function_name(), ")")),
      what_(str(to_string(code), ": ", status_.message)) {}

Status current_exception_status() noexcept {
  try {
    throw;
  } catch (const Error& e) {
    return e.status();
  } catch (const std::bad_alloc&) {
    return {ErrorCode::kOutOfMemory, "host memory allocation failed"};
  } catch (const std::exception& e) {
    return {ErrorCode::kInternal, e.what()};
  } catch (...) {
    return {ErrorCode::kInternal, "an exception of unknown type"};
  }
}

namespace detail {
void append(std::string& out, double value) {
  char buffer[32];
  auto [end, ec] = std::to_chars(buffer, buffer + sizeof buffer, value);
  out.append(buffer, ec == std::errc{} ? end : buffer);
}
}  // namespace detail

}  // namespace sluice
