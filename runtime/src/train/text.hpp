// The text that `sluice train` learns: where it comes from, which part is held out, in which order tokens are drawn,
// and what plain byte statistics make of it.
//
// A token is a position of the text: the byte there is told from the bytes before it.
//
// Held out: blocks of equal length spread evenly over the text, one at the end of each of the equal parts it is cut
// into. No window crosses a boundary: the first `margin` bytes of every range, of either kind, are context only.
// Order of training: token g of the run (step * tokens_per_step + index in the step) is element g of a pseudo-random
// permutation of all training positions, a new one each time round; a function of (seed, g) alone.
//
// Thread-safety: plain values; load_text() is collective. Blocks on files, and load_text() on rank 0.
// Errors: kNotFound (no such file), kIo, kInvalidArgument (empty, binary, too short); all name the path.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "sluice/base/config.hpp"
#include "sluice/runtime.hpp"

namespace sluice::train {

struct Text {
  std::string bytes;
  std::string description;  // "file notes.txt", "directory src (41 files)"
};

// At most `max_bytes` of a file, or of the text files below a directory one after the other in order of their paths.
// Not taken from a directory: files with a NUL byte, links, names that begin with a dot, folders named build* or
// holding a CMakeCache.txt. A single file with a NUL byte is refused.
Text read_text(const std::filesystem::path& path, std::int64_t max_bytes);

// What is read when no text is named: the sources that this program was built from if they are still there, else the
// current directory.
std::filesystem::path default_text_path();

// Collective. The text of train.text, or the default, read by rank 0 and sent to all: ranks cannot disagree. When it
// cannot be read every rank throws the same error.
Text load_text(Runtime& runtime, const Config& config);

struct TextRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t size() const { return end - begin; }
};

class TextSplit {
 public:
  // Bytes that one held-out block has at least (the text permitting), and the most blocks there are.
  static constexpr std::int64_t kMinBlockBytes = 2048;
  static constexpr std::int64_t kMaxBlocks = 256;

  // context: bytes that a token is told from. Throws when either part would have no token.
  TextSplit(std::int64_t num_bytes, std::int32_t context, double heldout_fraction);

  std::int64_t margin() const { return margin_; }  // max(context, 2): baselines look two bytes back
  const std::vector<TextRange>& train_ranges() const { return train_.ranges; }
  const std::vector<TextRange>& heldout_ranges() const { return heldout_.ranges; }
  std::int64_t num_train() const { return train_.first.back(); }
  std::int64_t num_heldout() const { return heldout_.first.back(); }
  // Position in the text of the i-th token.
  std::int64_t train_position(std::int64_t i) const { return train_.position(i, margin_); }
  std::int64_t heldout_position(std::int64_t i) const { return heldout_.position(i, margin_); }

 private:
  struct Part {
    std::vector<TextRange> ranges;
    std::vector<std::int64_t> first = {0};  // int64 [ranges + 1], tokens before each range
    void add(TextRange range, std::int64_t margin);
    std::int64_t position(std::int64_t i, std::int64_t margin) const;
  };
  std::int64_t margin_;
  Part train_, heldout_;
};

// The order in which training tokens are drawn (head of this file).
class TokenOrder {
 public:
  TokenOrder(std::uint64_t seed, std::int64_t num_tokens);
  // 0..num_tokens-1
  std::int64_t at(std::int64_t g) const;

 private:
  std::uint64_t seed_;
  std::int64_t num_tokens_;
  int half_bits_;
};

// Bits per byte of byte statistics on the held-out tokens, fitted on the training tokens.
//   p_k(c | h) = (n(h, c) + a_k p_{k-1}(c | h')) / (n(h) + a_k),   p_{-1} = 1/256,  h' = h without its oldest byte
// (Dirichlet prior on the next lower order; MacKay & Peto 1995). a_k is the power of two in 2^-6 .. 2^14 that makes the
// training tokens likeliest when each is left out of its own counts, lower orders first.
struct Baselines {
  double order0_bpb = 0;
  double order1_bpb = 0;
  double order2_bpb = 0;
  double prior[3] = {0, 0, 0};  // a_0, a_1, a_2
};
// heldout: positions of the held-out tokens to tell
Baselines byte_baselines(const std::string& bytes, const TextSplit& split,
                         const std::vector<std::int64_t>& heldout);

}  // namespace sluice::train
