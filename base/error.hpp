// Errors of Sluice: one list of codes, an exception for set-up and misuse, a Status for completion paths.
//
// Rules (docs/design.md, "Errors"):
//  * Set-up, validation and misuse throw Error. Progress loops, callbacks and destructors never throw: they
//    return or record a Status.
//  * An error names the thing, the value, what was allowed, and what to do about it.
//  * Each code has a Scope: the largest thing that is broken by it. Recovery is decided on scope.
//  * Who decides which error it is logs it once; everyone else propagates.
//
// Thread-safety: Status and Error are plain values.
#pragma once

#include <exception>
#include <source_location>
#include <string>
#include <string_view>

namespace sluice {

// The largest thing an error breaks.
enum class Scope {
  kCall,     // this call only; the caller may correct its input and go on
  kContext,  // one plan or context; others in flight go on
  kGroup,    // the communication group: it must be re-formed
  kProcess,  // nothing in this process can be trusted
};

// X(enumerator, text, scope)
#define SLUICE_ERROR_LIST(X)                               \
  X(kOk, "ok", Scope::kCall)                               \
  X(kInvalidArgument, "invalid argument", Scope::kCall)    \
  X(kInvalidConfig, "invalid configuration", Scope::kCall) \
  X(kInvalidRouting, "invalid routing", Scope::kCall)      \
  X(kInvalidState, "invalid state", Scope::kCall)          \
  X(kNotSupported, "not supported", Scope::kCall)          \
  X(kNotFound, "not found", Scope::kCall)                  \
  X(kIo, "input/output error", Scope::kCall)               \
  X(kOutOfMemory, "out of memory", Scope::kContext)        \
  X(kDisagreement, "ranks disagree", Scope::kGroup)        \
  X(kTimeout, "deadline passed", Scope::kGroup)            \
  X(kPeerLost, "peer lost", Scope::kGroup)                 \
  X(kAborted, "group aborted", Scope::kGroup)              \
  X(kTransport, "transport failure", Scope::kGroup)        \
  X(kInternal, "internal error (please report)", Scope::kProcess)

enum class ErrorCode : int {
#define SLUICE_X(name, text, scope) name,
  SLUICE_ERROR_LIST(SLUICE_X)
#undef SLUICE_X
};

std::string_view to_string(ErrorCode code) noexcept;
std::string_view to_string(Scope scope) noexcept;
Scope scope_of(ErrorCode code) noexcept;

// The outcome of an operation that must not throw. Empty message when ok.
struct [[nodiscard]] Status {
  ErrorCode code = ErrorCode::kOk;
  std::string message;

  bool ok() const noexcept { return code == ErrorCode::kOk; }
  Scope scope() const noexcept { return scope_of(code); }
  // Throws Error if not ok.
  void throw_if_error(std::source_location where = std::source_location::current()) const;
};

// Thrown on set-up and misuse. what() is one line: "<code text>: <message>".
class Error : public std::exception {
 public:
  Error(ErrorCode code, std::string message, std::source_location where = std::source_location::current());

  ErrorCode code() const noexcept { return status_.code; }
  Scope scope() const noexcept { return status_.scope(); }
  const std::string& message() const noexcept { return status_.message; }
  const Status& status() const noexcept { return status_; }
  // Where it was raised, "file:line (function)"; for logs at debug level, not part of what().
  const std::string& where() const noexcept { return where_; }
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  Status status_;
  std::string where_;
  std::string what_;
};

// The status of the exception being handled; call only inside a catch block. Unknown exceptions are kInternal.
Status current_exception_status() noexcept;

namespace detail {
template <typename... Parts>
std::string concat(const Parts&... parts);
}  // namespace detail

// Throws Error(code, parts joined) unless `condition`. Parts are strings or numbers.
template <typename... Parts>
struct Require {
  Require(bool condition, ErrorCode code, const Parts&... parts,
          std::source_location where = std::source_location::current()) {
    if (!condition) [[unlikely]]
      throw Error(code, detail::concat(parts...), where);
  }
};
template <typename... Parts>
Require(bool, ErrorCode, const Parts&...) -> Require<Parts...>;

namespace detail {
inline void append(std::string& out, std::string_view text) {
  out += text;
}
inline void append(std::string& out, const std::string& text) {
  out += text;
}
inline void append(std::string& out, const char* text) {
  out += text;
}
inline void append(std::string& out, char c) {
  out += c;
}
inline void append(std::string& out, bool value) {
  out += value ? "true" : "false";
}
void append(std::string& out, double value);
inline void append(std::string& out, float value) {
  append(out, static_cast<double>(value));
}
template <typename Integer>
requires std::is_integral_v<Integer>
void append(std::string& out, Integer value) {
  out += std::to_string(value);
}
template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::string out;
  (append(out, parts), ...);
  return out;
}
}  // namespace detail

// Joins strings and numbers into one string; numbers print shortest round-trip.
template <typename... Parts>
std::string str(const Parts&... parts) {
  return detail::concat(parts...);
}

}  // namespace sluice
