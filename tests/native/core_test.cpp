// The C core against an oracle written from the contract alone: z by a chain of fmaf, the rest in double, filters by
// std::sort, Philox from its paper. Nothing of csrc is used to say what is right.
//
//   core_test [cases [first]]     a case is a function of its number: `core_test 1 4711` runs that one again

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/random.h"  // only to be compared with the oracle
#include "genarm_kernels.h"

namespace {

constexpr int64_t kTile = 1024;
constexpr float kInfinity = INFINITY;
constexpr genarm_isa kIsas[] = {GENARM_ISA_PORTABLE, GENARM_ISA_AVX2, GENARM_ISA_AVX512, GENARM_ISA_AUTO};

// ---- Checks -------------------------------------------------------------------------------------------------------

std::atomic<int> failures{0};
std::string context;  // the case, for the message

#define CHECK(condition, ...)                                                  \
  do {                                                                         \
    if (!(condition)) {                                                        \
      std::printf("line %d, %s: %s; ", __LINE__, context.c_str(), #condition); \
      std::printf(__VA_ARGS__);                                                \
      std::printf("\n");                                                       \
      if (++failures == 20) std::exit(1); /* more would not say more */        \
    }                                                                          \
  } while (false)

struct Statistics {
  int64_t rows = 0, drawn = 0, other_tokens = 0, other_kept = 0;
  double largest_error = 0;  // of a float, in units of what is allowed
} statistics;

bool close_to(float got, double wanted) {
  if (std::isnan(wanted)) return std::isnan(got);
  if (std::isinf(static_cast<float>(wanted))) return got == static_cast<float>(wanted);
  const double error = std::fabs(got - wanted) / (4e-6 + 1e-6 * std::fabs(wanted));
  statistics.largest_error = std::max(statistics.largest_error, error);  // a NaN is not taken, but fails below
  return error <= 1;
}

// Numbers between guards: what is written outside shows.
template <class T>
class Guarded {
 public:
  explicit Guarded(size_t count = 0, size_t shift = 0)
      : shift_(shift), count_(count), memory_(count * sizeof(T) + shift + 2 * kGuard, kFill) {}
  T* data() { return reinterpret_cast<T*>(memory_.data() + kGuard + shift_); }
  T operator[](int64_t i) const {
    T x;
    std::memcpy(&x, memory_.data() + kGuard + shift_ + static_cast<size_t>(i) * sizeof(T), sizeof x);
    return x;
  }
  bool untouched(size_t first, size_t last) const {  // elements [first, last)
    const auto begin = memory_.begin() + static_cast<std::ptrdiff_t>(kGuard + shift_);
    const auto is_fill = [](unsigned char byte) { return byte == kFill; };
    return std::all_of(begin + static_cast<std::ptrdiff_t>(first * sizeof(T)),
                       begin + static_cast<std::ptrdiff_t>(last * sizeof(T)), is_fill);
  }
  bool untouched() const { return untouched(0, count_); }
  bool intact() const {
    const auto is_fill = [](unsigned char byte) { return byte == kFill; };
    return std::all_of(memory_.begin(), memory_.begin() + static_cast<std::ptrdiff_t>(kGuard + shift_), is_fill) &&
           std::all_of(memory_.end() - static_cast<std::ptrdiff_t>(kGuard), memory_.end(), is_fill);
  }
  bool operator==(const Guarded& other) const { return memory_ == other.memory_; }  // bit for bit

 private:
  static constexpr size_t kGuard = 128;
  static constexpr unsigned char kFill = 0xA5;
  size_t shift_, count_;
  std::vector<unsigned char> memory_;
};

// ---- Oracle: random numbers ---------------------------------------------------------------------------------------

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", section 3.3: per round (L, R) of each half becomes
// (mulhi(R) ^ key ^ L, mullo(R)), the halves' R are swapped, and the key takes a Weyl step.
void philox4x32_10(uint32_t x[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * x[0], b = uint64_t{0xCD9E8D57} * x[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ x[3] ^ key1, static_cast<uint32_t>(a)};
    std::memcpy(x, next, sizeof next);
    key0 += 0x9E3779B9;  // golden ratio
    key1 += 0xBB67AE85;  // sqrt(3) - 1
  }
}

std::pair<uint32_t, uint32_t> random_words(uint64_t seed, uint64_t position, uint32_t tile, uint32_t purpose) {
  uint32_t x[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), tile, purpose};
  philox4x32_10(x, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return {x[0], x[1]};
}

double uniform(uint64_t seed, uint64_t position) {
  const auto [high, low] = random_words(seed, position, 0, 1);
  const uint64_t bits = uint64_t{high} << 21 | low >> 11;
  return std::max(std::ldexp(static_cast<double>(bits), -53), std::ldexp(1.0, -54));
}

double gumbel(uint64_t seed, uint64_t position, int64_t tile) {
  const auto [high, low] = random_words(seed, position, static_cast<uint32_t>(tile), 0);
  const double c = std::ldexp(high, -32) + std::ldexp(low + 0.5, -64);
  const double complement = std::ldexp(~high, -32) + std::ldexp(~low + 0.5, -64);
  return -std::log(c < 0.5 ? -std::log1p(-c) : -std::log(complement));
}

// ---- Oracle: a row ------------------------------------------------------------------------------------------------

struct Parameters {
  float lowest;                // finite number of the operands' type
  std::vector<float> weights;  // the base's, then the ARMs'
  float temperature;
  std::vector<uint32_t> mask;  // empty: every token is allowed
  // Of a step only; a whole distribution has them off.
  int64_t top_k = 0;
  float top_p = 1, min_p = 0;
  uint64_t seed = 0, position = 0;
};

class Row {
 public:
  Row(const std::vector<std::vector<float>>& x, Parameters parameters) : parameters_(std::move(parameters)) {
    const size_t vocab = x[0].size();
    const auto& p = parameters_;
    bool bad = !(p.temperature >= 0 && p.temperature < kInfinity) || !(p.top_p >= 0 && p.top_p <= 1) ||
               !(p.min_p >= 0 && p.min_p <= 1);
    for (const float weight : p.weights) bad = bad || !std::isfinite(weight);
    float top = -kInfinity;
    for (size_t v = 0; v < vocab; ++v) {
      const bool in_mask = p.mask.empty() || (p.mask[v / 32] >> v % 32 & 1);
      bool blocked = false, spoilt = false;
      float z = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        if (p.weights[i] == 0) continue;
        blocked = blocked || x[i][v] <= p.lowest;
        spoilt = spoilt || std::isnan(x[i][v]) || x[i][v] == kInfinity;
        z = std::fmaf(p.weights[i], x[i][v], z);
      }
      const bool allowed = in_mask && !blocked && z != -kInfinity;
      bad = bad || (in_mask && spoilt) || (allowed && !std::isfinite(z));
      z_.push_back(allowed ? z : -kInfinity);
      if (allowed) by_z_.push_back(static_cast<int64_t>(v));
      if (allowed && z > top) top = z;
    }
    status_ = bad ? GENARM_BAD_ROW : by_z_.empty() ? GENARM_NO_ALLOWED_TOKEN : GENARM_DRAWN;
    if (status_ != GENARM_DRAWN) return;

    greedy_ = p.temperature == 0;
    const double temperature = greedy_ ? 1 : p.temperature;
    for (const float z : z_) scaled_.push_back((static_cast<double>(z) - top) / temperature);
    std::sort(by_z_.begin(), by_z_.end(), [this](int64_t a, int64_t b) { return z_[a] > z_[b]; });
    mass_to_.push_back(0);
    for (const int64_t v : by_z_) mass_to_.push_back(mass_to_.back() + std::exp(scaled_[v]));
    log_total_ = std::log(mass_to_.back());
  }

  int status() const { return status_; }
  bool greedy() const { return greedy_; }
  double logprob(int64_t token) const { return scaled_[token] - log_total_; }
  double log_mass(int64_t kept) const { return std::log(mass_to_[kept]) - log_total_; }
  int64_t greediest() const { return std::max_element(z_.begin(), z_.end()) - z_.begin(); }  // the first of equals

  // How many of by_z_ stay. `slack` moves the boundaries of top-p and min-p by a rounding error.
  int64_t kept(int slack = 0) const {
    const auto& p = parameters_;
    const double top_p = p.top_p * (1 + slack * 4e-6), min_p = p.min_p * (1 - slack * 1e-9);
    const auto count = static_cast<int64_t>(by_z_.size());
    const auto in_top_k = [&](int64_t above) { return p.top_k <= 0 || above < p.top_k; };
    int64_t after_top_k = 0;
    while (after_top_k < count && in_top_k(above(after_top_k))) ++after_top_k;
    const double target = top_p * mass_to_[after_top_k];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = above(i);
      const bool in_top_p = p.top_p >= 1 || mass_to_[n] < target;
      if (n > 0 && !(in_top_k(n) && in_top_p && std::exp(scaled_[by_z_[i]]) >= min_p)) return i;
    }
    return count;
  }

