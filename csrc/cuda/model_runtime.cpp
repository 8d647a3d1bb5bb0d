// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime.h"

namespace moetion {
namespace {

struct HostLanes {
  static constexpr int kStep = 1;
  static constexpr int first() { return 0; }
};

template <bool kDigest>
void run_tiles(const Job& job) {
  for (int64_t tile = job.num_tiles - 1; tile >= 0; --tile) {  // backwards: no order may be relied on
    DigestSum sum;
    const int64_t row = pack_tile<HostLanes, kDigest>(job, tile, sum);
    if (kDigest) job.sums[row] += sum.value();
  }
}

class ModelRuntime final : public Runtime {
 public:
  explicit ModelRuntime(const std::string& fault) : fault_(fault) {
    if (fault != "" && fault != "register" && fault != "launch" && fault != "late" && fault != "gate" &&
        fault != "wait")
      throw std::invalid_argument("fault is '" + fault +
                                  "'; it must be '', register, launch, late, gate or wait");
  }

  std::string name() const override { return "model"; }
  int num_sms() const override { return 4; }
  std::string copy_engine() const override { return "memcpy"; }

  void* allocate(size_t nbytes) override { return take(nbytes); }
  void free(void* memory) noexcept override { std::free(memory); }
  void* allocate_pinned(size_t nbytes) override { return take(nbytes); }
  void free_pinned(void* memory) noexcept override { std::free(memory); }
  void register_host(void*, size_t) override {
    if (fault_ == "register") throw DeviceError("cudaHostRegister: operation not supported (injected)");
  }
  void unregister_host(void*) noexcept override {}
  std::string misplaced(int64_t, int64_t) override { return ""; }

  Event make_event() override {
    std::lock_guard<std::mutex> lock(mutex_);
    questions_.push_back(0);
    return questions_.size() - 1;
  }
  void destroy_event(Event) noexcept override {}
  void record(Event event, Stream) override {
    std::lock_guard<std::mutex> lock(mutex_);
    questions_[event] = fault_ == "late" ? kQuestions : 0;
  }
  bool is_done(Event event) override {
    std::lock_guard<std::mutex> lock(mutex_);
    return questions_[event] == 0 || --questions_[event] == 0;
  }
  void wait(Stream, Event) override {
    if (fault_ == "wait") throw DeviceError("cudaStreamWaitEvent: invalid resource handle (injected)");
  }

  void copy(const CopyRow* rows, size_t num_rows, Stream) override {
    for (size_t i = 0; i < num_rows; ++i)
      std::memcpy(reinterpret_cast<void*>(rows[i].dst), reinterpret_cast<const void*>(rows[i].src),
                  static_cast<size_t>(rows[i].nbytes));
  }
  void launch(const Job& job, bool digest, int, Stream) override {
    if (fault_ == "launch") throw DeviceError("kernel launch: invalid device function (injected)");
    if (fault_ == "gate" && job.num_tiles > 0)
      while (*reinterpret_cast<const volatile uint8_t*>(job.pieces[0].src) == 0)
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (digest)
      run_tiles<true>(job);
    else
      run_tiles<false>(job);
  }

 private:
  static void* take(size_t nbytes) {
    void* const memory = std::calloc(1, nbytes);
    if (memory == nullptr) throw DeviceError("out of memory: " + std::to_string(nbytes) + " bytes");
    return memory;
  }
  static constexpr int kQuestions = 200;
  const std::string fault_;
  std::mutex mutex_;
  std::vector<int> questions_;  // by event: how often it must still be asked for
};

}  // namespace

std::unique_ptr<Runtime> make_model_runtime(const std::string& fault) {
  return std::make_unique<ModelRuntime>(fault);
}

}  // namespace moetion
