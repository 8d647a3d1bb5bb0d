// SPDX-License-Identifier: Apache-2.0
#include "runtime.h"

#if defined(MOETION_WITH_CUDA)

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cctype>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"

namespace moetion {
namespace {

#if CUDART_VERSION >= 12080
constexpr bool kHasBatchCopy = true;
constexpr int kBatchCopyDriver = 12080;
#else
constexpr bool kHasBatchCopy = false;
constexpr int kBatchCopyDriver = 0;
#endif

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // clears an error that is not sticky, which else another call would return
  throw DeviceError(what + ": " + cudaGetErrorString(error));
}

cudaStream_t as_stream(Stream stream) {
  return reinterpret_cast<cudaStream_t>(stream);
}
cudaEvent_t as_event(Event event) {
  return reinterpret_cast<cudaEvent_t>(event);
}
void* pointer(int64_t address) {
  return reinterpret_cast<void*>(address);
}

// Around all calls of the driver: on the device, and harmless to another thread's capture of a CUDA graph,
// which an event query or an allocation would else invalidate. The device stays set: a thread that never set
// one seems to have device 0, and setting that would make a context there.
class OnDevice {
 public:
  // Throws DeviceError if the device cannot be set.
  explicit OnDevice(int device) : OnDevice(device, std::nothrow) { check(error_, "cudaSetDevice"); }
  OnDevice(int device, std::nothrow_t) noexcept : error_(cudaSetDevice(device)) {
    is_relaxed_ = cudaThreadExchangeStreamCaptureMode(&mode_) == cudaSuccess;
  }
  ~OnDevice() {
    if (is_relaxed_) (void)cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  const cudaError_t error_;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
  bool is_relaxed_ = false;
};

class CudaRuntime final : public Runtime {
 public:
  explicit CudaRuntime(int device) : device_(device) {
    int count = 0;
    check(cudaGetDeviceCount(&count), "looking for CUDA devices");
    if (device < 0 || device >= count)
      throw DeviceError("cuda:" + std::to_string(device) + " is not there; this machine shows " +
                        std::to_string(count) + " device(s)");
    const OnDevice scope(device_);
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    check(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    char bus[32] = {};
    check(cudaDeviceGetPCIBusId(bus, sizeof(bus), device), "cudaDeviceGetPCIBusId");
    pci_bus_id_ = bus;
    std::transform(pci_bus_id_.begin(), pci_bus_id_.end(), pci_bus_id_.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    batch_copy_ = kHasBatchCopy && driver >= kBatchCopyDriver;
  }

  std::string name() const override { return "cuda:" + std::to_string(device_); }
  int num_sms() const override { return num_sms_; }
  std::string copy_engine() const override {
    return batch_copy_ ? "cudaMemcpyBatchAsync" : "cudaMemcpyAsync";
  }
  std::string pci_bus_id() const override { return pci_bus_id_; }

  void* allocate(size_t nbytes) override {
    const OnDevice scope(device_);
    void* memory = nullptr;
    check(cudaMalloc(&memory, nbytes), "cudaMalloc of " + std::to_string(nbytes) + " bytes");
    return memory;
  }
  void free(void* memory) noexcept override {
    const OnDevice scope(device_, std::nothrow);
    (void)cudaFree(memory);
  }
  void* allocate_pinned(size_t nbytes) override {
    const OnDevice scope(device_);
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, nbytes, cudaHostAllocPortable | cudaHostAllocMapped),
          "cudaHostAlloc of " + std::to_string(nbytes) + " bytes");
    return memory;
  }
  void free_pinned(void* memory) noexcept override {
    const OnDevice scope(device_, std::nothrow);
    (void)cudaFreeHost(memory);
  }
  void register_host(void* memory, size_t nbytes) override {
    const OnDevice scope(device_);
    check(cudaHostRegister(memory, nbytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
          "cudaHostRegister");
    void* seen = nullptr;
    const cudaError_t error = cudaHostGetDevicePointer(&seen, memory, 0);
    if (error == cudaSuccess && seen == memory) return;
    (void)cudaHostUnregister(memory);
    check(error, "cudaHostGetDevicePointer");
    throw DeviceError("the device sees registered host memory at another address");
  }
  void unregister_host(void* memory) noexcept override {
    const OnDevice scope(device_, std::nothrow);
    (void)cudaHostUnregister(memory);
  }
  std::string misplaced(int64_t address, int64_t nbytes) override {
    const OnDevice scope(device_);
    for (const int64_t at : {address, address + nbytes - 1}) {
      cudaPointerAttributes found = {};
      check(cudaPointerGetAttributes(&found, pointer(at)), "cudaPointerGetAttributes");
      if (found.type == cudaMemoryTypeUnregistered) return "ordinary host memory";
      if (found.type == cudaMemoryTypeDevice && found.device != device_)
        return "memory of cuda:" + std::to_string(found.device);
    }
    return "";
  }

  Stream make_stream() override {
    const OnDevice scope(device_);
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    return reinterpret_cast<Stream>(stream);
  }
  void destroy_stream(Stream stream) noexcept override {
    if (stream == 0) return;
    const OnDevice scope(device_, std::nothrow);
    (void)cudaStreamDestroy(as_stream(stream));
  }
  Event make_event(bool is_timed) override {
    const OnDevice scope(device_);
    cudaEvent_t event = nullptr;
    const unsigned flags = is_timed ? cudaEventDefault : cudaEventDisableTiming;
    check(cudaEventCreateWithFlags(&event, flags), "cudaEventCreate");
    return reinterpret_cast<Event>(event);
  }
  void destroy_event(Event event) noexcept override {
    if (event == 0) return;
    const OnDevice scope(device_, std::nothrow);
    (void)cudaEventDestroy(as_event(event));
  }
  void record(Event event, Stream stream) override {
    const OnDevice scope(device_);
    check(cudaEventRecord(as_event(event), as_stream(stream)), "cudaEventRecord");
  }
  bool is_done(Event event) override {
    const OnDevice scope(device_);
    const cudaError_t error = cudaEventQuery(as_event(event));
    if (error == cudaErrorNotReady) return (void)cudaGetLastError(), false;
    check(error, "cudaEventQuery");
    return true;
  }
  void wait(Stream stream, Event event) override {
    const OnDevice scope(device_);
    check(cudaStreamWaitEvent(as_stream(stream), as_event(event), 0), "cudaStreamWaitEvent");
  }
  double seconds_between(Event begin, Event end) override {
    const OnDevice scope(device_);
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, as_event(begin), as_event(end)), "cudaEventElapsedTime");
    return double{milliseconds} / 1e3;
  }