  // The first `kept` are all the tokens equal to the last of them, and no equal is left out.
  bool splits_no_equals(int64_t kept) const {
    return kept == static_cast<int64_t>(by_z_.size()) || above(kept) == kept;
  }

  // The token drawn from the first `kept` of by_z_. `other`, if not -1, is returned in its place when rounding
  // explains it: a race of tiles, or a step of the cumulative sum, that is as good as undecided.
  int64_t draw(int64_t kept, int64_t other) const {
    const auto vocab = static_cast<int64_t>(z_.size()), tiles = (vocab + kTile - 1) / kTile;
    const float lowest = z_[by_z_[kept - 1]];
    std::vector<double> score(tiles, -kInfinity), log_weight(tiles, -kInfinity);
    std::vector<std::vector<double>> cdf(tiles);
    for (int64_t t = 0; t < tiles; ++t) {
      double top = -kInfinity, sum = 0;
      const int64_t end = std::min(vocab, (t + 1) * kTile);
      for (int64_t v = t * kTile; v < end; ++v) top = z_[v] >= lowest ? std::max(top, scaled_[v]) : top;
      if (top == -kInfinity) continue;
      for (int64_t v = t * kTile; v < end; ++v) {
        cdf[t].push_back(sum += z_[v] >= lowest ? std::exp(scaled_[v] - top) : 0);
      }
      log_weight[t] = std::log(sum) + top;
      score[t] = log_weight[t] + gumbel(parameters_.seed, parameters_.position, t);
    }
    const int64_t winner = std::max_element(score.begin(), score.end()) - score.begin();
    const double u = uniform(parameters_.seed, parameters_.position);

    if (other >= 0) {
      const int64_t t = other / kTile, i = other % kTile;
      const bool tile_open =
          t == winner || score[winner] - score[t] < 2e-6 + 5e-7 * std::fabs(log_weight[winner] - log_weight[t]);
      if (tile_open && z_[other] >= lowest) {
        const double total = cdf[t].back(), before = i == 0 ? 0 : cdf[t][i - 1];
        if (before - 2e-6 * total <= u * total && u * total <= cdf[t][i] + 2e-6 * total) return other;
      }
    }
    const std::vector<double>& sums = cdf[winner];
    return winner * kTile + (std::upper_bound(sums.begin(), sums.end(), u * sums.back()) - sums.begin());
  }

 private:
  int64_t above(int64_t i) const {  // tokens of larger z than the i-th
    while (i > 0 && z_[by_z_[i - 1]] == z_[by_z_[i]]) --i;
    return i;
  }

  Parameters parameters_;
  int status_;
  bool greedy_ = false;
  std::vector<float> z_;         // -inf where not allowed
  std::vector<double> scaled_;   // (z - top) / temperature
  std::vector<int64_t> by_z_;    // the allowed tokens, z falling
  std::vector<double> mass_to_;  // mass_to_[i]: of the first i of them
  double log_total_ = 0;
};

// One operand's own log-softmax at a token: NaN when it holds NaN or +inf, or -inf alone.
double own_logprob(const std::vector<float>& x, int64_t token) {
  const double top = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const float value : x) sum += std::exp(value - top);
  return x[token] - top - std::log(sum);
}

// ---- Cases --------------------------------------------------------------------------------------------------------

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint64_t bits() { return engine_(); }
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  bool chance(double p) { return uniform() < p; }
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return radius * std::cos(2 * 3.14159265358979323846 * uniform());
  }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[between(0, static_cast<int64_t>(values.size()) - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

// Elements at `origin` + row * stride + column * column_stride of a block that holds no element more.
template <class T>
struct Strided {
  std::vector<T> memory;
  int64_t origin = 0, stride = 0, column_stride = 0;

  Strided() = default;
  // `shift`: elements that stand before, to move the pointer off its alignment.
  Strided(int64_t rows, int64_t columns, int64_t stride, int64_t column_stride, T fill, int64_t shift = 0)
      : stride(stride), column_stride(column_stride) {
    const int64_t by_row = (rows - 1) * stride, by_column = (columns - 1) * column_stride;
    origin = shift - std::min<int64_t>(by_row, 0) - std::min<int64_t>(by_column, 0);
    memory = std::vector<T>(static_cast<size_t>(shift + std::abs(by_row) + std::abs(by_column) + 1), fill);
  }
  T& at(int64_t row, int64_t column = 0) {
    return memory[static_cast<size_t>(origin + row * stride + column * column_stride)];
  }
  const T& at(int64_t row, int64_t column = 0) const { return const_cast<Strided*>(this)->at(row, column); }
  const T* data() const { return memory.data() + origin; }
};

uint16_t bits16(genarm_dtype dtype, float x) {
  if (dtype == GENARM_BFLOAT16) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<uint16_t>(std::isnan(x) ? 0x7FC0 : bits >> 16);
  }
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  if (std::isnan(x)) return 0x7E00;
  if (std::isinf(x)) return sign | 0x7C00;
  const float size = std::min(std::fabs(x), 65504.0f);
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const auto mantissa = static_cast<int>(std::ldexp(size, 10 - exponent));  // 1024 up to 2047 unless subnormal
  return static_cast<uint16_t>(sign + (exponent + 14) * 1024 + mantissa);
}

float lowest(genarm_dtype dtype) {
  if (dtype == GENARM_FLOAT32) return -std::ldexp(float{(1 << 24) - 1}, 104);
  return dtype == GENARM_BFLOAT16 ? -std::ldexp(255.0f, 120) : -65504.0f;
}

float value16(genarm_dtype dtype, uint16_t bits) {
  const int width = dtype == GENARM_BFLOAT16 ? 7 : 10, bias = dtype == GENARM_BFLOAT16 ? 127 : 15;
  const int exponent = (bits & 0x7FFF) >> width, mantissa = bits & ((1 << width) - 1);
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 2 * bias + 1) return mantissa ? NAN : sign * kInfinity;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), 1 - bias - width);
  return sign * std::ldexp(static_cast<float>(mantissa + (1 << width)), exponent - bias - width);
}

