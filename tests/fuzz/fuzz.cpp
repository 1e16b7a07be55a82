// A small mutating fuzzer for the parsers of foreign bytes. Deterministic for a seed. Where the code is compiled with
// -fsanitize-coverage=trace-pc (scripts/fuzz.sh does), inputs that reach new code join the corpus.
//
//   fuzz --target NAME|all [--runs N] [--seed S] [--max-bytes B]
//   fuzz --target NAME --input FILE        one input, such as a fuzz-crash-* file
//
// A target may throw sluice::Error, but not kInternal; anything else it throws, a signal, a sanitizer's report, or more
// than ten seconds for one input is a fault: the input is written to fuzz-crash-TARGET-SEED.bin and the program ends.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <random>
#include <sstream>

#include "targets.hpp"

namespace {

constexpr std::size_t kMapSize = 1 << 16;
unsigned char edges[kMapSize];
bool new_edge = false;
std::uintptr_t last_edge = 0;

}  // namespace

// Called by instrumented code at every edge, so it is not itself instrumented.
extern "C" [[gnu::no_sanitize_coverage, gnu::no_sanitize_address, gnu::no_sanitize_undefined]] void
__sanitizer_cov_trace_pc();
extern "C" void __sanitizer_cov_trace_pc() {
  // Relative to this function, so that runs with one seed do not differ by where the program lies in memory.
  const std::uintptr_t pc = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0)) -
                            reinterpret_cast<std::uintptr_t>(&__sanitizer_cov_trace_pc);
  unsigned char& seen = edges[((pc >> 1) * 0x9e3779b97f4a7c15ull ^ last_edge) % kMapSize];
  last_edge = pc >> 2;
  if (seen != 0) [[likely]]
    return;
  seen = 1;
  new_edge = true;
}

