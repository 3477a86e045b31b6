// As much of the CUDA driver as Triton's launcher calls, with no GPU behind it: a launch goes to a hook.
#include <stddef.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
} Launch;  // the head of CUlaunchConfig
typedef void (*Hook)(const Launch*, void** arguments);

static Hook hook;
void fake_set_hook(Hook new_hook) { hook = new_hook; }

int cuLaunchKernelEx(const Launch* launch, void* function, void** arguments, void** extra) {
  if (hook) hook(launch, arguments);
  return 0;
}
int cuCtxGetCurrent(void** context) { return *context = &hook, 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) { return *value = 232448, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &hook, 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { return *value = 1024, 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuGetErrorString(int error, const char** text) { return *text = "no error", 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return *function = &hook, 0; }
int cuModuleLoadData(void** module, const void* image) { return *module = &hook, 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const Launch* launch) { return *clusters = 1, 0; }
int cuPointerGetAttribute(void* data, int attribute, unsigned long long pointer) {
  return *(unsigned long long*)data = pointer, 0;
}
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