// One model's logits; only the member of the case's dtype is used.
struct Operand {
  Strided<float> wide;
  Strided<uint16_t> narrow;
};

struct Case {
  genarm_dtype dtype;
  int64_t rows, vocab, arms;
  std::vector<Operand> operands;
  std::vector<genarm_logits> logits;
  Strided<float> base_weight, weights, temperature, top_p, min_p;
  Strided<int64_t> top_k, seed, position;
  int64_t seed_step;
  bool masked;
  Strided<int32_t> mask;
  int64_t logprobs_stride;

  std::vector<float> operand_row(int64_t i, int64_t b) const {
    std::vector<float> row;
    for (int64_t v = 0; v < vocab; ++v) {
      row.push_back(dtype == GENARM_FLOAT32 ? operands[i].wide.at(b, v) : value16(dtype, operands[i].narrow.at(b, v)));
    }
    return row;
  }
  Parameters parameters(int64_t b, bool of_step) const {
    Parameters p{lowest(dtype), {base_weight.at(b)}, temperature.at(b), {}};
    for (int64_t w = 0; masked && w < (vocab + 31) / 32; ++w) p.mask.push_back(static_cast<uint32_t>(mask.at(b, w)));
    for (int64_t i = 0; i < arms; ++i) p.weights.push_back(weights.at(b, i));
    if (!of_step) return p;
    p.top_k = top_k.at(b);
    p.top_p = top_p.at(b);
    p.min_p = min_p.at(b);
    p.seed = static_cast<uint64_t>(seed.at(b)) + static_cast<uint64_t>(b) * static_cast<uint64_t>(seed_step);
    p.position = static_cast<uint64_t>(position.at(b));
    return p;
  }
};

// A function from token to logit of one of many shapes.
std::function<float(int64_t)> logits_of_some_shape(Random& random, int64_t vocab) {
  const double size = random.one_of({0.1, 1.0, 3.0, 10.0, 100.0});
  const double offset = random.one_of({0.0, 0.0, 0.0, 10.0, -10.0, 200.0, -1000.0, 5000.0});
  const int64_t chosen = random.between(0, vocab - 1);
  Random* r = &random;
  switch (random.between(0, 11)) {
    case 0:  // a few levels: many equals
      return [=](int64_t) { return static_cast<float>(r->between(-8, 8) * 0.25 + offset); };
    case 1:
      return [=](int64_t) { return static_cast<float>(offset); };
    case 2:
      return [=](int64_t v) { return static_cast<float>(offset + (v == chosen ? 4 * size : 0)); };
    case 3:  // far from what the row's first tokens promise
      return [=](int64_t v) { return static_cast<float>(offset + size * 0.02 * static_cast<double>(v)); };
    case 4:
      return [=](int64_t v) { return static_cast<float>(offset - size * 0.02 * static_cast<double>(v)); };
    case 5:  // up to sums beyond float32
      return [=](int64_t) { return static_cast<float>(r->normal() * (size > 50 ? 1e38 : 1e37)); };
    case 6:  // denormal
      return [=](int64_t) { return static_cast<float>(r->normal() * 1e-41); };
    case 7:
      return [=](int64_t) { return r->chance(0.5) ? 0.0f : -0.0f; };
    default:
      return [=](int64_t) { return static_cast<float>(offset + size * r->normal()); };
  }
}

template <class Draw>
auto per_row(Random& random, int64_t rows, Draw draw) {
  using T = decltype(draw());
  Strided<T> values(rows, 1, random.one_of<int64_t>({0, 1, 1, 3, -1, -2}), 0, T{99}, random.between(0, 3));
  for (int64_t b = 0; b < rows; ++b) values.at(b) = draw();
  return values;
}

