// SPDX-License-Identifier: Apache-2.0
// The calls of CUDA's runtime that csrc/cuda makes, for the emulated machine, and what nvcc's launch stubs
// need.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <map>

#include "machine.h"

namespace emulator {
namespace {

std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

// The kernel behind a launch stub, by the name that nvcc gave it.
std::map<const void*, std::string>& stubs() {
  static std::map<const void*, std::string> all;
  return all;
}

struct Shape {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};
thread_local Shape launch_shape;  // between <<<...>>> and the stub

template <typename Body>
cudaError_t call(const char* name, const Body& body) {
  Machine& machine = Machine::get();
  std::lock_guard<std::mutex> lock(machine.mutex);
  const cudaError_t refused = machine.enter(name);
  return machine.remember(refused == cudaSuccess ? body(machine) : refused);
}

uint64_t number(const void* pointer) {
  return reinterpret_cast<uint64_t>(pointer);
}
Event* as_event(cudaEvent_t event) {
  return reinterpret_cast<Event*>(event);
}

const Kernel* find_kernel(const std::string& variant, const std::string& name) {
  for (const Kernel& kernel : kernels())
    if (kernel.variant == variant && kernel.name == name) return &kernel;
  return nullptr;
}

cudaError_t launch(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                   cudaStream_t stream) {
  return call("cudaLaunchKernel", [&](Machine& machine) {
    const auto found = stubs().find(stub);
    const Kernel* const kernel =
        found == stubs().end() ? nullptr : find_kernel(machine.variant(), found->second);
    if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1 || shared_bytes != 0) {
      machine.violate("a launch that the emulator does not know: more dimensions, or shared memory");
      return cudaErrorInvalidConfiguration;
    }
    return machine.launch(number(stream),
                          {kernel, grid.x, block.x, *static_cast<const moetion::Job*>(arguments[0])});
  });
}

}  // namespace

bool register_kernels(const std::vector<Kernel>& more) {
  kernels().insert(kernels().end(), more.begin(), more.end());
  return true;
}

bool has_kernels(const std::string& variant) {
  return std::any_of(kernels().begin(), kernels().end(),
                     [&](const Kernel& kernel) { return kernel.variant == variant; });
}

}  // namespace emulator

using emulator::as_event;
using emulator::call;
using emulator::Machine;
using emulator::number;
using emulator::Place;

extern "C" {

// -- launch stubs
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  emulator::stubs()[stub] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream) {
  emulator::launch_shape = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = emulator::launch_shape.grid;
  *block = emulator::launch_shape.block;
  *shared_bytes = emulator::launch_shape.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = emulator::launch_shape.stream;
  return cudaSuccess;
}
// nvcc 12 launches by the stub's address, nvcc 13 by a handle that it asks for first.
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t stream) {
  return emulator::launch(stub, grid, block, arguments, shared_bytes, stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t stream) {
  return emulator::launch(kernel, grid, block, arguments, shared_bytes, stream);
}

// -- devices and threads
cudaError_t cudaGetDeviceCount(int* count) {
  *count = emulator::kNumDevices;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  Machine& machine = Machine::get();
  std::lock_guard<std::mutex> lock(machine.mutex);
  return machine.remember(machine.set_device(device));
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  *mode = Machine::get().exchange_capture_mode(*mode);
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return call("cudaDeviceGetAttribute", [&](Machine&) {
    if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
    *value = emulator::kNumSms;
    return cudaSuccess;
  });
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  return call("cudaDeviceGetPCIBusId", [&](Machine&) {
    std::snprintf(text, static_cast<size_t>(size), "0000:C%d:00.0", device);  // upper case, as the driver's
    return cudaSuccess;
  });
}
cudaError_t cudaGetLastError() {
  Machine& machine = Machine::get();
  std::lock_guard<std::mutex> lock(machine.mutex);
  return machine.take_last_error();
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorHostMemoryAlreadyRegistered:
      return "part or all of the requested memory range is already mapped";
    default:
      static thread_local char text[32];
      std::snprintf(text, sizeof(text), "error %d", static_cast<int>(error));
      return text;
  }
}

