// A decoding engine in C++ to copy from: two bigram models in place of a base model and an ARM, no Python anywhere.
//
//   engine [--sequences N] [--tokens N] [--vocab N] [--threads N] [--seed N] [--weight X] [--temperature X]
//          [--top-k N] [--top-p X] [--min-p X]
//
// Prints one line of token ids a sequence. Sequence b draws with seed + b, so that it is the same in any batch.
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "genarm_kernels.h"

namespace {

struct Options {
  int64_t sequences = 4, tokens = 16, vocab = 2000, threads = 2, seed = 0, top_k = 0;
  float weight = 1, temperature = 1, top_p = 1, min_p = 0;
};

[[noreturn]] void fail(int status, const char* what, const char* why) {
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

Options parse(int argc, char** argv) {
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
    if (!known) fail(2, argv[i], "no such option; they stand at the head of engine.cpp");
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

 private:
  int64_t vocab_;
  std::vector<float> table_;
};

}  // namespace

int main(int argc, char** argv) {
  const Options o = parse(argc, argv);
  // The header this was compiled with and the library that was loaded must agree on the structs.
  if (genarm_abi_version() != GENARM_ABI_VERSION) fail(1, "genarm_kernels", "library and header differ in ABI version");
  genarm_error error;

  genarm_thread_pool* raw_pool = nullptr;  // an engine with threads of its own fills a genarm_executor with them
  if (genarm_thread_pool_create(static_cast<int>(o.threads), &raw_pool, &error)) fail(1, "threads", error.message);
  const std::unique_ptr<genarm_thread_pool, void (*)(genarm_thread_pool*)> pool(raw_pool, genarm_thread_pool_destroy);

  const Bigram base(0, o.vocab), arm(1, o.vocab);
  const auto batch = static_cast<size_t>(o.sequences), vocab = static_cast<size_t>(o.vocab);
  std::vector<float> base_logits(batch * vocab), arm_logits(batch * vocab);
  const genarm_logits logits[] = {{base_logits.data(), o.vocab}, {arm_logits.data(), o.vocab}};
  std::vector<int64_t> token(batch, 0);  // every sequence begins after token 0
  std::vector<int32_t> kept(batch), status(batch);
  std::vector<std::vector<int64_t>> sequences(batch);
  const float base_weight = 1;
  int64_t position = 0;

  genarm_guided_step_args args{};  // zero first: what is not named below is off or neutral
  args.in.struct_size = sizeof args;
  args.in.dtype = GENARM_FLOAT32;
  args.in.rows = o.sequences;
  args.in.vocab_size = o.vocab;
  args.in.arms = 1;
  args.in.logits = logits;
  args.in.base_weight = {&base_weight, 0};  // stride 0: the same for every row
  args.in.weights = &o.weight;
  args.in.temperature = {&o.temperature, 0};
  args.in.executor = genarm_thread_pool_executor(pool.get());
  args.top_k = {&o.top_k, 0};
  args.top_p = {&o.top_p, 0};
  args.min_p = {&o.min_p, 0};
  args.seed = {&o.seed, 0};
  args.seed_step = 1;
  args.position = {&position, 0};
  args.token = token.data();  // the next step's last tokens at once
  args.kept = kept.data();
  args.status = status.data();

  size_t bytes = 0;  // once for all steps: then no step allocates
  if (genarm_guided_step_workspace(&args, &bytes, &error)) fail(1, "workspace", error.message);
  std::vector<unsigned char> workspace(bytes);
  args.in.workspace = workspace.data();
  args.in.workspace_size = bytes;

  for (; position < o.tokens; ++position) {
    base.forward(token, base_logits.data());
    arm.forward(token, arm_logits.data());
    if (genarm_guided_step(&args, &error)) fail(1, "guided_step", error.message);
    for (size_t b = 0; b < batch; ++b) {
      if (status[b] != GENARM_DRAWN) fail(1, "guided_step", "a row's logits are not finite: is --weight too large?");
      sequences[b].push_back(token[b]);
    }
  }
  for (const auto& sequence : sequences) {
    for (size_t i = 0; i < sequence.size(); ++i) std::printf(i ? " %lld" : "%lld", static_cast<long long>(sequence[i]));
    std::printf("\n");
  }
  return 0;
}
