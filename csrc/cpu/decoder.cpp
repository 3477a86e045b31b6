// A decoding step as phases: which kernel works on what. Between two of them lies nothing but what their rows need, so
// that a step costs its weights, once, and some microseconds a layer.
#include "cpu/decoder.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/phases.h"
#include "cpu/row.h"

namespace genarm {
namespace {

constexpr int64_t kPadding = 32;  // what a row of activations is padded to: a multiple of every instruction set's step
// Of the weights, what a thread takes at a time: so much that its cost is nothing, so little that no thread waits long.
constexpr int64_t kLeastChunk = 1 << 14, kMostChunk = 1 << 17;

int64_t padded(int64_t n) { return (n + kPadding - 1) / kPadding * kPadding; }
int64_t quotient_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t size_of(WeightType type) { return type == WeightType::kFloat32 ? 4 : type == WeightType::kInt8 ? 1 : 2; }
int64_t size_of(genarm_dtype dtype) { return dtype == GENARM_FLOAT32 ? 4 : 2; }

// Numbers from the beginning of a cache line on, where no vector of x lies in two.
class Buffer {
 public:
  void grow(int64_t count) {
    if (numbers_.size() < static_cast<size_t>(count) + kLine) numbers_.resize(static_cast<size_t>(count) + kLine);
  }
  float* data() { return aligned(numbers_.data()); }
  const float* data() const { return aligned(const_cast<float*>(numbers_.data())); }

 private:
  static constexpr size_t kLine = 64 / sizeof(float);
  static float* aligned(float* x) { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(x) + 63) / 64 * 64); }
  std::vector<float> numbers_;
};

// Linear layers of the same rows, cut into chunks of outputs, one layer's after the other's.
struct Group {
  std::vector<const Linear*> layers;
  int64_t inner = 0;  // ranks of all their parts

  explicit Group(std::initializer_list<const Linear*> all) : layers(all) {
    for (const Linear* layer : layers) inner += layer->rank();
  }

  static int64_t chunk_of(const Linear& layer) {
    const int64_t row = layer.in * size_of(layer.type), all = row * layer.out;
    const int64_t bytes = std::min(kMostChunk, std::max(kLeastChunk, all / 32));
    return std::max<int64_t>(kPadding, bytes / row / kPadding * kPadding);
  }
  static int chunks_of(const Linear& layer) { return static_cast<int>(quotient_up(layer.out, chunk_of(layer))); }
  int chunks() const {
    int sum = 0;
    for (const Linear* layer : layers) sum += chunks_of(*layer);
    return sum;
  }
  // Which layer a chunk is of, and its outputs [first, last). Also where the layer's parts begin in `inner`, and its
  // outputs in a row of them all.
  struct Chunk {
    const Linear* layer;
    int64_t first, last, inner, out;
  };
  Chunk at(int chunk) const {
    Chunk found{};
    for (const Linear* layer : layers) {
      const int own = chunks_of(*layer);
      if (chunk < own) {
        found.layer = layer;
        found.first = chunk * chunk_of(*layer);
        found.last = std::min(layer->out, found.first + chunk_of(*layer));
        return found;
      }
      chunk -= own;
      found.inner += layer->rank();
      found.out += layer->out;
    }
    return found;
  }

  // down x, for every row and layer: chunk r * layers + i.
  int project_chunks(int64_t rows) const {
    return inner ? static_cast<int>(rows) * static_cast<int>(layers.size()) : 0;
  }
  void project(const LayerKernels& kernels, const Activations& x, int chunk, float* to) const {
    const int64_t count = static_cast<int64_t>(layers.size()), row = chunk / count;
    const Linear& layer = *layers[static_cast<size_t>(chunk % count)];
    to += row * x.inner_stride;
    for (int64_t i = 0; i < chunk % count; ++i) to += layers[static_cast<size_t>(i)]->rank();
    for (const Part& part : layer.parts) {
      if (x.operand(row) == part.operand) kernels.project(part, layer.in, x.x + row * x.x_stride, to);
      to += part.rank;
    }
  }
};

}  // namespace

