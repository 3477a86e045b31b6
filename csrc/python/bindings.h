// From Python's values to the C interface's, for every extension module. Tensors come as objects with data_ptr() and
// stride(), so that no torch is needed to build; genarm_kernels/backends has checked them.
//
// A module says by its `Place` where calls run: Place(handle) takes what Python says of it, prepare(in) fills what the
// arguments hold of it, run(args) makes the call.
#ifndef GENARM_BINDINGS_H_
#define GENARM_BINDINGS_H_

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <vector>

#include "genarm_kernels.h"

namespace genarm {
namespace bindings {

namespace py = pybind11;

inline int64_t integer(PyObject* result) {
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

inline int64_t stride(py::handle tensor, int dimension) {
  static PyObject* const name = PyUnicode_InternFromString("stride");
  static PyObject* const dimensions[] = {PyLong_FromLong(0), PyLong_FromLong(1)};
  return integer(PyObject_CallMethodOneArg(tensor.ptr(), name, dimensions[dimension]));
}

// The stride of a tensor with a value for each of `count` rows. Of a single row any will do but 0, which means a number
// of the host's to a GPU.
inline int64_t row_stride(py::handle rows, int64_t count) { return count == 1 ? 1 : stride(rows, 0); }

// A field of one of Python's structures (genarm_kernels/parameters.py, outputs.py), by a name that is made once.
class Field {
 public:
  explicit Field(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  py::object operator()(py::handle structure) const {
    PyObject* const value = PyObject_GetAttr(structure.ptr(), name_);
    if (!value) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
  }

 private:
  PyObject* name_;
};

inline bool is_number(py::handle value) { return PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr()); }

inline float float_of(py::handle number) {
  const double value = PyFloat_AsDouble(number.ptr());
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return static_cast<float>(value);
}

// A parameter: a tensor, or a number for every row, which is then kept in `number`.
inline genarm_floats floats(py::handle value, int64_t count, float& number) {
  if (!is_number(value)) return {pointer<const float>(value), row_stride(value, count)};
  number = float_of(value);
  return {&number, 0};
}

inline genarm_ints ints(py::handle value, int64_t count, int64_t& number) {
  if (!is_number(value)) return {pointer<const int64_t>(value), row_stride(value, count)};
  number = integer(value.inc_ref().ptr());
  return {&number, 0};
}

// What every operation reads; owns what `in` points to.
struct Inputs {
  std::vector<genarm_logits> logits;
  std::vector<float> weights;
  float base_weight, temperature;
  genarm_inputs in{};

  Inputs(int dtype, int64_t rows, py::handle inputs) {
    static const Field base_logits("base_logits"), arm_logits("arm_logits"), vocab_size("vocab_size"),
        weights_("weights"), base_weight_("base_weight"), temperature_("temperature"), token_mask("token_mask");
    const py::object base = base_logits(inputs), given = weights_(inputs), mask = token_mask(inputs);
    logits.push_back({pointer<void>(base), stride(base, 0)});
    for (py::handle arm : py::list(arm_logits(inputs))) logits.push_back({pointer<void>(arm), stride(arm, 0)});
    in.dtype = static_cast<genarm_dtype>(dtype);
    in.rows = rows;
    in.vocab_size = integer(vocab_size(inputs).release().ptr());
    in.arms = static_cast<int64_t>(logits.size() - 1);
    in.logits = logits.data();
    in.base_weight = floats(base_weight_(inputs), rows, base_weight);
    if (py::isinstance<py::list>(given)) {
      for (py::handle number : py::list(given)) weights.push_back(float_of(number));
      in.weights = weights.data();
      in.weights_arm_stride = 1;
    } else {
      in.weights = pointer<const float>(given);
      in.weights_row_stride = row_stride(given, rows);
      in.weights_arm_stride = stride(given, 1);
    }
    in.temperature = floats(temperature_(inputs), rows, temperature);
    if (!mask.is_none()) {
      in.token_mask = pointer<const int32_t>(mask);
      in.token_mask_row_stride = stride(mask, 0);
      in.token_mask_word_stride = stride(mask, 1);
    }
  }
};

// Python's exception of a result.
inline void raise(genarm_result result, const genarm_error& error) {
  if (result == GENARM_OUT_OF_MEMORY) throw std::bad_alloc();
  if (result != GENARM_OK) throw std::runtime_error(error.message);
}

template <class Place>
void guided_step(py::handle place, int dtype, int64_t rows, py::handle inputs, py::handle sampling,
                 py::handle outputs) {
  static const Field top_k("top_k"), top_p("top_p"), min_p("min_p"), seed("seed"), position("position"),
      logprobs("logprobs"), token("token"), logprob("logprob"), log_mass("log_mass"), kept("kept"),
      base_logprob("base_logprob"), arm_logprobs("arm_logprobs"), status("status");
  Place where(place);
  Inputs read(dtype, rows, inputs);
  float top_p_number, min_p_number;
  int64_t top_k_number, seed_number, position_number;
  genarm_guided_step_args args{};
  args.in = read.in;
  args.in.struct_size = sizeof args;
  where.prepare(args.in);
  args.top_k = ints(top_k(sampling), rows, top_k_number);
  args.top_p = floats(top_p(sampling), rows, top_p_number);
  args.min_p = floats(min_p(sampling), rows, min_p_number);
  args.seed = ints(seed(sampling), rows, seed_number);
  args.seed_step = args.seed.data == &seed_number ? GENARM_SEED_STEP : 0;
  args.position = ints(position(sampling), rows, position_number);
  args.token = pointer<int64_t>(token(outputs));
  args.kept = pointer<int32_t>(kept(outputs));
  args.status = pointer<int32_t>(status(outputs));
  if (logprobs(sampling).ptr() == Py_True) {
    args.logprob = pointer<float>(logprob(outputs));
    args.log_mass = pointer<float>(log_mass(outputs));
    args.base_logprob = pointer<float>(base_logprob(outputs));
    args.arm_logprobs = pointer<float>(arm_logprobs(outputs));
  }
  where.run(args);
}

template <class Place>
void guided_log_softmax(py::handle place, int dtype, int64_t rows, py::handle inputs, py::handle logp) {
  Place where(place);
  Inputs read(dtype, rows, inputs);
  genarm_guided_log_softmax_args args{};
  args.in = read.in;
  args.in.struct_size = sizeof args;
  where.prepare(args.in);
  args.logprobs = pointer<float>(logp);
  args.logprobs_row_stride = stride(logp, 0);
  where.run(args);
}

// Both operations of a module; their arguments have names and no order.
template <class Place>
void define(py::module_& module) {
  using py::arg;
  module.def("guided_step", &guided_step<Place>, py::kw_only(), arg("place"), arg("dtype"), arg("rows"), arg("inputs"),
             arg("sampling"), arg("outputs"));
  module.def("guided_log_softmax", &guided_log_softmax<Place>, py::kw_only(), arg("place"), arg("dtype"), arg("rows"),
             arg("inputs"), arg("logp"));
}

}  // namespace bindings
}  // namespace genarm

#endif  // GENARM_BINDINGS_H_