// -- memory
cudaError_t cudaMalloc(void** memory, size_t nbytes) {
  return call("cudaMalloc", [&](Machine& machine) {
    *memory = reinterpret_cast<void*>(machine.allocate(nbytes, Place::kDevice, machine.device()));
    return cudaSuccess;
  });
}
cudaError_t cudaFree(void* memory) {
  return call("cudaFree", [&](Machine& machine) { return machine.free(number(memory), Place::kDevice); });
}
cudaError_t cudaHostAlloc(void** memory, size_t nbytes, unsigned) {
  return call("cudaHostAlloc", [&](Machine& machine) {
    *memory = reinterpret_cast<void*>(machine.allocate(nbytes, Place::kPinned, machine.device()));
    return cudaSuccess;
  });
}
cudaError_t cudaFreeHost(void* memory) {
  return call("cudaFreeHost", [&](Machine& machine) { return machine.free(number(memory), Place::kPinned); });
}
cudaError_t cudaHostRegister(void* memory, size_t nbytes, unsigned) {
  return call("cudaHostRegister",
              [&](Machine& machine) { return machine.register_memory(number(memory), nbytes); });
}
cudaError_t cudaHostUnregister(void* memory) {
  return call("cudaHostUnregister",
              [&](Machine& machine) { return machine.unregister_memory(number(memory)); });
}
cudaError_t cudaHostGetDevicePointer(void** on_device, void* memory, unsigned) {
  return call("cudaHostGetDevicePointer", [&](Machine&) {
    *on_device = memory;
    return cudaSuccess;
  });
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* memory) {
  return call("cudaPointerGetAttributes", [&](Machine& machine) {
    *attributes = {};
    attributes->type = cudaMemoryTypeUnregistered;
    const emulator::Block* const block = machine.find({number(memory), number(memory) + 1});
    if (block == nullptr) return cudaSuccess;
    attributes->type = block->place == Place::kDevice ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    attributes->device = block->device;
    return cudaSuccess;
  });
}

// -- streams and events
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return call("cudaStreamCreate", [&](Machine& machine) {
    if (flags != cudaStreamNonBlocking) machine.violate("a stream that waits for the default stream");
    *stream = reinterpret_cast<cudaStream_t>(machine.make_stream(machine.device()));
    return cudaSuccess;
  });
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return call("cudaStreamDestroy", [&](Machine& machine) { return machine.destroy_stream(number(stream)); });
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return call("cudaStreamWaitEvent",
              [&](Machine& machine) { return machine.wait(number(stream), as_event(event)); });
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return call("cudaEventCreate", [&](Machine& machine) {
    *event = reinterpret_cast<cudaEvent_t>(machine.make_event((flags & cudaEventDisableTiming) == 0));
    return cudaSuccess;
  });
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return call("cudaEventDestroy", [&](Machine& machine) { return machine.destroy_event(as_event(event)); });
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return call("cudaEventRecord",
              [&](Machine& machine) { return machine.record(as_event(event), number(stream)); });
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  return call("cudaEventQuery", [&](Machine& machine) { return machine.query(as_event(event)); });
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  return call("cudaEventElapsedTime", [&](Machine& machine) {
    return machine.elapsed_ms(as_event(begin), as_event(end), milliseconds);
  });
}

// -- copies
cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t nbytes, cudaMemcpyKind, cudaStream_t stream) {
  return call("cudaMemcpyAsync", [&](Machine& machine) {
    return machine.copy(number(stream), number(dst), number(src), nbytes);
  });
}

// Copies of a batch have no order among them.
static cudaError_t copy_batch(void* const* dst, const void* const* src, const size_t* sizes, size_t count,
                              const cudaMemcpyAttributes* attributes, const size_t* attributes_from,
                              size_t num_attributes, cudaStream_t stream) {
  return call("cudaMemcpyBatchAsync", [&](Machine& machine) {
    if (stream == nullptr || num_attributes != 1 || attributes_from[0] != 0 ||
        attributes->srcAccessOrder != cudaMemcpySrcAccessOrderStream)
      return cudaErrorInvalidValue;
    for (const size_t i : machine.any_order(count)) {
      const cudaError_t error = machine.copy(number(stream), number(dst[i]), number(src[i]), sizes[i]);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  });
}
#if CUDART_VERSION >= 13000
cudaError_t cudaMemcpyBatchAsync(void* const* dst, const void* const* src, const size_t* sizes, size_t count,
                                 cudaMemcpyAttributes* attributes, size_t* attributes_from,
                                 size_t num_attributes, cudaStream_t stream) {
  return copy_batch(dst, src, sizes, count, attributes, attributes_from, num_attributes, stream);
}
#else
cudaError_t cudaMemcpyBatchAsync(void** dst, void** src, size_t* sizes, size_t count,
                                 cudaMemcpyAttributes* attributes, size_t* attributes_from,
                                 size_t num_attributes, size_t*, cudaStream_t stream) {
  return copy_batch(dst, src, sizes, count, attributes, attributes_from, num_attributes, stream);
}
#endif

}  // extern "C"
