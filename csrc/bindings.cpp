// The CPU core for Python: the only file that knows it. Tensors come as objects with data_ptr() and stride(), so that
// no torch is needed to build; genarm_kernels/backends/cpu.py has checked them.
#include <pybind11/pybind11.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>
#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

#include "genarm_kernels.h"

namespace py = pybind11;

namespace {

// ---- Threads ------------------------------------------------------------------------------------------------------

// Forked since this module was loaded: the parent's threads are not there. A fork before that cannot be known; there
// calls wait for the threads of torch's OpenMP, as torch's own operations do.
bool in_forked_child = false;

// The OpenMP runtime that torch has loaded, if there is one: its threads are awake right after a forward pass, and a
// second pool would compete with them for the cores.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
GompParallel gomp_parallel() {
#if defined(_WIN32)
  return nullptr;
#else
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#endif
}

struct Region {
  void (*task)(void*, int);
  void* data;
  int count;
  std::atomic<int> next;
};

void run_on_gomp(void*, int count, void (*task)(void*, int), void* data) {
  Region region{task, data, count, {0}};
  const auto body = [](void* self) {
    Region& region = *static_cast<Region*>(self);
    for (int i; (i = region.next.fetch_add(1)) < region.count;) region.task(region.data, i);
  };
  gomp_parallel()(body, &region, static_cast<unsigned>(count), 0);
}

// Holds the pool while a call uses it.
struct Executor {
  genarm_executor executor{};
  std::shared_ptr<genarm_thread_pool> pool;

  explicit Executor(int threads) {
    if (threads < 2 || in_forked_child) return;
    if (gomp_parallel()) {
      executor = {run_on_gomp, nullptr, threads};
      return;
    }
    static std::mutex mutex;
    // Never destroyed: at the end of a forked child there would be no threads to join.
    static auto& shared = *new std::shared_ptr<genarm_thread_pool>;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!shared || genarm_thread_pool_executor(shared.get()).threads != threads) {
      genarm_thread_pool* made;
      if (genarm_thread_pool_create(threads, &made, nullptr) != GENARM_OK) return;  // the calling thread alone, then
      shared.reset(made, genarm_thread_pool_destroy);
    }
    pool = shared;
    executor = genarm_thread_pool_executor(pool.get());
  }
};

// ---- From Python's values to the C interface's --------------------------------------------------------------------

genarm_isa isa = GENARM_ISA_AUTO;

