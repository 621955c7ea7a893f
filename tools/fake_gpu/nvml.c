/* The part of NVIDIA's management library that torch and megatron_papo/distributed/nvidia_driver.py ask: one GPU, and a driver
 * whose version and newest CUDA (1000 x major + 10 x minor) a compiler's options may set. Compiled by libraries.py. */
#include <string.h>
#ifndef DRIVER
#define DRIVER "580.65.06"
#define DRIVER_CUDA 13000
#endif
int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(int *count) { *count = 1; return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = DRIVER_CUDA; return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) { strncpy(version, DRIVER, length); return 0; }