void run_linear(const Linear& layer, const LayerKernels& kernels, const genarm_executor& executor, genarm_dtype dtype,
                const void* x, int64_t rows, int64_t tokens, int64_t operands, void* y) {
  const Group group{&layer};
  const int64_t width = padded(layer.in);
  Buffer plain, arranged, inner;
  plain.grow(rows * layer.in);
  arranged.grow(rows * width);
  inner.grow(rows * group.inner);
  const Activations in{rows,     tokens,          0,     operands,     plain.data(),
                       layer.in, arranged.data(), width, inner.data(), group.inner};
  const WeightType type = static_cast<WeightType>(dtype);
  Phases phases;
  phases.run(executor, {static_cast<int>(rows), group.project_chunks(rows), group.chunks()}, [&](int phase, int chunk) {
    if (phase == 0) {
      float* const row = plain.data() + chunk * layer.in;
      kernels.widen(type, static_cast<const char*>(x) + chunk * layer.in * size_of(dtype), layer.in, row);
      kernels.arrange(layer.type, row, layer.in, arranged.data() + chunk * width);
    } else if (phase == 1) {
      group.project(kernels, in, chunk, inner.data());
    } else {
      const Group::Chunk part = group.at(chunk);
      const int64_t count = part.last - part.first;
      thread_local std::vector<float> out;
      out.resize(static_cast<size_t>(rows * count));
      kernels.multiply(layer, part.first, part.last, in, out.data() - part.first, count, false);
      for (int64_t r = 0; r < rows; ++r) {
        char* const to = static_cast<char*>(y) + (r * layer.out + part.first) * size_of(dtype);
        kernels.narrow(dtype, out.data() + r * count, count, to);
      }
    }
  });
}

class DecoderStep::Run {
 public:
  Run(Decoder decoder, const LayerKernels& kernels) : model_(std::move(decoder)), kernels_(kernels) {
    head_ = std::make_unique<Group>(Group{&model_.head});
    int64_t inner = head_->inner;
    for (const DecoderLayer& layer : model_.layers) {
      groups_.push_back(
          {Group{&layer.q, &layer.k, &layer.v}, Group{&layer.o}, Group{&layer.gate, &layer.up}, Group{&layer.down}});
      for (const Group* group : {&groups_.back().qkv, &groups_.back().o, &groups_.back().gate_up, &groups_.back().down})
        inner = std::max(inner, group->inner);
      intermediate_ = std::max(intermediate_, layer.gate.out);
    }
    inner_stride_ = inner;
    heads_stride_ = (model_.heads + 2 * model_.kv_heads) * model_.head_size;
    widest_ = padded(std::max({model_.hidden, model_.heads * model_.head_size, intermediate_}));
  }

  void run(const genarm_executor& executor, const int64_t* tokens, const int64_t* lengths, int64_t first, int64_t rows,
           int64_t count, bool last, float* logits) {
    tokens_ = tokens;
    lengths_ = lengths;
    first_ = first;
    logits_ = logits;
    const int64_t threads = executor.run ? executor.threads : 1;
    for (int64_t i = 0; i < rows; ++i) {
      if (lengths[i] < 0 || lengths[i] + count > model_.length) throw std::invalid_argument("a row outgrows its cache");
    }
    for (int64_t i = 0; i < rows * count; ++i) {
      if (tokens[i] < 0 || tokens[i] >= model_.embeddings) throw std::invalid_argument("a token is out of range");
    }
    if (rows != rows_ || count != count_ || last != last_ || threads != threads_) plan(rows, count, last, threads);
    phases_.run(executor, chunks_, [this](int phase, int chunk) { work(steps_[static_cast<size_t>(phase)], chunk); });
  }

 private:
  enum class Kind {
    kEmbed,
    kAttentionNorm,
    kProjectQkv,
    kQkv,
    kAttend,
    kArrange,
    kProjectO,
    kO,
    kMlpNorm,
    kProjectGateUp,
    kGateUp,
    kProjectDown,
    kDown,
    kLastNorm,
    kProjectHead,
    kHead,
  };
  struct Step {
    Kind kind;
    size_t layer;
  };
  struct LayerGroups {
    Group qkv, o, gate_up, down;
  };

  void plan(int64_t rows, int64_t count, bool last, int64_t threads) {
    threads_ = 0;  // until all is made: memory may run out, and the next call is to plan anew
    rows_ = rows;
    count_ = count;
    last_ = last;
    all_ = rows * count;
    // Two parts of a row for each thread, or fewer where there are more rows: what is read in one go is longer.
    head_blocks_ = std::min(model_.kv_heads, quotient_up(2 * threads, rows));
    states_.grow(all_ * model_.hidden);
    normed_.grow(all_ * model_.hidden);
    arranged_.grow(all_ * widest_);
    arranged_gated_.grow(all_ * widest_);
    heads_.grow(all_ * heads_stride_);
    gate_.grow(all_ * intermediate_);
    inner_.grow(all_ * inner_stride_);
    steps_.clear();
    chunks_.clear();
    const int each = static_cast<int>(all_);
    add(Kind::kEmbed, 0, each);
    for (size_t i = 0; i < groups_.size(); ++i) {
      const LayerGroups& layer = groups_[i];
      add(Kind::kAttentionNorm, i, each);
      add(Kind::kProjectQkv, i, layer.qkv.project_chunks(all_));
      add(Kind::kQkv, i, layer.qkv.chunks());
      add(Kind::kAttend, i, static_cast<int>(rows * head_blocks_));
      if (!arranges_heads()) add(Kind::kArrange, i, each);
      add(Kind::kProjectO, i, layer.o.project_chunks(all_));
      add(Kind::kO, i, layer.o.chunks());
      add(Kind::kMlpNorm, i, each);
      add(Kind::kProjectGateUp, i, layer.gate_up.project_chunks(all_));
      add(Kind::kGateUp, i, Group::chunks_of(model_.layers[i].gate));
      add(Kind::kProjectDown, i, layer.down.project_chunks(all_));
      add(Kind::kDown, i, layer.down.chunks());
    }
    const int64_t wanted = last ? rows : all_;
    add(Kind::kLastNorm, 0, static_cast<int>(wanted));
    add(Kind::kProjectHead, 0, head_->project_chunks(wanted));
    add(Kind::kHead, 0, head_->chunks());
    threads_ = threads;
  }

