// The C interface's arguments: what makes a call wrong, whatever runs it.
#ifndef GENARM_COMMON_CHECK_H_
#define GENARM_COMMON_CHECK_H_

#include "common/error.h"

namespace genarm {

// A parameter that is not given has its neutral value.
inline float value(genarm_floats p, int64_t row, float neutral) { return p.data ? p.data[row * p.stride] : neutral; }
inline int64_t value(genarm_ints p, int64_t row) { return p.data ? p.data[row * p.stride] : 0; }

inline genarm_result check(const genarm_inputs& in, size_t size, genarm_error* error) {
  const auto invalid = [error](const char* text) { return fail(error, GENARM_INVALID_ARGUMENT, "%s", text); };
  if (in.struct_size != size) {
    return fail(error, GENARM_INVALID_ARGUMENT, "struct_size: expected %zu (ABI version %d), got %zu", size,
                GENARM_ABI_VERSION, in.struct_size);
  }
  if (in.dtype != GENARM_FLOAT32 && in.dtype != GENARM_BFLOAT16 && in.dtype != GENARM_FLOAT16) {
    return fail(error, GENARM_INVALID_ARGUMENT, "dtype: expected a genarm_dtype, got %d", static_cast<int>(in.dtype));
  }
  if (in.rows < 0) return invalid("rows: expected at least 0");
  if (in.vocab_size < 1 || in.vocab_size > INT32_MAX) return invalid("vocab_size: expected 1 to 2^31 - 1");
  if (in.arms < 0 || in.arms >= INT32_MAX) return invalid("arms: expected at least 0, and fewer than 2^31");
  if (in.rows == 0) return GENARM_OK;
  if (!in.logits) return invalid("logits: expected 1 + arms of them, got NULL");
  for (int64_t i = 0; i <= in.arms; ++i) {
    if (!in.logits[i].data) return fail(error, GENARM_INVALID_ARGUMENT, "logits[%lld].data is NULL", (long long)i);
  }
  if (in.arms > 0 && !in.weights) return invalid("weights is NULL");
  return GENARM_OK;
}

inline genarm_result check(const genarm_guided_step_args& args, genarm_error* error) {
  const genarm_result result = check(args.in, sizeof args, error);
  if (result != GENARM_OK || args.in.rows == 0) return result;
  const auto missing = [error](const char* name) { return fail(error, GENARM_INVALID_ARGUMENT, "%s is NULL", name); };
  if (!args.token) return missing("token");
  if (!args.kept) return missing("kept");
  if (!args.status) return missing("status");
  const int given = !!args.logprob + !!args.log_mass + !!args.base_logprob;
  const bool arms_given = args.in.arms > 0 && args.arm_logprobs;
  if (given == 0 ? arms_given : given != 3 || (args.in.arms > 0 && !arms_given)) {
    return fail(error, GENARM_INVALID_ARGUMENT,
                "logprob, log_mass, base_logprob and arm_logprobs: expected all of them or none");
  }
  return GENARM_OK;
}

inline genarm_result check(const genarm_guided_log_softmax_args& args, genarm_error* error) {
  const genarm_result result = check(args.in, sizeof args, error);
  if (result == GENARM_OK && args.in.rows > 0 && !args.logprobs) {
    return fail(error, GENARM_INVALID_ARGUMENT, "logprobs is NULL");
  }
  return result;
}

// Whether a row, whose parameters the host can read, has a filter on.
inline bool filtered(const genarm_guided_step_args& args, int64_t row) {
  const int64_t top_k = value(args.top_k, row);
  return (top_k > 0 && top_k < args.in.vocab_size) || value(args.top_p, row, 1) < 1 || value(args.min_p, row, 0) > 0;
}

}  // namespace genarm

#endif  // GENARM_COMMON_CHECK_H_