int64_t integer(PyObject* result) {
  if (!result) throw py::error_already_set();
  const int64_t value = PyLong_AsLongLong(result);
  Py_DECREF(result);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

template <class T>
T* pointer(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  return reinterpret_cast<T*>(integer(PyObject_CallMethodNoArgs(tensor.ptr(), name)));
}

int64_t stride(py::handle tensor, int dimension) {
  static PyObject* const name = PyUnicode_InternFromString("stride");
  static PyObject* const dimensions[] = {PyLong_FromLong(0), PyLong_FromLong(1)};
  return integer(PyObject_CallMethodOneArg(tensor.ptr(), name, dimensions[dimension]));
}

// A parameter: `rows` where it is a tensor, otherwise the number for every row.
genarm_floats floats(const float& number, py::handle rows) {
  if (rows.is_none()) return {&number, 0};
  return {pointer<const float>(rows), stride(rows, 0)};
}

genarm_ints ints(const int64_t& number, py::handle rows) {
  if (rows.is_none()) return {&number, 0};
  return {pointer<const int64_t>(rows), stride(rows, 0)};
}

// What both operations read; owns the arrays that `in` points to.
struct Inputs {
  std::vector<genarm_logits> logits;
  std::vector<float> weights;
  genarm_inputs in{};
  Executor executor;

  Inputs(int dtype, int threads, py::handle base, const py::list& arms, int64_t vocab_size, const py::list& numbers,
         const float& base_weight, const float& temperature, py::handle token_mask, py::handle weights_rows,
         py::handle base_weight_rows, py::handle temperature_rows, int64_t rows)
      : executor(threads) {
    logits.push_back({pointer<void>(base), stride(base, 0)});
    for (py::handle arm : arms) logits.push_back({pointer<void>(arm), stride(arm, 0)});
    in.dtype = static_cast<genarm_dtype>(dtype);
    in.isa = isa;
    in.rows = rows;
    in.vocab_size = vocab_size;
    in.arms = static_cast<int64_t>(arms.size());
    in.logits = logits.data();
    in.base_weight = floats(base_weight, base_weight_rows);
    if (weights_rows.is_none()) {
      for (py::handle number : numbers) weights.push_back(static_cast<float>(PyFloat_AsDouble(number.ptr())));
      in.weights = weights.data();
      in.weights_arm_stride = 1;
    } else {
      in.weights = pointer<const float>(weights_rows);
      in.weights_row_stride = stride(weights_rows, 0);
      in.weights_arm_stride = stride(weights_rows, 1);
    }
    in.temperature = floats(temperature, temperature_rows);
    if (!token_mask.is_none()) {
      in.token_mask = pointer<const int32_t>(token_mask);
      in.token_mask_row_stride = stride(token_mask, 0);
      in.token_mask_word_stride = stride(token_mask, 1);
    }
    in.executor = executor.executor;
  }
};

// One workspace a calling thread, kept for the next call.
class Workspace {
 public:
  ~Workspace() { std::free(block_); }
  void* of(size_t size) {
    if (size > size_) {
      std::free(block_);
      block_ = std::malloc(size);
      size_ = block_ ? size : 0;
    }
    return block_;
  }

 private:
  void* block_ = nullptr;
  size_t size_ = 0;
};

template <class Args>
void run(Args& args, genarm_result (*workspace_size)(const Args*, size_t*, genarm_error*),
         genarm_result (*operation)(const Args*, genarm_error*)) {
  thread_local Workspace workspace;
  args.in.struct_size = sizeof args;
  genarm_error error;
  genarm_result result;
  {
    const py::gil_scoped_release released;
    result = workspace_size(&args, &args.in.workspace_size, &error);
    if (result == GENARM_OK) {
      args.in.workspace = workspace.of(args.in.workspace_size);
      result = operation(&args, &error);
    }
  }
  if (result == GENARM_OUT_OF_MEMORY) throw std::bad_alloc();
  if (result != GENARM_OK) throw std::runtime_error(error.message);
}

void guided_step(int dtype, int threads, int64_t rows, py::handle token, py::handle logprob, py::handle log_mass,
                 py::handle kept, py::handle base_logprob, py::handle arm_logprobs, py::handle status, py::handle base,
                 const py::list& arms, int64_t vocab_size, bool logprobs, const py::list& weights, float base_weight,
                 float temperature, int64_t top_k, float top_p, float min_p, int64_t seed, int64_t position,
                 py::handle token_mask, py::handle weights_rows, py::handle base_weight_rows,
                 py::handle temperature_rows, py::handle top_k_rows, py::handle top_p_rows, py::handle min_p_rows,
                 py::handle seed_rows, py::handle position_rows) {
  Inputs inputs(dtype, threads, base, arms, vocab_size, weights, base_weight, temperature, token_mask, weights_rows,
                base_weight_rows, temperature_rows, rows);
  genarm_guided_step_args args{};
  args.in = inputs.in;
  args.top_k = ints(top_k, top_k_rows);
  args.top_p = floats(top_p, top_p_rows);
  args.min_p = floats(min_p, min_p_rows);
  args.seed = ints(seed, seed_rows);
  args.seed_step = seed_rows.is_none() ? 1 : 0;
  args.position = ints(position, position_rows);
  args.token = pointer<int64_t>(token);
  args.kept = pointer<int32_t>(kept);
  args.status = pointer<int32_t>(status);
  if (logprobs) {
    args.logprob = pointer<float>(logprob);
    args.log_mass = pointer<float>(log_mass);
    args.base_logprob = pointer<float>(base_logprob);
    args.arm_logprobs = pointer<float>(arm_logprobs);
  }
  run(args, genarm_guided_step_workspace, genarm_guided_step);
}

void guided_log_softmax(int dtype, int threads, int64_t rows, py::handle logprobs, py::handle base,
                        const py::list& arms, int64_t vocab_size, const py::list& weights, float base_weight,
                        float temperature, py::handle token_mask, py::handle weights_rows, py::handle base_weight_rows,
                        py::handle temperature_rows) {
  Inputs inputs(dtype, threads, base, arms, vocab_size, weights, base_weight, temperature, token_mask, weights_rows,
                base_weight_rows, temperature_rows, rows);
  genarm_guided_log_softmax_args args{};
  args.in = inputs.in;
  args.logprobs = pointer<float>(logprobs);
  args.logprobs_row_stride = stride(logprobs, 0);
  run(args, genarm_guided_log_softmax_workspace, genarm_guided_log_softmax);
}

// The name of the instruction set in use, or None when the one that GENARM_CPU_ISA names cannot run.
py::object current_isa() {
  const char* name = genarm_isa_name(isa);
  return name ? py::object(py::str(name)) : py::none();
}

std::vector<genarm_isa> supported() {
  std::vector<genarm_isa> found;
  for (genarm_isa each : {GENARM_ISA_PORTABLE, GENARM_ISA_AVX2, GENARM_ISA_AVX512}) {
    if (genarm_isa_supported(each)) found.push_back(each);
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif
  module.doc() = "The CPU core; genarm_kernels/backends/cpu.py is its caller.";
  module.attr("TILE") = GENARM_TILE;
  module.def("guided_step", &guided_step);
  module.def("guided_log_softmax", &guided_log_softmax);
  module.def("isa", &current_isa, "Name of the instruction set in use; None when the one asked for cannot run.");
  module.def("supported_isas", [] {
    py::tuple names(supported().size());
    size_t i = 0;
    for (genarm_isa each : supported()) names[i++] = genarm_isa_name(each);
    return names;
  });
  module.def(
      "set_isa",
      [](const std::string& name) {
        for (genarm_isa each : supported()) {
          if (name == genarm_isa_name(each)) {
            isa = each;
            return;
          }
        }
        throw py::value_error("isa: this machine does not run '" + name + "'");
      },
      "For tests: the instruction set of every call from now on.");
}