Case make_case(Random& random, int64_t rows, int64_t vocab, int64_t arms) {
  Case c{};
  c.dtype = random.one_of({GENARM_FLOAT32, GENARM_BFLOAT16, GENARM_FLOAT16});
  c.rows = rows, c.vocab = vocab, c.arms = arms;

  const bool blocked = random.chance(0.3), poisoned = random.chance(0.2);
  const double blocked_share = random.one_of({0.001, 0.1, 0.5, 0.99});
  const float nothing = random.one_of({-kInfinity, lowest(c.dtype)});
  for (int64_t i = 0; i <= arms; ++i) {
    const int64_t width = vocab + random.one_of<int64_t>({0, 0, 1, 7, 40});
    const int64_t stride = random.one_of<int64_t>({width, width, width, -width, 0});
    const int64_t shift = random.between(0, 17);
    Operand operand;
    if (c.dtype == GENARM_FLOAT32) {
      operand.wide = Strided<float>(rows, vocab, stride, 1, NAN, shift);
    } else {
      operand.narrow = Strided<uint16_t>(rows, vocab, stride, 1, bits16(c.dtype, NAN), shift);
    }
    const auto put = [&](int64_t b, int64_t v, float x) {
      if (c.dtype == GENARM_FLOAT32) operand.wide.at(b, v) = x;
      if (c.dtype != GENARM_FLOAT32) operand.narrow.at(b, v) = bits16(c.dtype, x);
    };
    for (int64_t b = 0; b < rows; ++b) {
      const auto logit = logits_of_some_shape(random, vocab);
      const bool block_here = blocked && random.chance(0.5);
      for (int64_t v = 0; v < vocab; ++v) {
        put(b, v, block_here && random.chance(blocked_share) ? nothing : logit(v));
      }
      if (poisoned && random.chance(0.3)) put(b, random.between(0, vocab - 1), random.chance(0.5) ? NAN : kInfinity);
    }
    c.operands.push_back(std::move(operand));
    const Operand& kept = c.operands.back();
    const void* data = c.dtype == GENARM_FLOAT32 ? static_cast<const void*>(kept.wide.data()) : kept.narrow.data();
    c.logits.push_back({data, stride});
  }

  const bool bad_parameters = random.chance(0.1), filters = random.chance(0.7);
  const auto or_bad = [&](float x) {
    return bad_parameters && random.chance(0.1) ? random.one_of({NAN, -1.0f, 1.5f, kInfinity, -kInfinity}) : x;
  };
  const auto weight = [&] {
    return random.chance(0.15) ? random.one_of({0.0f, -0.0f}) : static_cast<float>(random.normal());
  };
  c.base_weight = per_row(random, rows, [&] { return or_bad(random.chance(0.5) ? 1.0f : weight()); });
  switch (random.between(0, 4)) {
    case 0:
      c.weights = Strided<float>(rows, arms, arms, 1, 9);
      break;
    case 1:
      c.weights = Strided<float>(rows, arms, 1, rows, 9);
      break;
    case 2:
      c.weights = Strided<float>(rows, arms, 0, 1, 9);
      break;
    case 3:
      c.weights = Strided<float>(rows, arms, 0, 0, 9);
      break;
    default:
      c.weights = Strided<float>(rows, arms, 2 * arms, -2, 9);
  }
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t i = 0; i < arms; ++i) c.weights.at(b, i) = random.chance(0.02) ? or_bad(NAN) : weight();
  }
  c.temperature = per_row(random, rows, [&] {
    return or_bad(random.one_of({1.0f, 1.0f, 1.0f, 0.7f, 2.0f, 0.1f, 0.0f, -0.0f, 10.0f, 1e-3f, 1e-20f, 1e4f}));
  });
  c.top_k = per_row(random, rows, [&]() -> int64_t {
    if (!filters) return random.one_of<int64_t>({0, -1, INT64_MIN, INT64_MAX, vocab});
    return random.one_of<int64_t>({0, 0, 0, 1, 2, 5, 50, 400, vocab - 1, vocab, random.between(1, vocab)});
  });
  c.top_p = per_row(random, rows, [&] {
    if (!filters) return or_bad(1.0f);
    return or_bad(random.one_of({1.0f, 1.0f, 1.0f, 0.9f, 0.5f, 0.99f, 0.999f, 0.05f, 0.0f, 1e-8f, 1 - 0x1p-24f}));
  });
  c.min_p = per_row(random, rows, [&] {
    if (!filters) return or_bad(0.0f);
    return or_bad(random.one_of({0.0f, 0.0f, 0.0f, -0.0f, 0.05f, 0.3f, 1e-6f, 1e-40f, 1.0f}));
  });
  const auto any = [&] { return static_cast<int64_t>(random.chance(0.5) ? random.bits() : random.bits() % 100); };
  c.seed = per_row(random, rows, any);
  c.seed_step = random.one_of<int64_t>({0, 1, GENARM_SEED_STEP, any()});
  c.position = per_row(random, rows, any);

  c.masked = random.chance(0.3);
  if (c.masked) {
    const int64_t words = (vocab + 31) / 32, step = random.one_of<int64_t>({1, 1, 3, -1});
    const int64_t stride = random.one_of<int64_t>({1, -1, 0}) * (words + random.between(0, 2)) * step;
    c.mask = Strided<int32_t>(rows, words, stride, step, -1, random.between(0, 3));
    const double share = random.one_of({1.0, 0.5, 0.05, 0.001, 0.0});
    const bool bits_past_the_end = random.chance(0.5);
    const int64_t lane = random.chance(0.3) ? random.between(0, 15) : -1;  // the only one of a vector's lanes
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t w = 0; w < words; ++w) {
        uint32_t bits = 0;
        for (int64_t v = 32 * w; v < 32 * w + 32; ++v) {
          const bool set = v < vocab ? random.chance(share) && (lane < 0 || v % 16 == lane) : bits_past_the_end;
          bits |= static_cast<uint32_t>(set) << v % 32;
        }
        c.mask.at(b, w) = static_cast<int32_t>(bits);
      }
    }
  }
  const int64_t width = vocab + random.one_of<int64_t>({0, 1, 5});
  c.logprobs_stride = random.one_of<int64_t>({width, width, -width});
  return c;
}

Case make_case(Random& random) {
  int64_t vocab = 1;
  switch (random.between(0, 49)) {
    case 0:  // beyond the 8192 numbers among which the core seeks a threshold
      vocab = random.between(5000, 25000);
      break;
    case 1:
    case 2:
    case 3:
    case 4:
    case 5:
    case 6:
    case 7:
    case 8:
      vocab = random.between(1000, 5000);
      break;
    case 9:
    case 10:
    case 11:
    case 12:
    case 13:
    case 14:
      vocab = kTile * random.between(1, 4) + random.between(-17, 17);
      break;
    case 15:
    case 16:
    case 17:
    case 18:
    case 19:
      vocab = 16 * random.between(1, 100);
      break;
    default:
      vocab = random.chance(0.5) ? random.between(1, 70) : random.between(1, 1100);
  }
  const int64_t rows = vocab < 300 && random.chance(0.3) ? random.between(5, 20) : random.between(1, 4);
  return make_case(random, rows, vocab, random.one_of<int64_t>({0, 1, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9}));
}

// ---- Calls --------------------------------------------------------------------------------------------------------

enum class Workspace { kNone, kExact };

struct How {
  genarm_isa isa = GENARM_ISA_AUTO;
  genarm_executor executor{};
  Workspace workspace = Workspace::kNone;
  bool logprobs = true;
};

struct Step {
  Guarded<int64_t> token;
  Guarded<float> logprob, log_mass;
  Guarded<int32_t> kept;
  Guarded<float> base_logprob, arm_logprobs;
  Guarded<int32_t> status;

  Step() = default;
  explicit Step(const Case& c)
      : token(c.rows),
        logprob(c.rows),
        log_mass(c.rows),
        kept(c.rows),
        base_logprob(c.rows),
        arm_logprobs(c.rows * c.arms),
        status(c.rows) {}
  bool same_draw(const Step& other) const {
    return token == other.token && kept == other.kept && status == other.status;
  }
  bool operator==(const Step& other) const {
    return same_draw(other) && logprob == other.logprob && log_mass == other.log_mass &&
           base_logprob == other.base_logprob && arm_logprobs == other.arm_logprobs;
  }
  bool intact() const {
    return token.intact() && logprob.intact() && log_mass.intact() && kept.intact() && base_logprob.intact() &&
           arm_logprobs.intact() && status.intact();
  }
  bool no_floats() const {
    return logprob.untouched() && log_mass.untouched() && base_logprob.untouched() && arm_logprobs.untouched();
  }
};

