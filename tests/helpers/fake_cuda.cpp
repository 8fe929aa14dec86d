// The few functions of the CUDA driver API that an exported operator and its example use, on memory
// of the host. A "module" is the text of its file; a launch calls back to Python, which runs the
// kernel of that name under Triton's interpreter. Linked with code of the repository in tests only.

#include <cstdlib>
#include <cstring>
#include <string>

#include <cuda.h>

struct CUmod_st {
    std::string text;
};
struct CUfunc_st {
    std::string text, symbol;
};

using Launch = int (*)(const char *text, const char *symbol, unsigned grid_x, unsigned grid_y,
    unsigned block, unsigned shared, void **arguments);
static Launch launch = nullptr;
static int open_modules = 0;

extern "C" {

void fake_cuda_begin(Launch callback) { launch = callback; }
int fake_cuda_open_modules() { return open_modules; }

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) {
    return *context = nullptr, CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxSynchronize() { return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    if (attribute != CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) return CUDA_ERROR_INVALID_VALUE;
    // Few, so that programs share the tiles.
    return *value = 3, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char **text) {
    return *text = "an error of the driver", CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr *pointer, size_t bytes) {
    // Filled with what is NaN in every dtype.
    void *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(memory, 0xFF, bytes);
    return *pointer = reinterpret_cast<CUdeviceptr>(memory), CUDA_SUCCESS;
}
CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes) {
    return std::memcpy(reinterpret_cast<void *>(to), from, bytes), CUDA_SUCCESS;
}
CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes) {
    return std::memcpy(to, reinterpret_cast<void *>(from), bytes), CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = new CUmod_st{static_cast<const char *>(image)};
    ++open_modules;
    return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
    delete module;
    --open_modules;
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *symbol) {
    return *function = new CUfunc_st{module->text, symbol}, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int) {
    return attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? CUDA_SUCCESS
                                                                        : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
    unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared, CUstream,
    void **arguments, void **) {
    if (grid_z != 1 || block_y != 1 || block_z != 1 || !launch) return CUDA_ERROR_INVALID_VALUE;
    int code = launch(function->text.c_str(), function->symbol.c_str(), grid_x, grid_y, block_x,
        shared, arguments);
    return code ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

}  // extern "C"
