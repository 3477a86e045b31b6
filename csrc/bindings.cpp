// The CPU core for Python; genarm_kernels/backends/cpu.py is its caller.
#include "bindings.h"

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>
#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

#include "cpu/float_mode.h"
#include "cpu/row.h"

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

// On a team of torch's own size whatever the count: a smaller one would end threads that torch's next operation has to
// make anew.
void run_on_gomp(void* threads, int count, void (*task)(void*, int), void* data) {
  Region region{task, data, count, {0}};
  const auto body = [](void* self) {
    Region& region = *static_cast<Region*>(self);
    for (int i; (i = region.next.fetch_add(1)) < region.count;) region.task(region.data, i);
  };
  gomp_parallel()(body, &region, static_cast<unsigned>(reinterpret_cast<intptr_t>(threads)), 0);
}

// Holds the pool while a call uses it.
struct Executor {
  genarm_executor executor{};
  std::shared_ptr<genarm_thread_pool> pool;

  explicit Executor(int threads) {
    if (threads < 2 || in_forked_child) return;
    if (gomp_parallel()) {
      executor = {run_on_gomp, reinterpret_cast<void*>(intptr_t{threads}), threads};
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

// ---- Calls --------------------------------------------------------------------------------------------------------

genarm_isa isa = GENARM_ISA_AUTO;

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

// Takes back the interpreter that PyEval_SaveThread let go. When that has come to its end meanwhile, CPython
// before 3.14 ends a daemon thread by unwinding its stack, which no destructor of C++ is prepared for: the thread
// sleeps until the process is gone, as later versions have it.
void take_interpreter(PyThreadState* state) {
  struct Sleep {
    bool over = false;
    ~Sleep() {
      while (!over) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  } sleep;
  PyEval_RestoreThread(state);
  sleep.over = true;
}

// Calls that run on this machine's threads; Python says how many.
class Cpu {
 public:
  explicit Cpu(py::handle threads) : executor_(threads.cast<int>()) {}
  void prepare(genarm_inputs& in) const {
    in.isa = isa;
    in.executor = executor_.executor;
  }
  void run(genarm_guided_step_args& args) const { run(args, genarm_guided_step_workspace, genarm_guided_step); }
  void run(genarm_guided_log_softmax_args& args) const {
    run(args, genarm_guided_log_softmax_workspace, genarm_guided_log_softmax);
  }

 private:
  template <class Args>
  void run(Args& args, genarm_result (*workspace_size)(const Args*, size_t*, genarm_error*),
           genarm_result (*operation)(const Args*, genarm_error*)) const {
    thread_local Workspace workspace;
    genarm_error error;
    PyThreadState* const state = PyEval_SaveThread();
    genarm_result result = workspace_size(&args, &args.in.workspace_size, &error);
    if (result == GENARM_OK) {
      args.in.workspace = workspace.of(args.in.workspace_size);
      result = operation(&args, &error);
    }
    take_interpreter(state);
    genarm::bindings::raise(result, error);
  }

  Executor executor_;
};

// Adds to rows first, first + step, ... of y, `rows` of them, contiguous like those of x; on the calling thread alone:
// Python asks for no more than what takes another thread's waking to do.
void add_low_rank(int dtype, py::handle y, py::handle x, py::handle down, py::handle up, int64_t rows, int64_t first,
                  int64_t step, int64_t in, int64_t out, int64_t rank) {
  if (rows == 0 || rank == 0) return;
  const int64_t size = dtype == GENARM_FLOAT32 ? 4 : 2;
  thread_local Workspace workspace;
  const auto inner = static_cast<float*>(workspace.of(sizeof(float) * static_cast<size_t>(rank)));
  if (!inner) throw std::bad_alloc();
  const genarm::LowRank part{static_cast<genarm_dtype>(dtype),
                             genarm::bindings::pointer<char>(y) + first * out * size,
                             genarm::bindings::pointer<const char>(x) + first * in * size,
                             genarm::bindings::pointer<const float>(down),
                             genarm::bindings::pointer<const float>(up),
                             in,
                             out,
                             rank,
                             step * in,
                             step * out,
                             inner};
  const genarm::DefaultFloatMode mode;
  for (int64_t row = 0; row < rows; ++row) genarm::kernels_of(isa)->add_low_rank(part, row);
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
  module.def("guided_step", &genarm::bindings::guided_step<Cpu>);
  module.def("guided_log_softmax", &genarm::bindings::guided_log_softmax<Cpu>);
  module.def("add_low_rank", &add_low_rank);
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