genarm_inputs inputs(const Case& c, const How& how, size_t struct_size) {
  genarm_inputs in{};
  in.struct_size = struct_size;
  in.dtype = c.dtype;
  in.isa = how.isa;
  in.rows = c.rows;
  in.vocab_size = c.vocab;
  in.arms = c.arms;
  in.logits = c.logits.data();
  in.base_weight = {c.base_weight.data(), c.base_weight.stride};
  if (c.arms > 0) {
    in.weights = c.weights.data();
    in.weights_row_stride = c.weights.stride;
    in.weights_arm_stride = c.weights.column_stride;
  }
  in.temperature = {c.temperature.data(), c.temperature.stride};
  if (c.masked) {
    in.token_mask = c.mask.data();
    in.token_mask_row_stride = c.mask.stride;
    in.token_mask_word_stride = c.mask.column_stride;
  }
  in.executor = how.executor;
  return in;
}

genarm_guided_step_args arguments(const Case& c, const How& how, Step* out) {
  genarm_guided_step_args args{};
  args.in = inputs(c, how, sizeof args);
  args.top_k = {c.top_k.data(), c.top_k.stride};
  args.top_p = {c.top_p.data(), c.top_p.stride};
  args.min_p = {c.min_p.data(), c.min_p.stride};
  args.seed = {c.seed.data(), c.seed.stride};
  args.seed_step = c.seed_step;
  args.position = {c.position.data(), c.position.stride};
  args.token = out->token.data();
  args.kept = out->kept.data();
  args.status = out->status.data();
  if (how.logprobs) {
    args.logprob = out->logprob.data();
    args.log_mass = out->log_mass.data();
    args.base_logprob = out->base_logprob.data();
    if (c.arms > 0) args.arm_logprobs = out->arm_logprobs.data();
  }
  return args;
}

// Calls `operation` with the workspace that `how` wants.
template <class Args>
void call(genarm_result (*operation)(const Args*, genarm_error*),
          genarm_result (*workspace_query)(const Args*, size_t*, genarm_error*), Args args, const How& how) {
  genarm_error error{};
  size_t bytes = 0;
  Guarded<unsigned char> workspace;
  if (how.workspace != Workspace::kNone) {
    const genarm_result result = workspace_query(&args, &bytes, &error);
    CHECK(result == GENARM_OK, "%d: %s", result, error.message);
    workspace = Guarded<unsigned char>(bytes, bytes % 61);  // at any address
    args.in.workspace = workspace.data();
    args.in.workspace_size = bytes - 1;
    CHECK(operation(&args, &error) == GENARM_INVALID_ARGUMENT && std::strstr(error.message, "workspace_size"), "%s",
          error.message);
    args.in.workspace_size = bytes;
  }
  const genarm_result result = operation(&args, &error);
  CHECK(result == GENARM_OK, "%d: %s", result, error.message);
  CHECK(workspace.intact(), "written outside of the workspace");
}

Step step(const Case& c, const How& how) {
  Step out(c);
  call(genarm_guided_step, genarm_guided_step_workspace, arguments(c, how, &out), how);
  CHECK(out.intact(), "written outside of an output");
  CHECK(how.logprobs || out.no_floats(), "log-probabilities nobody asked for");
  return out;
}

size_t logprobs_at(const Case& c, int64_t row) {  // the element where a row of log-probabilities begins
  return static_cast<size_t>((c.logprobs_stride < 0 ? row - c.rows + 1 : row) * c.logprobs_stride);
}

Guarded<float> log_softmax(const Case& c, const How& how) {
  const size_t width = static_cast<size_t>(std::abs(c.logprobs_stride)), vocab = static_cast<size_t>(c.vocab);
  const size_t elements = static_cast<size_t>(c.rows - 1) * width + vocab;
  Guarded<float> out(elements);
  genarm_guided_log_softmax_args args{};
  args.in = inputs(c, how, sizeof args);
  args.logprobs = out.data() + logprobs_at(c, 0);
  args.logprobs_row_stride = c.logprobs_stride;
  call(genarm_guided_log_softmax, genarm_guided_log_softmax_workspace, args, how);
  CHECK(out.intact(), "written outside of the log-probabilities");
  for (int64_t b = 0; b + 1 < c.rows; ++b) {
    const size_t gap = static_cast<size_t>(b) * width;
    CHECK(out.untouched(gap + vocab, gap + width), "written between rows of log-probabilities");
  }
  return out;
}

class Pool {
 public:
  explicit Pool(int threads) {
    genarm_error error{};
    CHECK(genarm_thread_pool_create(threads, &pool_, &error) == GENARM_OK, "%s", error.message);
  }
  ~Pool() { genarm_thread_pool_destroy(pool_); }
  Pool(const Pool&) = delete;
  genarm_executor executor() const { return genarm_thread_pool_executor(pool_); }

 private:
  genarm_thread_pool* pool_ = nullptr;
};

// An engine's own: the last task first, all on the caller's thread; remembers the most tasks it was given.
struct Backwards {
  int most = 0;
  genarm_executor executor(int threads) {
    return {[](void* self, int count, void (*task)(void*, int), void* data) {
              auto* backwards = static_cast<Backwards*>(self);
              backwards->most = std::max(backwards->most, count);
              for (int i = count; i-- > 0;) task(data, i);
            },
            this, threads};
  }
};

// ---- Tests --------------------------------------------------------------------------------------------------------

void test_constants() {
  context = "constants";
  static_assert(GENARM_TILE == kTile, "the width of a tile is part of the draw");
  CHECK(genarm_abi_version() == GENARM_ABI_VERSION, "%d", genarm_abi_version());
  const char* names[] = {"portable", "avx2", "avx512"};
  for (int isa = GENARM_ISA_PORTABLE; isa <= GENARM_ISA_AVX512; ++isa) {
    const char* name = genarm_isa_name(static_cast<genarm_isa>(isa));
    const bool supported = genarm_isa_supported(static_cast<genarm_isa>(isa));
    CHECK(supported ? name && std::string(name) == names[isa - 1] : !name, "isa %d", isa);
  }
  CHECK(genarm_isa_supported(GENARM_ISA_PORTABLE), "every machine runs it");
  CHECK(genarm_isa_supported(GENARM_ISA_AUTO) == (genarm_isa_name(GENARM_ISA_AUTO) != nullptr), "AUTO");
}

