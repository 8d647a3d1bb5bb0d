// SPDX-License-Identifier: Apache-2.0
#include "machine.h"

#include <chrono>
#include <cstdlib>
#include <numeric>
#include <sstream>
#include <utility>

namespace emulator {
namespace {

// A new device is set in no thread: a call that forgot to would else work by chance, on device 0.
constexpr int kNoDevice = -1;
constexpr uint64_t kDefaultStreams = 1;  // the handle 0 is the default stream of the thread's device

thread_local int thread_device = kNoDevice;
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string shown(uint64_t address, uint64_t nbytes) {
  std::ostringstream text;
  text << nbytes << " bytes at " << std::hex << std::showbase << address;
  return text.str();
}

}  // namespace

Machine& Machine::get() {
  static Machine* const machine = new Machine;  // never destroyed: Python frees pools at any time
  return *machine;
}

Machine::Machine() : random_(1), reached_{true} {
  for (int device = 0; device < kNumDevices; ++device)
    streams_[kDefaultStreams + static_cast<uint64_t>(device)] = {device, false, {}};
}

cudaError_t Machine::enter(const std::string& call) {
  const int64_t number = ++num_calls_[call];
  if (is_capturing_ && capture_mode != cudaStreamCaptureModeRelaxed) {
    is_capture_valid_ = false;
    violate(call + " in a thread that is not in relaxed capture mode ends another one's capture");
    return cudaErrorStreamCaptureUnsupported;
  }
  if (thread_device == kNoDevice) {
    violate(call + " in a thread that set no device");
    return cudaErrorInvalidDevice;
  }
  if (sticky_ != cudaSuccess) return sticky_;
  const auto fault = faults_.find(call);
  return fault != faults_.end() && number >= fault->second.from ? fault->second.error : cudaSuccess;
}

cudaError_t Machine::set_device(int device) {
  if (device < 0 || device >= kNumDevices) return cudaErrorInvalidDevice;
  thread_device = device;
  return sticky_;
}

int Machine::device() const {
  return thread_device;
}

cudaError_t Machine::remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t Machine::take_last_error() {
  const cudaError_t error = last_error;
  last_error = sticky_;
  return error;
}

cudaStreamCaptureMode Machine::exchange_capture_mode(cudaStreamCaptureMode mode) {
  return std::exchange(capture_mode, mode);
}

uint64_t Machine::allocate(uint64_t nbytes, Place place, int device) {
  void* const memory = std::malloc(nbytes);
  memset(memory, place == Place::kDevice ? 0xEE : 0xDD, nbytes);  // not zero, as new memory need not be
  const uint64_t address = reinterpret_cast<uint64_t>(memory);
  blocks_[address] = {address + nbytes, place, device};
  return address;
}

cudaError_t Machine::free(uint64_t address, Place place) {
  if (address == 0) return cudaSuccess;
  const auto found = blocks_.find(address);
  if (found == blocks_.end() || found->second.place != place) {
    violate("memory is freed that was not allocated so, at " + std::to_string(address));
    return cudaErrorInvalidValue;
  }
  if (place == Place::kDevice && found->second.device != thread_device)
    violate("memory of a device is freed in a thread that set another one");
  // The driver waits for all that is enqueued. Where that does not end, nor would the call.
  for (const auto& stream : streams_)
    if (!drain(stream.first)) violate("memory is freed while work is under way that does not end");
  blocks_.erase(found);
  std::free(reinterpret_cast<void*>(address));
  return cudaSuccess;
}

cudaError_t Machine::register_memory(uint64_t address, uint64_t nbytes) {
  const auto next = blocks_.lower_bound(address + nbytes);
  if (next != blocks_.begin() && std::prev(next)->second.end > address)
    return cudaErrorHostMemoryAlreadyRegistered;
  blocks_[address] = {address + nbytes, Place::kRegistered, thread_device};
  return cudaSuccess;
}

cudaError_t Machine::unregister_memory(uint64_t address) {
  const auto found = blocks_.find(address);
  if (found == blocks_.end() || found->second.place != Place::kRegistered)
    return cudaErrorHostMemoryNotRegistered;
  blocks_.erase(found);
  return cudaSuccess;
}

const Block* Machine::find(Span span) const {
  auto after = blocks_.upper_bound(span.begin);
  if (after == blocks_.begin()) return nullptr;
  const Block& block = std::prev(after)->second;
  return span.end <= block.end ? &block : nullptr;
}

uint64_t Machine::make_stream(int device) {
  const uint64_t stream = next_stream_++;
  streams_[stream] = {device, false, {}};
  return stream;
}

// Of the driver too: what is enqueued happens all the same.
cudaError_t Machine::destroy_stream(uint64_t stream) {
  Stream* const found = find_stream(stream);
  if (found == nullptr) return cudaErrorInvalidResourceHandle;
  found->is_destroyed = true;
  return cudaSuccess;
}

Machine::Stream* Machine::find_stream(uint64_t stream) {
  if (stream == 0) return &streams_[kDefaultStreams + static_cast<uint64_t>(std::max(thread_device, 0))];
  const auto found = streams_.find(stream);
  if (found == streams_.end() || found->second.is_destroyed) {
    violate("a stream is used that does not exist: " + std::to_string(stream));
    return nullptr;
  }
  return &found->second;
}

cudaError_t Machine::enqueue(uint64_t stream, std::function<cudaError_t()> work) {
  Stream* const found = find_stream(stream);
  if (found == nullptr) return cudaErrorInvalidResourceHandle;
  found->tasks.push_back({std::move(work)});
  return cudaSuccess;
}

Event* Machine::make_event(bool is_timed) {
  auto event = std::make_shared<Event>(Event{thread_device, is_timed});
  Event* const handle = event.get();
  events_[handle] = std::move(event);
  return handle;
}

cudaError_t Machine::destroy_event(Event* event) {
  return is_usable(event, "cudaEventDestroy") && events_.erase(event) ? cudaSuccess
                                                                      : cudaErrorInvalidResourceHandle;
}

bool Machine::is_usable(const Event* event, const char* call) {
  const auto found = events_.find(const_cast<Event*>(event));
  if (found == events_.end()) {
    violate(std::string(call) + " with an event that does not exist");
    return false;
  }
  if (event->device != thread_device)
    violate(std::string(call) + " in a thread that set another device than the event's");
  return true;
}

cudaError_t Machine::record(Event* event, uint64_t stream) {
  if (!is_usable(event, "cudaEventRecord")) return cudaErrorInvalidResourceHandle;
  const size_t mark = event->mark = reached_.size();
  reached_.push_back(false);
  return enqueue(stream, [this, mark, kept = events_[event]] {
    reached_[mark] = true;
    kept->reached_at_s = now_s();
    return cudaSuccess;
  });
}

cudaError_t Machine::wait(uint64_t stream, Event* event) {
  if (!is_usable(event, "cudaStreamWaitEvent")) return cudaErrorInvalidResourceHandle;
  Stream* const found = find_stream(stream);
  if (found == nullptr) return cudaErrorInvalidResourceHandle;
  if (num_calls_["cudaStreamWaitEvent"] != skipped_wait_)
    found->tasks.push_back({[] { return cudaSuccess; }, event->mark});
  return cudaSuccess;
}

cudaError_t Machine::query(Event* event) {
  if (!is_usable(event, "cudaEventQuery")) return cudaErrorInvalidResourceHandle;
  const size_t mark = event->mark;
  const bool is_reached = run_until([&] { return reached_[mark]; }, true);
  if (sticky_ != cudaSuccess) return sticky_;
  return is_reached ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t Machine::elapsed_ms(Event* begin, Event* end, float* milliseconds) {
  for (const Event* const event : {begin, end}) {
    if (!is_usable(event, "cudaEventElapsedTime") || !event->is_timed) return cudaErrorInvalidResourceHandle;
    if (!reached_[event->mark]) return cudaErrorNotReady;
  }
  *milliseconds = static_cast<float>((end->reached_at_s - begin->reached_at_s) * 1e3);
  return cudaSuccess;
}

cudaError_t Machine::copy(uint64_t stream, uint64_t dst, uint64_t src, uint64_t nbytes) {
  return enqueue(stream, [=] {
    for (const uint64_t address : {dst, src}) {
      if (find({address, address + nbytes}) != nullptr) continue;
      violate("a copy of memory that the device does not see: " + shown(address, nbytes));
      return cudaErrorIllegalAddress;
    }
    memmove(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), nbytes);
    return cudaSuccess;
  });
}

cudaError_t Machine::launch(uint64_t stream, const Launch& launch) {
  if (launch.num_blocks == 0 || launch.num_threads == 0 || launch.num_threads > launch.kernel->max_threads)
    return cudaErrorInvalidConfiguration;
  const Stream* const found = find_stream(stream);
  if (found == nullptr) return cudaErrorInvalidResourceHandle;
  return enqueue(stream, [this, launch, device = found->device] { return run_kernel(launch, device); });
}

cudaError_t Machine::run_kernel(const Launch& launch, int device) {
  if (++num_kernels_ == failing_kernel_) return cudaErrorLaunchFailure;
  const std::function<bool(Span)> is_on_device = [&](Span span) {
    const Block* const block = find(span);
    return block != nullptr && (block->place != Place::kDevice || block->device == device);
  };
  try {
    JobMemory memory(launch, is_on_device);
    run_grid(launch, kNumSms, memory, random_);
  } catch (const IllegalAccess& error) {
    violate(error.what());
    return cudaErrorIllegalAddress;
  }
  return cudaSuccess;
}

std::vector<Machine::Stream*> Machine::shuffled_streams() {
  std::vector<Stream*> streams;
  for (auto& stream : streams_)
    if (!stream.second.tasks.empty()) streams.push_back(&stream.second);
  std::shuffle(streams.begin(), streams.end(), random_);
  return streams;
}

// Does the next task of the first stream that need not wait.
bool Machine::step(const std::vector<Stream*>& order) {
  for (Stream* const stream : order) {
    if (stream->tasks.empty() || !reached_[stream->tasks.front().after_mark]) continue;
    const Task task = std::move(stream->tasks.front());
    stream->tasks.pop_front();
    const cudaError_t error = task.run();
    if (error != cudaSuccess) sticky_ = error;
    return true;
  }
  return false;
}

bool Machine::run_until(const std::function<bool()>& is_over, bool may_stop) {
  std::vector<Stream*> order = shuffled_streams();
  const bool keeps_order = random_() % 2 == 0;  // then one stream runs as far as it can before the next
  while (!is_over()) {
    if (is_stalled_ || sticky_ != cudaSuccess || (may_stop && random_() % 8 == 0)) return false;
    if (!step(order)) return false;
    if (!keeps_order) order = shuffled_streams();
  }
  return true;
}

std::vector<size_t> Machine::any_order(size_t n) {
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), random_);
  return order;
}

bool Machine::drain(uint64_t stream) {
  const Stream& queue = streams_[stream];
  return run_until([&] { return queue.tasks.empty(); }, false) || sticky_ != cudaSuccess;
}

void Machine::reset(unsigned seed) {
  random_.seed(seed);
  for (auto& stream : streams_) stream.second.tasks.clear();
  reached_.assign(reached_.size(), true);  // of work that will never happen, so that nobody waits for it
  num_calls_.clear();
  faults_.clear();
  failing_kernel_ = skipped_wait_ = 0;
  sticky_ = last_error = cudaSuccess;
  is_stalled_ = is_capturing_ = false;
  variant_ = "compute_90";
  violations_.clear();
}

void Machine::fail_call(const std::string& call, int64_t nth, cudaError_t error) {
  faults_[call] = {num_calls_[call] + nth, error};
}

bool Machine::end_capture() {
  is_capturing_ = false;
  return is_capture_valid_;
}

}  // namespace emulator
