/* A CUDA driver that says yes to everything and does nothing: what a launch costs the CPU, up to the driver. */
#include <stddef.h>
#include <stdint.h>

typedef int Result;

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = 12080; return 0; }
Result cuGetErrorString(Result error, const char **text) { *text = "stub"; return 0; }
Result cuGetErrorName(Result error, const char **text) { *text = "stub"; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
/* Whatever is asked for, there is as much as an H100's shared memory has bytes. */
Result cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
Result cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
Result cuCtxSetCurrent(void *context) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 1; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
Result cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
Result cuModuleUnload(void *module) { return 0; }
/* Attribute 0 is the largest number of threads. */
Result cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute ? 32 : 1024; return 0; }
Result cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(void *function, int config) { return 0; }
Result cuOccupancyMaxActiveClusters(int *count, void *function, void *config) { *count = 8; return 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
Result cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }
Result cuLaunchKernel(void) { return 0; }
Result cuLaunchKernelEx(void *config, void *function, void **parameters, void **extra) { return 0; }
