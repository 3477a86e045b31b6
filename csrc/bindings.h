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

// A parameter: `rows` where it is a tensor, otherwise the number for every row.
inline genarm_floats floats(const float& number, py::handle rows, int64_t count) {
  if (rows.is_none()) return {&number, 0};
  return {pointer<const float>(rows), row_stride(rows, count)};
}

inline genarm_ints ints(const int64_t& number, py::handle rows, int64_t count) {
  if (rows.is_none()) return {&number, 0};
  return {pointer<const int64_t>(rows), row_stride(rows, count)};
}

// What both operations read; owns the arrays that `in` points to.
struct Inputs {
  std::vector<genarm_logits> logits;
  std::vector<float> weights;
  genarm_inputs in{};

  Inputs(int dtype, py::handle base, const py::list& arms, int64_t vocab_size, const py::list& numbers,
         const float& base_weight, const float& temperature, py::handle token_mask, py::handle weights_rows,
         py::handle base_weight_rows, py::handle temperature_rows, int64_t rows) {
    logits.push_back({pointer<void>(base), stride(base, 0)});
    for (py::handle arm : arms) logits.push_back({pointer<void>(arm), stride(arm, 0)});
    in.dtype = static_cast<genarm_dtype>(dtype);
    in.rows = rows;
    in.vocab_size = vocab_size;
    in.arms = static_cast<int64_t>(arms.size());
    in.logits = logits.data();
    in.base_weight = floats(base_weight, base_weight_rows, rows);
    if (weights_rows.is_none()) {
      for (py::handle number : numbers) weights.push_back(static_cast<float>(PyFloat_AsDouble(number.ptr())));
      in.weights = weights.data();
      in.weights_arm_stride = 1;
    } else {
      in.weights = pointer<const float>(weights_rows);
      in.weights_row_stride = row_stride(weights_rows, rows);
      in.weights_arm_stride = stride(weights_rows, 1);
    }
    in.temperature = floats(temperature, temperature_rows, rows);
    if (!token_mask.is_none()) {
      in.token_mask = pointer<const int32_t>(token_mask);
      in.token_mask_row_stride = stride(token_mask, 0);
      in.token_mask_word_stride = stride(token_mask, 1);
    }
  }
};

// Python's exception of a result.
inline void raise(genarm_result result, const genarm_error& error) {
  if (result == GENARM_OUT_OF_MEMORY) throw std::bad_alloc();
  if (result != GENARM_OK) throw std::runtime_error(error.message);
}

template <class Place>
void guided_step(int dtype, py::handle place, int64_t rows, py::handle token, py::handle logprob, py::handle log_mass,
                 py::handle kept, py::handle base_logprob, py::handle arm_logprobs, py::handle status, py::handle base,
                 const py::list& arms, int64_t vocab_size, bool logprobs, const py::list& weights, float base_weight,
                 float temperature, int64_t top_k, float top_p, float min_p, int64_t seed, int64_t position,
                 py::handle token_mask, py::handle weights_rows, py::handle base_weight_rows,
                 py::handle temperature_rows, py::handle top_k_rows, py::handle top_p_rows, py::handle min_p_rows,
                 py::handle seed_rows, py::handle position_rows) {
  Place where(place);
  Inputs inputs(dtype, base, arms, vocab_size, weights, base_weight, temperature, token_mask, weights_rows,
                base_weight_rows, temperature_rows, rows);
  genarm_guided_step_args args{};
  args.in = inputs.in;
  args.in.struct_size = sizeof args;
  where.prepare(args.in);
  args.top_k = ints(top_k, top_k_rows, rows);
  args.top_p = floats(top_p, top_p_rows, rows);
  args.min_p = floats(min_p, min_p_rows, rows);
  args.seed = ints(seed, seed_rows, rows);
  args.seed_step = seed_rows.is_none() ? GENARM_SEED_STEP : 0;
  args.position = ints(position, position_rows, rows);
  args.token = pointer<int64_t>(token);
  args.kept = pointer<int32_t>(kept);
  args.status = pointer<int32_t>(status);
  if (logprobs) {
    args.logprob = pointer<float>(logprob);
    args.log_mass = pointer<float>(log_mass);
    args.base_logprob = pointer<float>(base_logprob);
    args.arm_logprobs = pointer<float>(arm_logprobs);
  }
  where.run(args);
}

template <class Place>
void guided_log_softmax(int dtype, py::handle place, int64_t rows, py::handle logprobs, py::handle base,
                        const py::list& arms, int64_t vocab_size, const py::list& weights, float base_weight,
                        float temperature, py::handle token_mask, py::handle weights_rows, py::handle base_weight_rows,
                        py::handle temperature_rows) {
  Place where(place);
  Inputs inputs(dtype, base, arms, vocab_size, weights, base_weight, temperature, token_mask, weights_rows,
                base_weight_rows, temperature_rows, rows);
  genarm_guided_log_softmax_args args{};
  args.in = inputs.in;
  args.in.struct_size = sizeof args;
  where.prepare(args.in);
  args.logprobs = pointer<float>(logprobs);
  args.logprobs_row_stride = stride(logprobs, 0);
  where.run(args);
}

}  // namespace bindings
}  // namespace genarm

#endif  // GENARM_BINDINGS_H_