void test_random_numbers() {
  context = "random numbers";
  // kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, result.
  const uint32_t known[][10] = {
      {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
      {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff, 0x408f276d, 0x41c83b0e, 0xa20bc7c6,
       0x6d5451fd},
      {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0, 0xd16cfe09, 0x94fdcceb, 0x5001e420,
       0x24126ea1},
  };
  for (const auto& k : known) {
    uint32_t x[4] = {k[0], k[1], k[2], k[3]};
    philox4x32_10(x, k[4], k[5]);
    CHECK(std::equal(x, x + 4, k + 6), "the oracle's own Philox");
    const uint64_t position = uint64_t{k[1]} << 32 | k[0], seed = uint64_t{k[5]} << 32 | k[4];
    const uint64_t bits = genarm::random_bits(seed, position, k[2], k[3]);
    CHECK(bits == (uint64_t{k[6]} << 32 | k[7]), "%016llx", static_cast<unsigned long long>(bits));
  }

  Random random(1);
  for (int i = 0; i < 20000; ++i) {
    const uint64_t seed = random.bits(), position = random.bits();
    CHECK(genarm::token_uniform(seed, position) == uniform(seed, position), "round %d", i);
    // A race of exponentials gives the tile that the law gives: argmax of log weight + Gumbel.
    genarm::TileRace race{seed, position};
    double best = -kInfinity;
    int64_t winner = -1;
    const double spread = random.one_of({0.0, 1.0, 30.0, 600.0});
    for (int64_t tile = 0, tiles = random.between(1, 30); tile < tiles; ++tile) {
      const double log_weight = -spread * random.uniform(), score = log_weight + gumbel(seed, position, tile);
      race.enter(tile, std::exp(log_weight));
      if (score > best) best = score, winner = tile;
    }
    CHECK(race.winner == winner, "round %d: %lld, expected %lld", i, static_cast<long long>(race.winner),
          static_cast<long long>(winner));
  }
}

void check_step(const Case& c, int64_t b, const Step& out) {
  std::vector<std::vector<float>> x;
  for (int64_t i = 0; i <= c.arms; ++i) x.push_back(c.operand_row(i, b));
  const Row row(x, c.parameters(b, true));
  const auto row_number = static_cast<int>(b);
  const int64_t token = out.token[b], kept = out.kept[b];
  ++statistics.rows;

  CHECK(out.status[b] == row.status(), "row %d: %d, expected %d", row_number, out.status[b], row.status());
  if (out.status[b] != row.status()) return;
  if (row.status() != GENARM_DRAWN) {
    bool empty = token == -1 && kept == 0 && std::isnan(out.logprob[b]) && std::isnan(out.log_mass[b]) &&
                 std::isnan(out.base_logprob[b]);
    for (int64_t i = 0; i < c.arms; ++i) empty = empty && std::isnan(out.arm_logprobs[b * c.arms + i]);
    CHECK(empty, "row %d is not drawn", row_number);
    return;
  }
  ++statistics.drawn;

  CHECK(token >= 0 && token < c.vocab, "row %d: token %lld", row_number, static_cast<long long>(token));
  if (token < 0 || token >= c.vocab) return;
  if (row.greedy()) {
    CHECK(token == row.greediest() && kept == 1, "row %d: token %lld, kept %lld, greedy", row_number,
          static_cast<long long>(token), static_cast<long long>(kept));
    CHECK(close_to(out.log_mass[b], row.logprob(token)), "row %d: %.9g", row_number, out.log_mass[b]);
  } else {
    const int64_t kept_wanted = row.kept();
    if (kept != kept_wanted) {
      ++statistics.other_kept;
      const bool rounding = kept >= row.kept(-1) && kept <= row.kept(1) && row.splits_no_equals(kept);
      CHECK(rounding, "row %d: kept %lld, expected %lld", row_number, static_cast<long long>(kept),
            static_cast<long long>(kept_wanted));
      if (!rounding) return;
    }
    if (token != row.draw(kept, -1)) {
      ++statistics.other_tokens;
      CHECK(token == row.draw(kept, token), "row %d: token %lld, expected %lld", row_number,
            static_cast<long long>(token), static_cast<long long>(row.draw(kept, -1)));
    }
    CHECK(close_to(out.log_mass[b], row.log_mass(kept)), "row %d: %.9g, expected %.9g", row_number, out.log_mass[b],
          row.log_mass(kept));
  }
  CHECK(out.logprob[b] <= out.log_mass[b] && out.log_mass[b] <= 0 && (kept > 1 || out.logprob[b] == out.log_mass[b]),
        "row %d: %.9g of %.9g", row_number, out.logprob[b], out.log_mass[b]);
  CHECK(close_to(out.logprob[b], row.logprob(token)), "row %d: %.9g, expected %.9g", row_number, out.logprob[b],
        row.logprob(token));
  for (int64_t i = 0; i <= c.arms; ++i) {
    const float own = i == 0 ? out.base_logprob[b] : out.arm_logprobs[b * c.arms + i - 1];
    const double wanted = own_logprob(x[i], token);
    CHECK(close_to(own, wanted) && !(own > 0), "row %d, operand %d: %.9g, expected %.9g", row_number,
          static_cast<int>(i), own, wanted);
  }
}

void check_log_softmax(const Case& c, int64_t b, const Guarded<float>& out) {
  std::vector<std::vector<float>> x;
  for (int64_t i = 0; i <= c.arms; ++i) x.push_back(c.operand_row(i, b));
  const Row row(x, c.parameters(b, false));
  const bool bad = row.status() == GENARM_BAD_ROW || !(c.temperature.at(b) > 0);
  const size_t first = logprobs_at(c, b);
  for (int64_t v = 0; v < c.vocab; ++v) {
    const float got = out[static_cast<int64_t>(first) + v];
    const double wanted = bad ? NAN : row.status() == GENARM_DRAWN ? row.logprob(v) : -kInfinity;
    const bool right = close_to(got, wanted) && !(got > 0);
    CHECK(right, "row %d, token %d: %.9g, expected %.9g", static_cast<int>(b), static_cast<int>(v), got, wanted);
    if (!right) return;
  }
}

void test_random_cases(int64_t cases, int64_t first) {
  const Pool pools[] = {Pool(1), Pool(2), Pool(3), Pool(8)};
  for (int64_t number = first; number < first + cases; ++number) {
    Random random(static_cast<uint64_t>(number));
    const Case c = make_case(random);
    context = "case " + std::to_string(number) + " (rows " + std::to_string(c.rows) + ", vocabulary " +
              std::to_string(c.vocab) + ", ARMs " + std::to_string(c.arms) + ")";
    const How plain{GENARM_ISA_PORTABLE};
    const Step drawn = step(c, plain);
    const Guarded<float> whole = log_softmax(c, plain);
    for (int64_t b = 0; b < c.rows; ++b) check_step(c, b, drawn);
    for (int64_t b = 0; b < c.rows; ++b) check_log_softmax(c, b, whole);

    for (const genarm_isa isa : kIsas) {
      if (!genarm_isa_supported(isa)) continue;
      How how{isa};
      how.executor = pools[random.between(0, 3)].executor();
      how.workspace = random.one_of({Workspace::kNone, Workspace::kExact});
      CHECK(step(c, how) == drawn, "other bits on %s with %d threads", genarm_isa_name(isa), how.executor.threads);
      CHECK(log_softmax(c, how) == whole, "other log-probabilities on %s with %d threads", genarm_isa_name(isa),
            how.executor.threads);
      how.logprobs = false;
      CHECK(step(c, how).same_draw(drawn), "another draw without log-probabilities on %s", genarm_isa_name(isa));
    }
  }
  context = "all cases";
  CHECK(statistics.other_tokens * 10000 <= std::max<int64_t>(statistics.drawn, 10000), "%lld other tokens in %lld rows",
        static_cast<long long>(statistics.other_tokens), static_cast<long long>(statistics.drawn));
}

struct Shape {
  int64_t rows, vocab;
};

// Large enough for every way to share out a call: rows, the tiles of a row, and rows first with tiles behind.
const std::vector<Shape>& shared_shapes() {
  static const std::vector<Shape> shapes{{1, 16384}, {1, 70001}, {2, 40000}, {5, 20011}, {9, 17000}, {40, 1500}};
  return shapes;
}

void test_sharing() {
  Backwards backwards;
  int most = 0;
  std::vector<genarm_executor> executors{{}, backwards.executor(5), backwards.executor(2), backwards.executor(1000)};
  const Pool pools[] = {Pool(1), Pool(2), Pool(3), Pool(8)};
  for (const Pool& pool : pools) executors.push_back(pool.executor());
  Random random(2);
  for (const Shape& shape : shared_shapes()) {
    for (int round = 0; round < 2; ++round) {
      const Case c = make_case(random, shape.rows, shape.vocab, round + 1);
      context = "sharing " + std::to_string(shape.rows) + " rows of " + std::to_string(shape.vocab);
      const Step drawn = step(c, {GENARM_ISA_PORTABLE});
      const Guarded<float> whole = log_softmax(c, {GENARM_ISA_PORTABLE});
      for (size_t i = 0; i < executors.size(); ++i) {
        const auto workspace = (i + static_cast<size_t>(round)) % 2 == 0 ? Workspace::kExact : Workspace::kNone;
        const How how{GENARM_ISA_AUTO, executors[i], workspace};
        backwards.most = 0;
        CHECK(step(c, how) == drawn, "executor %d", static_cast<int>(i));
        CHECK(log_softmax(c, how) == whole, "executor %d", static_cast<int>(i));
        CHECK(backwards.most <= how.executor.threads, "%d tasks for %d", backwards.most, how.executor.threads);
        most = std::max(most, backwards.most);
      }
    }
  }
  context = "sharing";
  CHECK(most > 2, "nothing was shared out");
}

void test_two_callers() {
  context = "two callers";
  Random random(3);
  std::vector<Case> cases;
  std::vector<Step> wanted;
  for (const Shape& shape : {Shape{1, 33000}, Shape{12, 3000}, Shape{3, 20000}, Shape{1, 50}}) {
    cases.push_back(make_case(random, shape.rows, shape.vocab, 2));
    wanted.push_back(step(cases.back(), {}));
  }
  const Pool one(3), another(2);
  for (const genarm_executor& executor : {one.executor(), another.executor()}) {
    std::vector<Step> got[2];
    const auto work = [&](int caller, genarm_executor own) {
      for (int i = 0; i < 24; ++i) {
        const How how{GENARM_ISA_AUTO, own, i % 3 == 0 ? Workspace::kExact : Workspace::kNone, true};
        got[caller].push_back(step(cases[static_cast<size_t>(i + caller) % cases.size()], how));
      }
    };
    std::thread other(work, 1, executor);
    work(0, one.executor());  // on the first turn both have the same pool
    other.join();
    for (int caller = 0; caller < 2; ++caller) {
      for (size_t i = 0; i < got[caller].size(); ++i) {
        CHECK(got[caller][i] == wanted[(i + static_cast<size_t>(caller)) % wanted.size()], "caller %d, call %d", caller,
              static_cast<int>(i));
      }
    }
  }
}

// Denormal numbers count although the host has told its threads to flush them, and to round all to zero; and it gets
// its mode back.
void test_float_mode() {
#if defined(__SSE2__)
  context = "floating-point mode";
  const Pool pool(3);
  Random random(4);
  for (int i = 0; i < 40; ++i) {
    Case c = make_case(random, 3, i < 20 ? 300 : 20000, 2);
    for (int64_t b = 0; b < c.rows; ++b) c.top_k.at(b) = 0, c.top_p.at(b) = 1, c.min_p.at(b) = 1e-40f;
    if (i % 4 == 0) c.temperature.at(0) = 1e-40f;
    const Step drawn = step(c, {});
    const Guarded<float> whole = log_softmax(c, {});
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0xE040);
    const Step also_drawn = step(c, {GENARM_ISA_AUTO, pool.executor(), Workspace::kExact});
    const Guarded<float> also_whole = log_softmax(c, {GENARM_ISA_AUTO, pool.executor(), Workspace::kExact});
    const unsigned after = _mm_getcsr();
    _mm_setcsr(before);
    CHECK((after & 0xE040) == 0xE040, "the host's mode has changed");
    CHECK(also_drawn == drawn && also_whole == whole, "another result");
  }
#endif
}

