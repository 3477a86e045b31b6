// A decoding step (csrc/cpu/decoder.cpp) on threads of every kind: the same bits as on one, nothing written or read out
// of bounds, no race. That the numbers are right, tests/backends/test_cpu.py says.
//
//   decoder_test

#include "cpu/decoder.h"

#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "cpu/row.h"
#include "genarm_kernels.h"

namespace {

using genarm::Decoder;
using genarm::DecoderLayer;
using genarm::DecoderStep;
using genarm::Linear;
using genarm::Norm;
using genarm::WeightType;

constexpr int64_t kHidden = 40, kIntermediate = 136, kHeads = 6, kKvHeads = 3, kHeadSize = 16, kVocab = 77,
                  kLength = 20, kOperands = 2, kRows = 6;

// Every tensor is an allocation of its own, so that a sanitizer sees what lies beyond it.
struct Model {
  std::mt19937 random{7};
  std::vector<std::vector<float>> floats;
  std::vector<std::vector<uint16_t>> halves;
  Decoder decoder{};

  const float* numbers(int64_t count) {
    std::vector<float> made(static_cast<size_t>(count));
    for (float& x : made) x = static_cast<float>(random() % 2001) / 1000 - 1;
    floats.push_back(std::move(made));
    return floats.back().data();
  }
  uint16_t* bfloat16(int64_t count) {
    std::vector<uint16_t> made(static_cast<size_t>(count));
    for (uint16_t& x : made) x = static_cast<uint16_t>(0x3C00 + random() % 0x200 + (random() & 1) * 0x8000);
    halves.push_back(std::move(made));
    return halves.back().data();
  }
  Linear linear(int64_t out, int64_t in) {
    return {WeightType::kBFloat16,
            bfloat16(out * in),
            nullptr,
            numbers(out),
            in,
            out,
            {{1, numbers(3 * in), numbers(3 * out), 3}}};
  }
  Norm norm(int64_t width) { return {numbers(width), 1e-6f}; }

  Model() {
    decoder.operands = kOperands;
    decoder.hidden = kHidden;
    decoder.heads = kHeads;
    decoder.kv_heads = kKvHeads;
    decoder.head_size = kHeadSize;
    decoder.vocab = decoder.embeddings = kVocab;
    decoder.length = kLength;
    decoder.caches = GENARM_BFLOAT16;
    decoder.embedding_type = WeightType::kBFloat16;
    decoder.embedding = bfloat16(kVocab * kHidden);
    decoder.attention_scale = 0.25f;
    decoder.cos = numbers(kLength * kHeadSize);
    decoder.sin = numbers(kLength * kHeadSize);
    decoder.norm = norm(kHidden);
    decoder.head = linear(kVocab, kHidden);
    for (int64_t window : {int64_t{1} << 62, int64_t{5}}) {
      decoder.layers.push_back({norm(kHidden), norm(kHeadSize), norm(kHeadSize), norm(kHidden),
                                linear(kHeads * kHeadSize, kHidden), linear(kKvHeads * kHeadSize, kHidden),
                                linear(kKvHeads * kHeadSize, kHidden), linear(kHidden, kHeads * kHeadSize),
                                linear(kIntermediate, kHidden), linear(kIntermediate, kHidden),
                                linear(kHidden, kIntermediate), bfloat16(kRows * kLength * kKvHeads * kHeadSize),
                                bfloat16(kRows * kLength * kKvHeads * kHeadSize), window});
    }
  }
};

// A prompt, then steps of one token and of several, as a decoder makes them.
std::vector<float> decode(genarm_isa isa, const genarm_executor& executor) {
  Model model;
  DecoderStep step(model.decoder, genarm::kernels_of(isa)->layers);
  std::vector<float> all;
  const auto run = [&](int64_t first, int64_t rows, int64_t count, int64_t length, bool last) {
    std::vector<int64_t> tokens(static_cast<size_t>(rows * count)), lengths(static_cast<size_t>(rows), length);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int64_t>(i * 13 + 5) % kVocab;
    std::vector<float> logits(static_cast<size_t>(rows * (last ? 1 : count) * kVocab));
    step.run(executor, tokens.data(), lengths.data(), first, rows, count, last, logits.data());
    all.insert(all.end(), logits.begin(), logits.end());
  };
  for (int64_t row = 0; row < kRows; ++row) run(row, 1, 7, 0, true);
  run(0, kRows, 1, 7, false);
  run(0, 2, 1, 8, false);
  run(0, 4, 3, 8, false);
  run(0, kRows, 9, 11, false);  // to the caches' end
  return all;
}

// Tasks one after the other, the last one first: no thread ever meets another.
genarm_executor alone() {
  return {[](void*, int count, void (*task)(void*, int), void* data) {
            for (int i = count - 1; i >= 0; --i) task(data, i);
          },
          nullptr, 3};
}

}  // namespace

int main() {
  int failures = 0;
  for (genarm_isa isa : {GENARM_ISA_PORTABLE, GENARM_ISA_AVX2, GENARM_ISA_AVX512}) {
    if (!genarm_isa_supported(isa)) continue;
    const std::vector<float> expected = decode(isa, {nullptr, nullptr, 0});
    const auto check = [&](const char* how, const genarm_executor& executor) {
      for (int repeat = 0; repeat < 5; ++repeat) {
        const std::vector<float> found = decode(isa, executor);
        const bool same = found.size() == expected.size() &&
                          std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)) == 0;
        if (!same) std::printf("%s, %s: other bits\n", genarm_isa_name(isa), how), ++failures;
      }
    };
    check("one thread for three tasks", alone());
    for (int threads : {2, 5}) {
      genarm_thread_pool* pool;
      if (genarm_thread_pool_create(threads, &pool, nullptr) != GENARM_OK) return 1;
      check("a pool", genarm_thread_pool_executor(pool));
      genarm_thread_pool_destroy(pool);
    }
    for (float x : expected) failures += !(x == x);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
