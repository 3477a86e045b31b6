// What stands around the library in both engines: their options, and bigram tables in place of models.
//
//   engine [--sequences N] [--tokens N] [--vocab N] [--threads N] [--seed N] [--weight X] [--temperature X]
//          [--top-k N] [--top-p X] [--min-p X]
//
// Prints one line of token ids a sequence. Sequence b draws with seed + b * GENARM_SEED_STEP, so that it is the same
// in any batch.
#ifndef TOY_H_
#define TOY_H_

#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

struct Options {
  int64_t sequences = 4, tokens = 16, vocab = 2000, threads = 2, seed = 0, top_k = 0;
  float weight = 1, temperature = 1, top_p = 1, min_p = 0;
};

[[noreturn]] inline void fail(int status, const char* what, const char* why) {
  std::fprintf(stderr, "engine: %s: %s\n", what, why);
  std::exit(status);
}

template <class T>
T number(const char* name, const char* text, T least, T most) {
  T value{};
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end || !(value >= least && value <= most)) {
    std::fprintf(stderr, "engine: %s: expected a number from %g to %g, got '%s'\n", name, static_cast<double>(least),
                 static_cast<double>(most), text);
    std::exit(2);
  }
  return value;
}

inline Options parse(int argc, char** argv) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  constexpr float kLargest = std::numeric_limits<float>::max();
  Options o;
  for (int i = 1; i < argc; i += 2) {
    const auto is = [&](const char* name, auto* value, auto least, auto most) {
      if (std::strcmp(argv[i], name) != 0) return false;
      using T = std::remove_pointer_t<decltype(value)>;
      *value = number<T>(name, i + 1 < argc ? argv[i + 1] : "", static_cast<T>(least), static_cast<T>(most));
      return true;
    };
    const bool known = is("--sequences", &o.sequences, 1, 4096) || is("--tokens", &o.tokens, 1, 1 << 20) ||
                       is("--vocab", &o.vocab, 1, 8192) || is("--threads", &o.threads, 1, 256) ||
                       is("--seed", &o.seed, -kMost - 1, kMost) || is("--top-k", &o.top_k, 0, kMost) ||
                       is("--weight", &o.weight, -kLargest, kLargest) ||
                       is("--temperature", &o.temperature, 0, kLargest) || is("--top-p", &o.top_p, 0, 1) ||
                       is("--min-p", &o.min_p, 0, 1);
    if (!known) fail(2, argv[i], "no such option; they stand at the head of toy.h");
  }
  return o;
}

// The logits of the next token are a row of a table; an engine has a transformer here. Multiples of 1/64 in [0, 8).
class Bigram {
 public:
  Bigram(uint32_t model, int64_t vocab) : vocab_(vocab), table_(static_cast<size_t>(vocab * vocab)) {
    for (size_t i = 0; i < table_.size(); ++i) {
      uint32_t h = (static_cast<uint32_t>(i) + model * 0x9E3779B9u) * 0x85EBCA6Bu;  // i = last * vocab + next
      h = (h ^ h >> 15) * 0xC2B2AE35u;
      table_[i] = static_cast<float>(h >> 23) / 64;
    }
  }
  void forward(const std::vector<int64_t>& last, float* logits) const {  // logits [B, V]
    for (size_t b = 0; b < last.size(); ++b) {
      std::memcpy(logits + static_cast<int64_t>(b) * vocab_, &table_[static_cast<size_t>(last[b] * vocab_)],
                  static_cast<size_t>(vocab_) * sizeof(float));
    }
  }
  const std::vector<float>& table() const { return table_; }  // [V, V]

 private:
  int64_t vocab_;
  std::vector<float> table_;
};

inline void print(const std::vector<std::vector<int64_t>>& sequences) {
  for (const auto& sequence : sequences) {
    for (size_t i = 0; i < sequence.size(); ++i) std::printf(i ? " %lld" : "%lld", static_cast<long long>(sequence[i]));
    std::printf("\n");
  }
}

#endif  // TOY_H_