template <class Args>
struct Mistake {
  const char* named;  // stands in the message
  std::function<void(Args&)> make;
  genarm_result result = GENARM_INVALID_ARGUMENT;
};

template <class Args>
void check_mistakes(genarm_result (*operation)(const Args*, genarm_error*),
                    genarm_result (*workspace)(const Args*, size_t*, genarm_error*), const Args& good,
                    const std::vector<Mistake<Args>>& mistakes) {
  for (const Mistake<Args>& mistake : mistakes) {
    context = std::string("the mistake in ") + mistake.named;
    Args args = good;
    mistake.make(args);
    genarm_error error{}, query_error{};
    size_t bytes = 77;
    CHECK(operation(&args, &error) == mistake.result, "%s", error.message);
    CHECK(std::strstr(error.message, mistake.named), "the message is '%s'", error.message);
    CHECK(operation(&args, nullptr) == mistake.result, "without words");
    CHECK(workspace(&args, &bytes, &query_error) == mistake.result, "%s", query_error.message);
    CHECK(std::string(error.message) == query_error.message, "'%s'", query_error.message);
    CHECK(workspace(&args, &bytes, nullptr) == mistake.result && bytes == 77, "without words");
  }
  context = "NULL for an argument";
  genarm_error error{};
  size_t bytes;
  CHECK(operation(nullptr, nullptr) == GENARM_INVALID_ARGUMENT, "no args");
  CHECK(operation(nullptr, &error) == GENARM_INVALID_ARGUMENT && std::strstr(error.message, "args"), "%s",
        error.message);
  CHECK(workspace(nullptr, &bytes, &error) == GENARM_INVALID_ARGUMENT && std::strstr(error.message, "args"), "%s",
        error.message);
  CHECK(workspace(&good, nullptr, &error) == GENARM_INVALID_ARGUMENT && std::strstr(error.message, "bytes"), "%s",
        error.message);
  CHECK(operation(&good, nullptr) == GENARM_OK, "the arguments themselves");
  CHECK(workspace(&good, &bytes, nullptr) == GENARM_OK, "the arguments themselves");

  context = "no rows";
  Args none{};
  none.in.struct_size = sizeof none;
  none.in.vocab_size = 1;
  CHECK(operation(&none, &error) == GENARM_OK, "%s", error.message);
  CHECK(workspace(&none, &bytes, &error) == GENARM_OK && bytes == 0, "%s", error.message);
}