  void add(Kind kind, size_t layer, int chunks) {
    if (chunks == 0) return;
    steps_.push_back({kind, layer});
    chunks_.push_back(chunks);
  }

  void work(const Step& step, int chunk) {
    const size_t i = step.layer;
    switch (step.kind) {
      case Kind::kEmbed:
        return embed(chunk);
      case Kind::kAttentionNorm:
        return normalise(chunk, chunk, model_.layers[i].attention_norm, model_.layers[i].q.type);
      case Kind::kProjectQkv:
        return groups_[i].qkv.project(kernels_, normed(), chunk, inner_.data());
      case Kind::kQkv:
        return multiply(groups_[i].qkv, chunk, normed(), heads_.data(), heads_stride_, false);
      case Kind::kAttend:
        return attend(model_.layers[i], chunk);
      case Kind::kArrange:
        return kernels_.arrange(model_.layers[i].o.type, heads_.data() + chunk * heads_stride_,
                                model_.heads * model_.head_size, arranged_.data() + chunk * widest_);
      case Kind::kProjectO:
        return groups_[i].o.project(kernels_, attended(), chunk, inner_.data());
      case Kind::kO:
        return multiply(groups_[i].o, chunk, attended(), states_.data(), model_.hidden, true);
      case Kind::kMlpNorm:
        return normalise(chunk, chunk, model_.layers[i].mlp_norm, model_.layers[i].gate.type);
      case Kind::kProjectGateUp:
        return groups_[i].gate_up.project(kernels_, normed(), chunk, inner_.data());
      case Kind::kGateUp:
        return gate_up(model_.layers[i], chunk);
      case Kind::kProjectDown:
        return groups_[i].down.project(kernels_, gated(), chunk, inner_.data());
      case Kind::kDown:
        return multiply(groups_[i].down, chunk, gated(), states_.data(), model_.hidden, true);
      case Kind::kLastNorm:
        return normalise(last_ ? (chunk + 1) * count_ - 1 : chunk, chunk, model_.norm, model_.head.type);
      case Kind::kProjectHead:
        return head_->project(kernels_, ended(), chunk, inner_.data());
      case Kind::kHead:
        return multiply(*head_, chunk, ended(), logits_, model_.vocab, false);
    }
  }

  // What linear layers read. `arranged_` holds one after the other; what a chunk of `gate_up` makes, while others still
  // read there, has a place of its own.
  Activations reading(const Buffer& x, int64_t stride, const Buffer& arranged) const {
    return {all_,   count_,          first_,  model_.operands, x.data(),
            stride, arranged.data(), widest_, inner_.data(),   inner_stride_};
  }
  Activations normed() const { return reading(normed_, model_.hidden, arranged_); }
  Activations ended() const {
    Activations x = normed();
    if (last_) x.rows = rows_, x.tokens = 1;
    return x;
  }
  Activations attended() const { return reading(heads_, heads_stride_, arranged_); }
  Activations gated() const { return reading(gate_, intermediate_, arranged_gated_); }

  void embed(int64_t row) {
    const int64_t token = tokens_[row];
    const char* const from = static_cast<const char*>(model_.embedding);
    kernels_.widen(model_.embedding_type, from + token * model_.hidden * size_of(model_.embedding_type), model_.hidden,
                   states_.data() + row * model_.hidden);
  }

  void normalise(int64_t from, int64_t row, const Norm& norm, WeightType type) {
    float* const x = normed_.data() + row * model_.hidden;
    kernels_.rms_norm(states_.data() + from * model_.hidden, norm, model_.hidden, x);
    kernels_.arrange(type, x, model_.hidden, arranged_.data() + row * widest_);
  }

  void multiply(const Group& group, int chunk, Activations x, float* y, int64_t y_stride, bool add) {
    const Group::Chunk part = group.at(chunk);
    x.inner += part.inner;
    kernels_.multiply(*part.layer, part.first, part.last, x, y + part.out, y_stride, add);
  }

