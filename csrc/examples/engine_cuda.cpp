// The engine of engine.cpp on an NVIDIA GPU: the same options, the same tokens. Logits, tokens and status stay there.
#include <cuda_runtime_api.h>

#include <vector>

#include "genarm_kernels_cuda.h"
#include "toy.h"

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) fail(1, "CUDA", cudaGetErrorString(error));
}

// An array on the device.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(size_t count) { check(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T))); }
  ~OnDevice() { cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

// The table where an engine has its model: the logits of a sequence are a row of it.
class Model {
 public:
  Model(uint32_t number, int64_t vocab) : row_(static_cast<size_t>(vocab)), table_(row_ * row_) {
    const Bigram bigram(number, vocab);
    check(cudaMemcpy(table_.data(), bigram.table().data(), row_ * row_ * sizeof(float), cudaMemcpyHostToDevice));
  }
  void forward(const std::vector<int64_t>& last, float* logits, cudaStream_t stream) const {  // logits [B, V]
    for (size_t b = 0; b < last.size(); ++b) {
      const float* from = table_.data() + static_cast<size_t>(last[b]) * row_;
      check(cudaMemcpyAsync(logits + b * row_, from, row_ * sizeof(float), cudaMemcpyDeviceToDevice, stream));
    }
  }

 private:
  size_t row_;
  OnDevice<float> table_;
};

}  // namespace

int main(int argc, char** argv) {
  const Options o = parse(argc, argv);
  genarm_error error;
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));

  const Model base(0, o.vocab), arm(1, o.vocab);
  const auto batch = static_cast<size_t>(o.sequences), vocab = static_cast<size_t>(o.vocab);
  const OnDevice<float> base_logits(batch * vocab), arm_logits(batch * vocab);
  const genarm_logits logits[] = {{base_logits.data(), o.vocab}, {arm_logits.data(), o.vocab}};
  const OnDevice<int64_t> token(batch);
  const OnDevice<int32_t> kept(batch), status(batch);
  std::vector<int64_t> last(batch, 0);  // every sequence begins after token 0
  std::vector<int32_t> failed(batch);
  std::vector<std::vector<int64_t>> sequences(batch);
  int64_t position = 0;

  genarm_guided_step_args args{};  // zero first: what is not named below is off or neutral
  args.in.struct_size = sizeof args;
  args.in.dtype = GENARM_FLOAT32;
  args.in.rows = o.sequences;
  args.in.vocab_size = o.vocab;
  args.in.arms = 1;
  args.in.logits = logits;
  args.in.weights = &o.weight;  // its row stride is 0: numbers of the host, like every parameter of stride 0
  args.in.temperature = {&o.temperature, 0};
  args.top_k = {&o.top_k, 0};
  args.top_p = {&o.top_p, 0};
  args.min_p = {&o.min_p, 0};
  args.seed = {&o.seed, 0};
  args.seed_step = GENARM_SEED_STEP;
  args.position = {&position, 0};  // a captured graph takes device memory here, one position a row
  args.token = token.data();
  args.kept = kept.data();
  args.status = status.data();

  size_t bytes = 0;  // none on GPUs with clusters
  if (genarm_cuda_guided_step_workspace(&args, &bytes, &error)) fail(1, "workspace", error.message);
  const OnDevice<unsigned char> workspace(bytes + 1);
  args.in.workspace = workspace.data();
  args.in.workspace_size = bytes;

  for (; position < o.tokens; ++position) {
    base.forward(last, base_logits.data(), stream);
    arm.forward(last, arm_logits.data(), stream);
    if (genarm_cuda_guided_step(&args, stream, &error)) fail(1, "guided_step", error.message);
    check(cudaMemcpyAsync(last.data(), token.data(), batch * sizeof(int64_t), cudaMemcpyDeviceToHost, stream));
    check(cudaMemcpyAsync(failed.data(), status.data(), batch * sizeof(int32_t), cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    for (size_t b = 0; b < batch; ++b) {
      if (failed[b] != GENARM_DRAWN) fail(1, "guided_step", "a row's logits are not finite: is --weight too large?");
      sequences[b].push_back(last[b]);
    }
  }
  check(cudaStreamDestroy(stream));
  print(sequences);
  return 0;
}
