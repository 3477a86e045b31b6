// The CUDA kernels for Python; genarm_kernels/backends/cuda.py is its caller.
#include "cuda/python.h"
#include "genarm_kernels_cuda.h"
#include "python/bindings.h"

namespace {

namespace py = pybind11;

// Python makes it so, where it is not: what torch and another copy of the CUDA runtime hold to be current is one thing.
void expect_current(int device) {
  if (!genarm::is_current(device)) throw std::runtime_error("CUDA: the operands' device is not the current one");
}

// Calls on a stream; Python says so by a `Place` (backends/cuda.py).
class Gpu {
 public:
  explicit Gpu(py::handle place) {
    static const genarm::bindings::Field device("device"), stream("stream"), memory("memory");
    device_ = device(place).cast<int>();
    stream_ = reinterpret_cast<void*>(stream(place).cast<uintptr_t>());
    memory_ = memory(place);
  }
  void prepare(genarm_inputs&) const {}
  void run(genarm_guided_step_args& args) const {
    run(args, genarm_cuda_guided_step_workspace, genarm_cuda_guided_step);
  }
  void run(genarm_guided_log_softmax_args& args) const {
    run(args, genarm_cuda_guided_log_softmax_workspace, genarm_cuda_guided_log_softmax);
  }

 private:
  template <class Args>
  void run(Args& args, genarm_result (*workspace_size)(const Args*, size_t*, genarm_error*),
           genarm_result (*operation)(const Args*, genarm_cuda_stream, genarm_error*)) const {
    expect_current(device_);
    genarm_error error;
    genarm_result result = workspace_size(&args, &args.in.workspace_size, &error);
    py::object workspace;  // back with its stream's allocator when the call has been put there: it is used in order
    if (result == GENARM_OK && args.in.workspace_size > 0) {
      workspace = memory_(args.in.workspace_size);
      args.in.workspace = genarm::bindings::pointer<void>(workspace);
    }
    if (result == GENARM_OK) result = operation(&args, stream_, &error);
    genarm::bindings::raise(result, error);
  }

  int device_;
  void* stream_;
  py::object memory_;
};

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA kernels; genarm_kernels/backends/cuda.py is their caller.";
#if defined(GENARM_EMULATED)
  module.attr("EMULATED") = true;  // tests/backends/simt: tensors are the CPU's
  module.attr("ARCHITECTURES") = "";
#else
  module.attr("EMULATED") = false;
  module.attr("ARCHITECTURES") = GENARM_CUDA_ARCHS;
#endif
  genarm::bindings::define<Gpu>(module);
  module.def(
      "make_ready",
      [] {
        if (const char* wrong = genarm::make_ready()) throw std::runtime_error(wrong);
      },
      "What the first call on the current device does; fails where the kernels were not built for it.");
  module.def(
      "force_cluster", [](int blocks) { genarm::forced_cluster = blocks; },
      "For tests: blocks that share a row from now on; 0: two launches, -1: as planned.");
}
