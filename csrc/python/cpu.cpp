// The CPU core for Python; genarm_kernels/backends/cpu.py is its caller.
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/row.h"
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

template <class T>
const T* pointer_or_null(py::handle tensor) {
  return tensor.is_none() ? nullptr : genarm::bindings::pointer<const T>(tensor);
}

// genarm_kernels/backends/cpu.py gives layers as dictionaries; what their tensors hold is not copied.
genarm::Linear linear_of(const py::dict& given) {
  genarm::Linear layer{static_cast<genarm::WeightType>(given["type"].cast<int>()),
                       genarm::bindings::pointer<const void>(given["weight"]),
                       pointer_or_null<float>(given["scales"]),
                       pointer_or_null<float>(given["bias"]),
                       given["width"].cast<int64_t>(),
                       given["height"].cast<int64_t>(),
                       {}};
  for (py::handle one : py::list(given["parts"])) {
    const py::tuple part = one.cast<py::tuple>();
    layer.parts.push_back({part[0].cast<int64_t>(), genarm::bindings::pointer<const float>(part[1]),
                           genarm::bindings::pointer<const float>(part[2]), part[3].cast<int64_t>()});
  }
  return layer;
}

// Runs it without the interpreter's lock.
template <class Work>
void without_lock(const Work& work) {
  PyThreadState* const state = PyEval_SaveThread();
  std::exception_ptr wrong;
  try {
    work();
  } catch (...) {
    wrong = std::current_exception();
  }
  genarm::bindings::take_interpreter(state);
  if (wrong) std::rethrow_exception(wrong);
}

// A linear layer as calls take it, made once.
class Linear {
 public:
  Linear(const py::dict& layer, int64_t operands) : layer_(linear_of(layer)), operands_(operands) {}
  void operator()(int dtype, py::handle x, int64_t rows, int64_t tokens, py::handle y, int threads) const {
    const genarm::bindings::Executor executor(threads);
    const void* const from = genarm::bindings::pointer<const void>(x);
    void* const to = genarm::bindings::pointer<void>(y);
    without_lock([&] {
      genarm::run_linear(layer_, genarm::kernels_of(isa)->layers, executor.executor, static_cast<genarm_dtype>(dtype),
                         from, rows, tokens, operands_, to);
    });
  }

 private:
  const genarm::Linear layer_;
  const int64_t operands_;
};

genarm::Norm norm_of(const py::object& given) {
  if (given.is_none()) return {nullptr, 0};
  const py::tuple norm = given;
  return {genarm::bindings::pointer<const float>(norm[0]), norm[1].cast<float>()};
}

genarm::Decoder decoder_of(const py::dict& given) {
  const auto number = [&given](const char* name) { return given[name].cast<int64_t>(); };
  const auto floats = [&given](const char* name) { return genarm::bindings::pointer<const float>(given[name]); };
  genarm::Decoder decoder{};
  decoder.operands = number("operands");
  decoder.hidden = number("hidden_size");
  decoder.heads = number("heads");
  decoder.kv_heads = number("kv_heads");
  decoder.head_size = number("head_size");
  decoder.vocab = number("vocab_size");
  decoder.embeddings = number("embeddings");
  decoder.length = number("length");
  decoder.caches = static_cast<genarm_dtype>(number("cache_type"));
  decoder.embedding_type = static_cast<genarm::WeightType>(number("embedding_type"));
  decoder.embedding = genarm::bindings::pointer<const void>(given["embedding"]);
  decoder.attention_scale = given["attention_scale"].cast<float>();
  decoder.activation = static_cast<genarm::Activation>(number("activation"));
  decoder.cos = floats("cos");
  decoder.sin = floats("sin");
  decoder.norm = norm_of(given["norm"]);
  decoder.head = linear_of(given["head"]);
  for (py::handle one : py::list(given["layers"])) {
    const py::dict layer = one.cast<py::dict>();
    decoder.layers.push_back({norm_of(layer["attention_norm"]), norm_of(layer["q_norm"]), norm_of(layer["k_norm"]),
                              norm_of(layer["mlp_norm"]), linear_of(layer["q"]), linear_of(layer["k"]),
                              linear_of(layer["v"]), linear_of(layer["o"]), linear_of(layer["gate"]),
                              linear_of(layer["up"]), linear_of(layer["down"]),
                              genarm::bindings::pointer<void>(layer["keys"]),
                              genarm::bindings::pointer<void>(layer["values"]), layer["window"].cast<int64_t>()});
  }
  return decoder;
}

class DecoderStep {
 public:
  explicit DecoderStep(const py::dict& decoder) : step_(decoder_of(decoder), genarm::kernels_of(isa)->layers) {}
  void operator()(py::handle tokens, py::handle lengths, int64_t first, int64_t rows, int64_t count, bool last,
                  py::handle logits, int threads) {
    const genarm::bindings::Executor executor(threads);
    const auto fed = genarm::bindings::pointer<const int64_t>(tokens),
               at = genarm::bindings::pointer<const int64_t>(lengths);
    const auto out = genarm::bindings::pointer<float>(logits);
    without_lock([&] { step_.run(executor.executor, fed, at, first, rows, count, last, out); });
  }

 private:
  genarm::DecoderStep step_;
};

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
  py::class_<Linear>(module, "Linear")
      .def(py::init<const py::dict&, int64_t>(), py::kw_only(), arg("layer"), arg("operands"))
      .def("__call__", &Linear::operator(), py::kw_only(), arg("dtype"), arg("x"), arg("rows"), arg("tokens"), arg("y"),
           arg("threads"));
  py::class_<DecoderStep>(module, "DecoderStep")
      .def(py::init<const py::dict&>(), py::kw_only(), arg("decoder"))
      .def("__call__", &DecoderStep::operator(), py::kw_only(), arg("tokens"), arg("lengths"), arg("first"),
           arg("rows"), arg("count"), arg("last"), arg("logits"), arg("threads"));
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