  void copy(const CopyRow* rows, size_t num_rows, Stream stream) override {
    if (num_rows == 0) return;
    const OnDevice scope(device_);
#if CUDART_VERSION >= 12080
    if (batch_copy_ && stream != 0 && num_rows > 1) return copy_batch(rows, num_rows, stream);
#endif
    for (const CopyRow* row = rows; row != rows + num_rows; ++row)
      check(cudaMemcpyAsync(pointer(row->dst), pointer(row->src), static_cast<size_t>(row->nbytes),
                            cudaMemcpyDefault, as_stream(stream)),
            "cudaMemcpyAsync");
  }

  void launch(const Job& job, bool digest, int num_sms, Stream stream) override {
    const OnDevice scope(device_);
    check(launch_pack(job, digest, num_sms, as_stream(stream)), "kernel launch");
  }

 private:
#if CUDART_VERSION >= 12080
  // One call for all rows; it reads the arrays before it returns.
  void copy_batch(const CopyRow* rows, size_t num_rows, Stream stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    dst_.clear(), src_.clear(), sizes_.clear();
    for (const CopyRow* row = rows; row != rows + num_rows; ++row) {
      dst_.push_back(pointer(row->dst));
      src_.push_back(pointer(row->src));
      sizes_.push_back(static_cast<size_t>(row->nbytes));
    }
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    size_t first = 0;
    check(
        batch_copy(dst_.data(), src_.data(), sizes_.data(), num_rows, &attributes, &first, as_stream(stream)),
        "cudaMemcpyBatchAsync of " + std::to_string(num_rows) + " copies");
  }

  // CUDA 13 dropped the argument that tells which copy failed.
  static cudaError_t batch_copy(void** dst, void** src, size_t* sizes, size_t count,
                                cudaMemcpyAttributes* attributes, size_t* first, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
    return cudaMemcpyBatchAsync(dst, src, sizes, count, attributes, first, 1, stream);
#else
    size_t failed = 0;
    return cudaMemcpyBatchAsync(dst, src, sizes, count, attributes, first, 1, &failed, stream);
#endif
  }

  std::mutex mutex_;
  std::vector<void*> dst_, src_;
  std::vector<size_t> sizes_;
#endif

  const int device_;
  int num_sms_ = 0;
  std::string pci_bus_id_;
  bool batch_copy_ = false;
};

}  // namespace

std::unique_ptr<Runtime> make_cuda_runtime(int device) {
  return std::make_unique<CudaRuntime>(device);
}
bool built_with_cuda() {
  return true;
}

}  // namespace moetion

#else

namespace moetion {

std::unique_ptr<Runtime> make_cuda_runtime(int) {
  throw DeviceError(
      "this build of megatron_moetion has no CUDA kernels; build it where nvcc is, with MOETION_CUDA=1");
}
bool built_with_cuda() {
  return false;
}

}  // namespace moetion

#endif