  // Whether a key head's queries can be arranged without those of the next.
  bool arranges_heads() const { return model_.heads / model_.kv_heads * model_.head_size % kPadding == 0; }

  // Heads of one row, token after token: each writes its key and value, then looks at all before it.
  void attend(const DecoderLayer& layer, int chunk) {
    const int64_t size = model_.head_size, row = chunk / head_blocks_, block = chunk % head_blocks_;
    const int64_t first_kv = block * model_.kv_heads / head_blocks_,
                  last_kv = (block + 1) * model_.kv_heads / head_blocks_, kv_heads = last_kv - first_kv;
    const int64_t group = model_.heads / model_.kv_heads, stride = model_.kv_heads * size;
    const int64_t bytes = size_of(model_.caches),
                  start = ((first_ + row) * model_.length * stride + first_kv * size) * bytes;
    char *const keys = static_cast<char*>(layer.keys) + start, *const values = static_cast<char*>(layer.values) + start;
    thread_local std::vector<float> scores;
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t at = row * count_ + t, place = lengths_[row] + t;
      const float *const cos = model_.cos + place * size, *const sin = model_.sin + place * size;
      float* const heads = heads_.data() + at * heads_stride_;
      float* const key = heads + (model_.heads + first_kv) * size;
      for (int64_t i = 0; i < kv_heads; ++i) turn(key + i * size, layer.k_norm, cos, sin, 1);
      kernels_.narrow(model_.caches, key, kv_heads * size, keys + place * stride * bytes);
      kernels_.narrow(model_.caches, key + stride, kv_heads * size, values + place * stride * bytes);
      float* const queries = heads + first_kv * group * size;
      for (int64_t i = 0; i < kv_heads * group; ++i) {
        turn(queries + i * size, layer.q_norm, cos, sin, model_.attention_scale * kLog2E);
      }
      const int64_t first = std::max<int64_t>(0, place + 1 - layer.window);
      scores.resize(static_cast<size_t>(kv_heads * group * (place + 1 - first)));
      kernels_.attend(
          {model_.caches, keys, values, stride, size, first, place + 1, kv_heads, group, queries, scores.data()});
      if (arranges_heads()) {
        kernels_.arrange(layer.o.type, queries, kv_heads * group * size,
                         arranged_.data() + at * widest_ + first_kv * group * size);
      }
    }
  }
  void turn(float* head, const Norm& norm, const float* cos, const float* sin, float scale) {
    if (norm.weight) kernels_.rms_norm(head, norm, model_.head_size, head);
    kernels_.rotate(head, cos, sin, model_.head_size, scale);
  }

  // Outputs of gate and up side by side, so that their product is made where they are at hand.
  void gate_up(const DecoderLayer& layer, int chunk) {
    const Activations x = normed();
    Activations of_up = x;
    of_up.inner += layer.gate.rank();
    const int64_t each = Group::chunk_of(layer.gate), first = chunk * each,
                  last = std::min(layer.gate.out, first + each), count = last - first;
    thread_local std::vector<float> up;
    up.resize(static_cast<size_t>(all_ * count));
    kernels_.multiply(layer.gate, first, last, x, gate_.data(), intermediate_, false);
    kernels_.multiply(layer.up, first, last, of_up, up.data() - first, count, false);
    for (int64_t r = 0; r < all_; ++r) {
      float* const out = gate_.data() + r * intermediate_ + first;
      kernels_.gate(model_.activation, out, up.data() + r * count, count);
      kernels_.arrange(layer.down.type, out, count, arranged_gated_.data() + r * widest_ + first);
    }
  }

  const Decoder model_;
  const LayerKernels& kernels_;
  std::vector<LayerGroups> groups_;
  std::unique_ptr<Group> head_;
  int64_t intermediate_ = 0, inner_stride_ = 0, heads_stride_ = 0, widest_ = 0;
  int64_t first_ = 0, rows_ = 0, count_ = 0, all_ = 0, threads_ = 0, head_blocks_ = 1;
  Buffer states_, normed_, arranged_, arranged_gated_, heads_, gate_, inner_;
  std::vector<Step> steps_;
  std::vector<int> chunks_;
  Phases phases_;
  bool last_ = false;
  const int64_t* tokens_ = nullptr;
  const int64_t* lengths_ = nullptr;
  float* logits_ = nullptr;
};

DecoderStep::DecoderStep(Decoder decoder, const LayerKernels& kernels)
    : run_(std::make_unique<Run>(std::move(decoder), kernels)) {}
DecoderStep::~DecoderStep() = default;

void DecoderStep::run(const genarm_executor& executor, const int64_t* tokens, const int64_t* lengths, int64_t first,
                      int64_t rows, int64_t count, bool last, float* logits) {
  run_->run(executor, tokens, lengths, first, rows, count, last, logits);
}

}  // namespace genarm
