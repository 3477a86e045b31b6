// The operations of the C interface on a GPU: arguments checked, the launch planned, kernels put on the stream.
#include <mutex>
#include <vector>

#include "common/check.h"
#include "cuda/plan.h"
#include "cuda/python.h"
#include "genarm_kernels_cuda.h"

namespace genarm {

int forced_cluster = -1;

namespace {

static_assert(kMostOperands == 1 + GENARM_CUDA_MOST_ARMS, "the header says another number");
static_assert(sizeof(Arguments) <= 4096, "more than a kernel's parameters may be");

// Runs use(element) with the type of the logits.
template <class Use>
CudaError with_type(genarm_dtype dtype, Use use) {
  if (dtype == GENARM_FLOAT32) return use(float{});
  if (dtype == GENARM_BFLOAT16) return use(BFloat16{});
  return use(Float16{});
}

// The current device, whose kernels the first call on it makes ready.
CudaError ready_device(Device* device) {
  static std::mutex mutex;
  static std::vector<Device> known;
  if (const CudaError error = current_device(device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<size_t>(device->index) >= known.size()) known.resize(static_cast<size_t>(device->index) + 1);
  Device& here = known[static_cast<size_t>(device->index)];
  if (here.multiprocessors == 0) {
    if (const CudaError e = leave_clusters_where_not_compiled(cluster_step<float>, device)) return e;
    bool of_16 = device->largest_cluster > 0;
    for (genarm_dtype dtype : {GENARM_FLOAT32, GENARM_BFLOAT16, GENARM_FLOAT16}) {
      const CudaError error = with_type(dtype, [&](auto element) -> CudaError {
        using T = decltype(element);
        if (device->largest_cluster > 0) {
          for (auto kernel : {cluster_step<T>, cluster_filtered_step<T>, cluster_whole<T>}) {
            if (const CudaError e = prepare(kernel, *device)) return e;
            bool allowed = false;
            if (const CudaError e = allow_clusters_of_16(kernel, *device, &allowed)) return e;
            of_16 = of_16 && allowed;
          }
        }
        if (const CudaError e = prepare(tile_pass<T>, *device)) return e;
        if (const CudaError e = prepare(row_pass<T>, *device)) return e;
        return prepare(whole_pass<T>, *device);
      });
      if (error) return error;
    }
    here = *device;
    if (of_16) here.largest_cluster = 16;
  }
  *device = here;
  return {};
}

Parameter<float> parameter(genarm_floats p, float neutral) {
  const bool number = !p.data || p.stride == 0;
  return {number ? nullptr : p.data, p.stride, number ? value(p, 0, neutral) : 0};
}

Parameter<int64_t> parameter(genarm_ints p) {
  const bool number = !p.data || p.stride == 0;
  return {number ? nullptr : p.data, p.stride, number ? value(p, 0) : 0};
}

Arguments arguments_of(const genarm_inputs& in) {
  Arguments a{};
  a.row_count = in.rows;
  a.vocab = static_cast<int>(in.vocab_size);
  a.tiles = static_cast<int>((in.vocab_size + kTile - 1) / kTile);
  a.operands = static_cast<int>(in.arms) + 1;
  for (int i = 0; i < a.operands && in.rows > 0; ++i) {
    a.operand[i] = {in.logits[i].data, in.logits[i].row_stride, 0};
    if (i > 0 && in.weights_row_stride == 0) a.operand[i].weight = in.weights[(i - 1) * in.weights_arm_stride];
  }
  if (in.weights_row_stride != 0) a.weights = in.weights;
  a.weights_row_stride = in.weights_row_stride;
  a.weights_arm_stride = in.weights_arm_stride;
  a.base_weight = parameter(in.base_weight, 1);
  a.temperature = parameter(in.temperature, 1);
  a.top_p.number = 1;
  a.mask = in.token_mask;
  a.mask_row_stride = in.token_mask_row_stride;
  a.mask_word_stride = in.token_mask_word_stride == 0 ? 1 : in.token_mask_word_stride;
  a.workspace = static_cast<char*>(in.workspace);
  return a;
}

Arguments arguments_of(const genarm_guided_step_args& args) {
  Arguments a = arguments_of(args.in);
  a.logprobs = args.logprob != nullptr;
  a.top_k = parameter(args.top_k);
  a.top_p = parameter(args.top_p, 1);
  a.min_p = parameter(args.min_p, 0);
  const bool numbers = !a.top_k.rows && !a.top_p.rows && !a.min_p.rows;
  a.filtered = !numbers || filtered(args, 0);
  a.seed = parameter(args.seed);
  a.seed_step = args.seed_step;
  a.position = parameter(args.position);
  a.token = args.token;
  a.logprob = args.logprob;
  a.log_mass = args.log_mass;
  a.kept = args.kept;
  a.base_logprob = args.base_logprob;
  a.arm_logprobs = args.arm_logprobs;
  a.status = args.status;
  return a;
}

Arguments arguments_of(const genarm_guided_log_softmax_args& args) {
  Arguments a = arguments_of(args.in);
  a.whole = args.logprobs;
  a.whole_stride = args.logprobs_row_stride;
  return a;
}

// What a call does before its launches.
template <class Args>
genarm_result prepare_call(const Args* args, Device* device, Arguments* a, Plan* how, size_t* bytes,
                           genarm_error* error) {
  if (!args || !bytes) return fail(error, GENARM_INVALID_ARGUMENT, "args and bytes: expected pointers, got NULL");
  const genarm_result result = check(*args, error);
  if (result != GENARM_OK) return result;
  *bytes = 0;
  if (args->in.rows == 0) return GENARM_OK;
  if (args->in.arms > GENARM_CUDA_MOST_ARMS) {
    return fail(error, GENARM_UNSUPPORTED, "arms: expected at most %d on a GPU, got %lld", GENARM_CUDA_MOST_ARMS,
                static_cast<long long>(args->in.arms));
  }
  if (const CudaError e = ready_device(device)) return fail(error, GENARM_CUDA_ERROR, "CUDA: %s", words(e));
  *a = arguments_of(*args);
  *how = plan(*device, *a, a->filtered || a->whole, forced_cluster);
  a->board_bytes = how->board_bytes;
  *bytes = static_cast<size_t>(a->row_count * how->board_bytes);
  const int64_t blocks = how->cluster ? how->cluster : (a->tiles + kWarps - 1) / kWarps;
  if (a->row_count > INT32_MAX / blocks) {
    return fail(error, GENARM_UNSUPPORTED, "rows: expected at most %lld of this vocabulary on a GPU, got %lld",
                static_cast<long long>(INT32_MAX / blocks), static_cast<long long>(a->row_count));
  }
  return GENARM_OK;
}

template <class Args>
genarm_result workspace(const Args* args, size_t* bytes, genarm_error* error) {
  Device device;
  Arguments a;
  Plan how;
  return prepare_call(args, &device, &a, &how, bytes, error);
}

template <class Args>
genarm_result run(const Args* args, void* stream, genarm_error* error) {
  Device device;
  Arguments a;
  Plan how;
  size_t bytes = 0;
  const genarm_result result = prepare_call(args, &device, &a, &how, &bytes, error);
  if (result != GENARM_OK || args->in.rows == 0) return result;
  if (args->in.workspace_size < bytes || (bytes > 0 && !args->in.workspace)) {
    return fail(error, GENARM_INVALID_ARGUMENT, "workspace_size: expected at least %zu bytes of device memory, got %zu",
                bytes, args->in.workspace ? args->in.workspace_size : 0);
  }
  if (bytes > 0 && reinterpret_cast<uintptr_t>(args->in.workspace) % 16 != 0) {
    return fail(error, GENARM_INVALID_ARGUMENT, "workspace: expected an address that is a multiple of 16");
  }
  const bool whole = a.whole != nullptr;
  const CudaError e = with_type(args->in.dtype, [&](auto element) -> CudaError {
    using T = decltype(element);
    if (how.cluster > 0) {
      a.blocks = how.cluster;
      a.tiles_per_block = how.tiles_per_block;
      const Grid grid{a.row_count * a.blocks, a.blocks, how.shared_bytes};
      return launch(whole        ? cluster_whole<T>
                    : a.filtered ? cluster_filtered_step<T>
                                 : cluster_step<T>,
                    grid, stream, a);
    }
    a.blocks = (a.tiles + kWarps - 1) / kWarps;
    a.tiles_per_block = kWarps;
    const Grid tiles{a.row_count * a.blocks, 0, 0};
    if (const CudaError first = launch(tile_pass<T>, tiles, stream, a)) return first;
    constexpr int64_t kShared = sizeof(Shared);
    if (whole) return launch(whole_pass<T>, {a.row_count * a.blocks, 0, kShared}, stream, a);
    a.blocks = 1;
    a.tiles_per_block = a.tiles;
    return launch(row_pass<T>, {a.row_count, 0, kShared}, stream, a);
  });
  return e ? fail(error, GENARM_CUDA_ERROR, "CUDA: %s", words(e)) : GENARM_OK;
}

}  // namespace

bool is_current(int device) {
  int current = 0;
  return !get_device(&current) && current == device;
}

const char* make_ready() {
  Device device;
  const CudaError error = ready_device(&device);
  return error ? words(error) : nullptr;
}

}  // namespace genarm

genarm_result genarm_cuda_guided_step_workspace(const genarm_guided_step_args* args, size_t* bytes,
                                                genarm_error* error) {
  return genarm::workspace(args, bytes, error);
}

genarm_result genarm_cuda_guided_step(const genarm_guided_step_args* args, genarm_cuda_stream stream,
                                      genarm_error* error) {
  return genarm::run(args, stream, error);
}

genarm_result genarm_cuda_guided_log_softmax_workspace(const genarm_guided_log_softmax_args* args, size_t* bytes,
                                                       genarm_error* error) {
  return genarm::workspace(args, bytes, error);
}

genarm_result genarm_cuda_guided_log_softmax(const genarm_guided_log_softmax_args* args, genarm_cuda_stream stream,
                                             genarm_error* error) {
  return genarm::run(args, stream, error);
}
