// A decoding step of a Llama-like model over static KV caches: what it is made of, and the kernels that it calls.
#ifndef GENARM_CPU_DECODER_H_
#define GENARM_CPU_DECODER_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "genarm_kernels.h"

namespace genarm {

enum class WeightType { kFloat32 = GENARM_FLOAT32, kBFloat16 = GENARM_BFLOAT16, kFloat16 = GENARM_FLOAT16, kInt8 };

// What the LoRA adapter of one operand adds to a linear layer: up (down x).
struct Part {
  int64_t operand;    // row m belongs to operand m % operands; 1 and up
  const float* down;  // [rank, in]
  const float* up;    // [rank, out]
  int64_t rank;
};

// A linear layer as the model keeps it: nothing is copied.
struct Linear {
  WeightType type;
  const void* weight;   // [out, in]
  const float* scales;  // [out] of int8, otherwise NULL
  const float* bias;    // [out], or NULL
  int64_t in, out;
  std::vector<Part> parts;

  int64_t rank() const {
    int64_t sum = 0;
    for (const Part& part : parts) sum += part.rank;
    return sum;
  }
};

// Rows of numbers on their way into linear layers of one width: T `tokens` of each row of the model's.
struct Activations {
  int64_t rows, tokens;
  int64_t first, operands;  // row m is of operand (first + m / T) % operands
  const float* x;           // as they are
  int64_t x_stride;
  const float* arranged;  // as `arrange` leaves them
  int64_t arranged_stride;
  const float* inner;  // [rows, inner_stride]: down x of the layer's parts, one after the other
  int64_t inner_stride;

  int64_t operand(int64_t row) const { return (first + row / tokens) % operands; }
};

struct Norm {
  const float* weight;  // NULL: there is none
  float epsilon;
};

struct DecoderLayer {
  Norm attention_norm, q_norm, k_norm, mlp_norm;
  Linear q, k, v, o, gate, up, down;
  void* keys;    // [cache rows, length, kv_heads, head_size]
  void* values;  // likewise
  int64_t window;
};

enum class Activation { kSilu, kGeluTanh };

struct Decoder {
  int64_t operands, hidden, heads, kv_heads, head_size, vocab, embeddings;
  int64_t length;       // of a row of the caches, and of cos and sin
  genarm_dtype caches;  // their type
  WeightType embedding_type;
  const void* embedding;  // [V, hidden]
  float attention_scale;
  Activation activation;
  const float *cos, *sin;  // [length, head_size]
  std::vector<DecoderLayer> layers;
  Norm norm;
  Linear head;
};

// Some of a query's heads over positions [first, last) of a row.
struct Attention {
  genarm_dtype dtype;
  const void *keys, *values;  // of position 0
  int64_t stride, size;       // from a position to the next; of a head
  int64_t first, last;
  int64_t kv_heads, group;  // heads of keys; of queries to each
  float* heads;             // [kv_heads * group, size]: queries in units of log2, then the result
  float* scores;            // [kv_heads * group, last - first]
};

// Entry points of one instruction set.
struct LayerKernels {
  int64_t step;  // rows of `arranged` are padded with zeros to a multiple of this
  void (*arrange)(WeightType type, const float* x, int64_t n, float* arranged);
  // y = W x + bias + up inner for outputs [first, last), added to y or in its place.
  void (*multiply)(const Linear& layer, int64_t first, int64_t last, const Activations& x, float* y, int64_t y_stride,
                   bool add);
  void (*project)(const Part& part, int64_t in, const float* x, float* inner);
  void (*rms_norm)(const float* x, const Norm& norm, int64_t n, float* y);
  // The halves of a head turned against each other, times `scale`.
  void (*rotate)(float* head, const float* cos, const float* sin, int64_t size, float scale);
  void (*attend)(const Attention& attention);
  // x = activation(x) * up
  void (*gate)(Activation activation, float* x, const float* up, int64_t n);
  void (*widen)(WeightType type, const void* x, int64_t n, float* out);
  void (*narrow)(genarm_dtype dtype, const float* x, int64_t n, void* out);
};

// A linear layer alone: rows of x to rows of y, both contiguous and of one type.
void run_linear(const Linear& layer, const LayerKernels& kernels, const genarm_executor& executor, genarm_dtype dtype,
                const void* x, int64_t rows, int64_t tokens, int64_t operands, void* y);

// Runs steps; keeps the memory between them. One call at a time.
class DecoderStep {
 public:
  DecoderStep(Decoder decoder, const LayerKernels& kernels);
  ~DecoderStep();
  // Feeds tokens [rows, count] to rows first, first + 1, ... of the caches, each behind the lengths [rows] tokens that
  // it has; logits [rows, count, V], or with `last` [rows, V] after the last tokens alone.
  void run(const genarm_executor& executor, const int64_t* tokens, const int64_t* lengths, int64_t first, int64_t rows,
           int64_t count, bool last, float* logits);

 private:
  class Run;
  std::unique_ptr<Run> run_;
};

}  // namespace genarm

#endif  // GENARM_CPU_DECODER_H_
