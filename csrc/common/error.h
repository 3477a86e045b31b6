#ifndef GENARM_COMMON_ERROR_H_
#define GENARM_COMMON_ERROR_H_

#include <cstdarg>
#include <cstdio>

#include "genarm_kernels.h"

namespace genarm {

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
inline genarm_result fail(genarm_error* error, genarm_result result, const char* format, ...) {
  if (error) {
    va_list values;
    va_start(values, format);
    std::vsnprintf(error->message, sizeof error->message, format, values);
    va_end(values);
  }
  return result;
}

}  // namespace genarm

#endif  // GENARM_COMMON_ERROR_H_