namespace sluice::fuzz {
namespace {

// ---- what is kept of an input for a fault

std::string current;
char crash_name[256];

void save_current() {
  const int fd = ::open(crash_name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (fd < 0) return;
  [[maybe_unused]] const ssize_t written = ::write(fd, current.data(), current.size());
  ::close(fd);
  static constexpr char kText[] = "fuzz: the input was written to ";
  [[maybe_unused]] ssize_t said = ::write(2, kText, sizeof kText - 1);
  said = ::write(2, crash_name, std::strlen(crash_name));
  said = ::write(2, "\n", 1);
}

void on_signal(int number) {
  save_current();
  signal(number, SIG_DFL);
  raise(number);
}

[[noreturn]] void fault(const std::string& what) {
  std::fprintf(stderr, "fuzz: %s\n", what.c_str());
  save_current();
  std::_Exit(1);
}

void execute(const Target& target, const std::string& input) {
  current = input;
  last_edge = 0;
  try {
    target.run(input);
  } catch (const Error& error) {
    if (error.code() == ErrorCode::kInternal) fault(error.what());
  } catch (const std::exception& error) {
    fault(std::string("an exception that is no sluice::Error: ") + error.what());
  }
}

// ---- mutation

class Mutator {
 public:
  Mutator(const Target& target, std::uint64_t seed, std::size_t max_bytes)
      : target_(target), random_(seed), max_bytes_(max_bytes) {
    // Words of the seeds, to put elsewhere.
    for (const std::string& seed_text : target.seeds) {
      std::string word;
      for (const char c : seed_text + " ") {
        if (std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '.') {
          word += c;
        } else {
          if (word.size() > 1 && words_.size() < 4096) words_.push_back(word);
          word.clear();
        }
      }
    }
    std::sort(words_.begin(), words_.end());
    words_.erase(std::unique(words_.begin(), words_.end()), words_.end());
  }

  std::string operator()(const std::vector<std::string>& corpus) {
    std::string out = corpus[random_() % corpus.size()];
    const std::size_t times = 1 + random_() % 6;
    for (std::size_t i = 0; i < times; ++i) once(out, corpus);
    if (out.size() > max_bytes_) out.resize(max_bytes_);
    if (target_.mend && random_() % 4 != 0) target_.mend(out);
    return out;
  }

 private:
  std::size_t below(std::size_t n) { return n == 0 ? 0 : random_() % n; }

  void once(std::string& s, const std::vector<std::string>& corpus) {
    static const char* const kNumbers[] = {"0",
                                           "-1",
                                           "1",
                                           "2147483647",
                                           "2147483648",
                                           "-9223372036854775808",
                                           "9223372036854775807",
                                           "18446744073709551615",
                                           "18446744073709551616",
                                           "1e308",
                                           "1e999",
                                           "-0.0",
                                           "nan",
                                           "inf",
                                           "0.1",
                                           "4294967296",
                                           "65536"};
    static const std::int64_t kWords[] = {0,         1,         -1,      INT32_MAX, INT32_MIN,
                                          INT64_MAX, INT64_MIN, 1 << 30, 1 << 20,   255};
    const std::size_t at = below(s.size() + 1);
    switch (random_() % 13) {
      case 0:  // a bit
        if (!s.empty()) s[below(s.size())] ^= static_cast<char>(1 << below(8));
        break;
      case 1:  // a byte
        if (!s.empty()) s[below(s.size())] = static_cast<char>(random_());
        break;
      case 2:
        s.insert(s.begin() + static_cast<std::ptrdiff_t>(at), static_cast<char>(random_()));
        break;
      case 3:
        s.erase(at, 1 + below(16));
        break;
      case 4: {  // a piece again
        const std::string piece = s.substr(below(s.size() + 1), 1 + below(32));
        s.insert(at, piece);
        break;
      }
      case 5: {  // the rest of another
        const std::string& other = corpus[below(corpus.size())];
        s = s.substr(0, at) + other.substr(below(other.size() + 1));
        break;
      }
      case 6:
        if (!words_.empty()) s.insert(at, words_[below(words_.size())]);
        break;
      case 7:
        s.insert(at, kNumbers[below(std::size(kNumbers))]);
        break;
      case 8: {  // a number in place of one
        std::size_t begin = at;
        while (begin < s.size() && !std::isdigit(static_cast<unsigned char>(s[begin]))) ++begin;
        std::size_t end = begin;
        while (end < s.size() && (std::isdigit(static_cast<unsigned char>(s[end])) || s[end] == '.')) ++end;
        if (begin < s.size()) s.replace(begin, end - begin, kNumbers[below(std::size(kNumbers))]);
        break;
      }
      case 9:
        s.resize(at);
        break;
      case 10: {  // a little-endian word
        const std::int64_t word =
            random_() % 2 == 0 ? kWords[below(std::size(kWords))] : static_cast<std::int64_t>(random_() % 64);
        const std::size_t size = random_() % 2 == 0 ? 4 : 8;
        if (s.size() >= size) std::memcpy(s.data() + below((s.size() - size) / 4 + 1) * 4, &word, size);
        break;
      }
      case 11:
        s.insert(at, 1 + below(64), static_cast<char>("[{\"\\ \n0x"[below(8)]));
        break;
      default:  // two bytes change places
        if (s.size() > 1) std::swap(s[below(s.size())], s[below(s.size())]);
        break;
    }
  }

  const Target& target_;
  std::mt19937_64 random_;
  std::size_t max_bytes_;
  std::vector<std::string> words_;
};

void fuzz(const Target& target, std::int64_t runs, std::uint64_t seed, std::size_t max_bytes) {
  std::snprintf(crash_name, sizeof crash_name, "fuzz-crash-%s-%llu.bin", target.name.c_str(),
                static_cast<unsigned long long>(seed));
  std::vector<std::string> corpus = target.seeds;
  std::fill(std::begin(edges), std::end(edges), 0);
  for (const std::string& input : corpus) execute(target, input);
  Mutator mutate(target, seed, max_bytes);
  const auto begin = std::chrono::steady_clock::now();
  for (std::int64_t i = 0; i < runs; ++i) {
    if (i % 256 == 0) alarm(10);
    std::string input = mutate(corpus);
    new_edge = false;
    execute(target, input);
    if (new_edge && corpus.size() < 20'000) corpus.push_back(std::move(input));
  }
  alarm(0);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const auto covered = std::count(std::begin(edges), std::end(edges), 1);
  std::printf(
      "{\"target\": \"%s\", \"executions\": %lld, \"seed\": %llu, \"seconds\": %.1f, \"corpus\": %zu, "
      "\"edges\": %lld, \"faults\": 0}\n",
      target.name.c_str(), static_cast<long long>(runs), static_cast<unsigned long long>(seed), seconds,
      corpus.size(), static_cast<long long>(covered));
  std::fflush(stdout);
}

int run(int argc, char** argv) {
  std::string name = "all", input;
  std::int64_t runs = 10'000;
  std::uint64_t seed = 1;
  std::size_t max_bytes = 4096;
  for (int i = 1; i < argc; ++i) {
    const std::string key = argv[i];
    if (key == "--list") {
      for (const Target& target : targets()) std::puts(target.name.c_str());
      return 0;
    }
    const std::string value = i + 1 < argc ? argv[++i] : "";
    if (key == "--target") {
      name = value;
    } else if (key == "--runs") {
      runs = std::atoll(value.c_str());
    } else if (key == "--seed") {
      seed = std::strtoull(value.c_str(), nullptr, 10);
    } else if (key == "--max-bytes") {
      max_bytes = static_cast<std::size_t>(std::atoll(value.c_str()));
    } else if (key == "--input") {
      input = value;
    } else {
      std::fprintf(
          stderr,
          "usage: fuzz [--list] [--target NAME|all] [--runs N] [--seed S] [--max-bytes B] [--input FILE]\n");
      return 2;
    }
  }
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM}) signal(number, on_signal);
  bool found = false;
  for (const Target& target : targets()) {
    if (name != "all" && target.name != name) continue;
    found = true;
    if (input.empty()) {
      fuzz(target, runs, seed, max_bytes);
      continue;
    }
    std::snprintf(crash_name, sizeof crash_name, "fuzz-crash-%s-again.bin", target.name.c_str());
    std::ifstream file(input, std::ios::binary);
    std::ostringstream bytes;
    bytes << file.rdbuf();
    execute(target, bytes.str());
  }
  if (!found) std::fprintf(stderr, "fuzz: there is no target %s; --list names them\n", name.c_str());
  return found ? 0 : 2;
}

}  // namespace
}  // namespace sluice::fuzz

// A sanitizer's report ends the program without a signal that could be caught.
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

int main(int argc, char** argv) {
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(&sluice::fuzz::save_current);
  sluice::set_log_level(sluice::LogLevel::kError);
  return sluice::fuzz::run(argc, argv);
}
