// The CPU core for Python; genarm_kernels/backends/cpu.py is its caller.
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/float_mode.h"
#include "cpu/row_kernel.h"
#include "python/bindings.h"
#include "python/torch_threads.h"

namespace py = pybind11;

namespace {

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
    genarm::bindings::take_interpreter(state);
    genarm::bindings::raise(result, error);
  }

  genarm::bindings::Executor executor_;
};

// Adds to rows first, first + step, ... of y, `rows` of them, contiguous like those of x; on the calling thread alone:
// Python asks for no more than what takes another thread's waking to do.
void add_low_rank(int dtype, py::handle y, py::handle x, py::handle down, py::handle up, int64_t rows, int64_t first,
                  int64_t step, int64_t width, int64_t height, int64_t rank) {
  if (rows == 0 || rank == 0) return;
  const int64_t size = dtype == GENARM_FLOAT32 ? 4 : 2;
  thread_local Workspace workspace;
  const auto inner = static_cast<float*>(workspace.of(sizeof(float) * static_cast<size_t>(rank)));
  if (!inner) throw std::bad_alloc();
  const genarm::LowRank part{static_cast<genarm_dtype>(dtype),
                             genarm::bindings::pointer<char>(y) + first * height * size,
                             genarm::bindings::pointer<const char>(x) + first * width * size,
                             genarm::bindings::pointer<const float>(down),
                             genarm::bindings::pointer<const float>(up),
                             width,
                             height,
                             rank,
                             step * width,
                             step * height,
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
  genarm::bindings::watch_forks();
  module.doc() = "The CPU core; genarm_kernels/backends/cpu.py is its caller.";
  module.attr("TILE") = GENARM_TILE;
  genarm::bindings::define<Cpu>(module);
  using py::arg;
  module.def("add_low_rank", &add_low_rank, py::kw_only(), arg("dtype"), arg("y"), arg("x"), arg("down"), arg("up"),
             arg("rows"), arg("first"), arg("step"), arg("width"), arg("height"), arg("rank"));
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
