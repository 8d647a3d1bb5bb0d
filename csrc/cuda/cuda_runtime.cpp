// SPDX-License-Identifier: Apache-2.0
#include "runtime.h"

#if defined(MOETION_WITH_CUDA)

#include <cuda_runtime_api.h>

#include <mutex>
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

class CudaRuntime final : public Runtime {
 public:
  explicit CudaRuntime(int device) : device_(device) {
    int count = 0;
    check(cudaGetDeviceCount(&count), "looking for CUDA devices");
    if (device < 0 || device >= count)
      throw DeviceError("cuda:" + std::to_string(device) + " is not there; this machine shows " +
                        std::to_string(count) + " device(s)");
    int driver = 0;
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    check(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    batch_copy_ = kHasBatchCopy && driver >= kBatchCopyDriver;
  }

  std::string name() const override { return "cuda:" + std::to_string(device_); }
  int num_sms() const override { return num_sms_; }
  std::string copy_engine() const override {
    return batch_copy_ ? "cudaMemcpyBatchAsync" : "cudaMemcpyAsync";
  }

  void* allocate(size_t nbytes) override {
    use();
    void* memory = nullptr;
    check(cudaMalloc(&memory, nbytes), "cudaMalloc of " + std::to_string(nbytes) + " bytes on " + name());
    return memory;
  }
  void free(void* memory) noexcept override { (void)cudaFree(memory); }
  void* allocate_pinned(size_t nbytes) override {
    use();
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, nbytes, cudaHostAllocPortable | cudaHostAllocMapped),
          "cudaHostAlloc of " + std::to_string(nbytes) + " bytes");
    return memory;
  }
  void free_pinned(void* memory) noexcept override { (void)cudaFreeHost(memory); }
  void register_host(void* memory, size_t nbytes) override {
    use();
    check(cudaHostRegister(memory, nbytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
          "cudaHostRegister of " + std::to_string(nbytes) + " bytes");
    void* seen = nullptr;
    const cudaError_t error = cudaHostGetDevicePointer(&seen, memory, 0);
    if (error == cudaSuccess && seen == memory) return;
    unregister_host(memory);
    check(error, "cudaHostGetDevicePointer");
    throw DeviceError("the device sees registered host memory at another address");
  }
  void unregister_host(void* memory) noexcept override { (void)cudaHostUnregister(memory); }
  std::string misplaced(int64_t address, int64_t nbytes) override {
    use();
    for (const int64_t at : {address, address + nbytes - 1}) {
      cudaPointerAttributes found = {};
      check(cudaPointerGetAttributes(&found, pointer(at)), "cudaPointerGetAttributes");
      if (found.type == cudaMemoryTypeUnregistered) return "ordinary host memory";
      if (found.type == cudaMemoryTypeDevice && found.device != device_)
        return "memory of cuda:" + std::to_string(found.device);
    }
    return "";
  }

  Event make_event() override {
    use();
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
    return reinterpret_cast<Event>(event);
  }
  void destroy_event(Event event) noexcept override { (void)cudaEventDestroy(as_event(event)); }
  void record(Event event, Stream stream) override {
    use();
    check(cudaEventRecord(as_event(event), as_stream(stream)), "cudaEventRecord");
  }
  bool is_done(Event event) override {
    const cudaError_t error = cudaEventQuery(as_event(event));
    if (error == cudaErrorNotReady) return (void)cudaGetLastError(), false;
    check(error, "waiting on " + name());
    return true;
  }
  void wait(Stream stream, Event event) override {
    use();
    check(cudaStreamWaitEvent(as_stream(stream), as_event(event), 0), "cudaStreamWaitEvent");
  }

  void copy(const CopyRow* rows, size_t num_rows, Stream stream) override {
    if (num_rows == 0) return;
    use();
#if CUDART_VERSION >= 12080
    if (batch_copy_ && stream != 0 && num_rows > 1) return copy_batch(rows, num_rows, stream);
#endif
    for (const CopyRow* row = rows; row != rows + num_rows; ++row)
      check(cudaMemcpyAsync(pointer(row->dst), pointer(row->src), static_cast<size_t>(row->nbytes),
                            cudaMemcpyDefault, as_stream(stream)),
            "cudaMemcpyAsync");
  }

  void launch(const Job& job, bool digest, int num_sms, Stream stream) override {
    use();
    check(launch_pack(job, digest, num_sms, as_stream(stream)), "kernel launch");
  }

 private:
  void use() { check(cudaSetDevice(device_), "cudaSetDevice"); }

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