// What both operations refuse.
template <class Args>
std::vector<Mistake<Args>> input_mistakes() {
  std::vector<Mistake<Args>> mistakes{
      {"struct_size", [](Args& a) { a.in.struct_size = 0; }},
      {"struct_size", [](Args& a) { a.in.struct_size -= 8; }},
      {"struct_size", [](Args& a) { a.in.struct_size += 8; }},
      {"dtype", [](Args& a) { a.in.dtype = static_cast<genarm_dtype>(3); }},
      {"rows", [](Args& a) { a.in.rows = -1; }},
      {"vocab_size", [](Args& a) { a.in.vocab_size = 0; }},
      {"vocab_size", [](Args& a) { a.in.vocab_size = -5; }},
      {"arms", [](Args& a) { a.in.arms = -1; }},
      {"arms", [](Args& a) { a.in.arms = INT32_MAX; }},
      {"logits", [](Args& a) { a.in.logits = nullptr; }},
      {"vocab_size", [](Args& a) { a.in.vocab_size = int64_t{1} << 31; }},
      {"weights", [](Args& a) { a.in.weights = nullptr; }},
      {"executor.threads", [](Args& a) { a.in.executor = Backwards().executor(0); }},
      {"executor.threads", [](Args& a) { a.in.executor = Backwards().executor(-2); }},
  };
  static const genarm_logits missing[] = {{"", 0}, {"", 0}, {nullptr, 0}};
  mistakes.push_back({"logits[2]", [](Args& a) { a.in.logits = missing; }});
  for (const genarm_isa isa : kIsas) {
    if (!genarm_isa_supported(isa)) mistakes.push_back({"isa", [isa](Args& a) { a.in.isa = isa; }, GENARM_UNSUPPORTED});
  }
  return mistakes;
}

void test_mistakes() {
  Random random(5);
  const Case c = make_case(random, 2, 40, 2);

  using StepArgs = genarm_guided_step_args;
  Step out(c);
  const StepArgs good = arguments(c, {}, &out);
  auto mistakes = input_mistakes<StepArgs>();
  const std::vector<Mistake<StepArgs>> of_step{
      {"token", [](StepArgs& a) { a.token = nullptr; }},
      {"kept", [](StepArgs& a) { a.kept = nullptr; }},
      {"status", [](StepArgs& a) { a.status = nullptr; }},
      {"logprob", [](StepArgs& a) { a.logprob = nullptr; }},
      {"log_mass", [](StepArgs& a) { a.log_mass = nullptr; }},
      {"base_logprob", [](StepArgs& a) { a.base_logprob = nullptr; }},
      {"arm_logprobs", [](StepArgs& a) { a.arm_logprobs = nullptr; }},
      {"arm_logprobs", [](StepArgs& a) { a.logprob = a.log_mass = a.base_logprob = nullptr; }},
  };
  mistakes.insert(mistakes.end(), of_step.begin(), of_step.end());
  check_mistakes<StepArgs>(genarm_guided_step, genarm_guided_step_workspace, good, mistakes);

  context = "parameters that are not given";
  const float zero = 0, one = 1;
  const int64_t none = 0;
  Step given(c), left_out(c);
  StepArgs with = arguments(c, {}, &given), without = arguments(c, {}, &left_out);
  with.seed_step = without.seed_step = 0;
  with.in.base_weight = with.in.temperature = with.top_p = {&one, 0};
  with.min_p = {&zero, 0};
  with.top_k = with.seed = with.position = {&none, 0};
  without.in.base_weight = without.in.temperature = without.top_p = without.min_p = {nullptr, 0};
  without.top_k = without.seed = without.position = {nullptr, 0};
  genarm_error error;
  CHECK(genarm_guided_step(&with, &error) == GENARM_OK, "%s", error.message);
  CHECK(genarm_guided_step(&without, &error) == GENARM_OK, "%s", error.message);
  CHECK(given == left_out, "are not neutral");

  using WholeArgs = genarm_guided_log_softmax_args;
  Guarded<float> logprobs(static_cast<size_t>(c.rows * c.vocab));
  WholeArgs whole{};
  whole.in = inputs(c, {}, sizeof whole);
  whole.logprobs = logprobs.data();
  whole.logprobs_row_stride = c.vocab;
  auto of_whole = input_mistakes<WholeArgs>();
  of_whole.push_back({"logprobs", [](WholeArgs& a) { a.logprobs = nullptr; }});
  check_mistakes<WholeArgs>(genarm_guided_log_softmax, genarm_guided_log_softmax_workspace, whole, of_whole);

  context = "mistakes with a pool";
  error = {};
  genarm_thread_pool* pool = nullptr;
  CHECK(genarm_thread_pool_create(1, nullptr, &error) == GENARM_INVALID_ARGUMENT, "no pool");
  CHECK(std::strstr(error.message, "pool"), "%s", error.message);
  for (const int threads : {0, -3}) {
    CHECK(genarm_thread_pool_create(threads, &pool, &error) == GENARM_INVALID_ARGUMENT && !pool, "%d", threads);
    CHECK(std::strstr(error.message, "threads"), "%s", error.message);
    CHECK(genarm_thread_pool_create(threads, &pool, nullptr) == GENARM_INVALID_ARGUMENT, "%d", threads);
  }
  genarm_thread_pool_destroy(nullptr);
}

int64_t number(const char* text) {
  char* end;
  const long long value = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || value < 0) {
    std::fprintf(stderr, "usage: core_test [cases [first]]; got '%s'\n", text);
    std::exit(2);
  }
  return value;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? number(argv[1]) : 4000, first = argc > 2 ? number(argv[2]) : 0;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was said stays when a later test crashes
  test_constants();
  test_random_numbers();
  test_mistakes();
  test_random_cases(cases, first);
  test_sharing();
  test_two_callers();
  test_float_mode();
  std::printf(
      "isa %s; %lld rows, %lld drawn: %lld tokens and %lld kept counts moved by rounding, largest error %.2f of "
      "what is allowed; %d failures\n",
      genarm_isa_name(GENARM_ISA_AUTO), static_cast<long long>(statistics.rows),
      static_cast<long long>(statistics.drawn), static_cast<long long>(statistics.other_tokens),
      static_cast<long long>(statistics.other_kept), statistics.largest_error, failures.load());
  return failures == 0 ? 0 : 1;
}
