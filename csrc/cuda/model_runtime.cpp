// SPDX-License-Identifier: Apache-2.0
#include "model_runtime.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>

namespace moetion {
namespace {

constexpr const char* kFaults[] = {"register", "memory", "launch", "copy", "wait",
                                   "no-wait",  "sticky", "late",   "gate"};
constexpr int64_t kLateQuestions = 200;
constexpr Stream kFirstStream = 1000;  // of those made here; a test may use any other number

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

void run_kernel(const Job& job, bool digest, int num_sms) {
  if (job.sms != nullptr)
    for (int64_t block = 0; block < blocks_of(job.num_tiles, num_sms); ++block)
      job.sms[block] = static_cast<uint32_t>(block);
  if (digest)
    run_tiles<true>(job);
  else
    run_tiles<false>(job);
}

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t address_of(const void* memory) {
  return reinterpret_cast<int64_t>(memory);
}

int64_t parse_count(const std::string& fault, const std::string& digits) {
  const bool is_number = !digits.empty() && digits.size() < 16 &&
                         digits.find_first_not_of("0123456789") == std::string::npos &&
                         std::stoll(digits) > 0;
  if (!is_number)
    throw std::invalid_argument("fault is '" + fault + "'; N of NAME:N must be a positive number");
  return std::stoll(digits);
}

}  // namespace

ModelRuntime::ModelRuntime(const std::string& fault, uint64_t seed)
    : fault_(fault.substr(0, fault.find(':'))),
      is_lazy_(seed != 0),
      random_(seed),
      reached_{true} {
  if (std::find(std::begin(kFaults), std::end(kFaults), fault_) == std::end(kFaults) && fault != "") {
    std::string names;
    for (const char* const name : kFaults) names += std::string(", ") + name;
    throw std::invalid_argument("fault is '" + fault + "'; it must be ''" + names +
                                ", or one of them as NAME:N");
  }
  if (fault_ == "gate" && is_lazy_) throw std::invalid_argument("fault gate needs seed 0: it reads at once");
  const size_t colon = fault.find(':');
  if (fault_ == "late") fault_from_ = kLateQuestions;
  if (colon != std::string::npos) fault_from_ = parse_count(fault, fault.substr(colon + 1));
}

ModelRuntime::~ModelRuntime() {
  for (const auto& block : memory_)
    std::free(block.first);  // what was never given back, with a reason or without
}

void ModelRuntime::count(const std::string& kind, const std::string& call, const std::string& error) {
  const int64_t number = ++num_calls_[kind], number_of_all = ++num_calls_["sticky"];
  if (fault_ == kind && number >= fault_from_) throw DeviceError(call + ": " + error + " (injected)");
  if (fault_ == "sticky" && number_of_all >= fault_from_)
    throw DeviceError(call + ": an illegal memory access was encountered (injected)");
}

void* ModelRuntime::allocate(size_t nbytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::string call = "allocation of " + std::to_string(nbytes) + " bytes";
  count("memory", call, "out of memory");
  void* const memory = std::calloc(1, nbytes);
  if (memory == nullptr) throw DeviceError(call + ": out of memory");
  memory_[memory] = nbytes;
  return memory;
}

void ModelRuntime::free(void* memory) noexcept {
  if (memory == nullptr) return;
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t begin = address_of(memory), end = begin + static_cast<int64_t>(memory_[memory]);
  for (const auto& queue : queues_)
    for (const Task& task : queue.second)
      for (const Block& block : task.memory)
        if (block.address < end && begin < block.address + block.nbytes) {
          std::fprintf(stderr, "model: memory is given back that work still to be done uses\n");
          std::abort();
        }
  memory_.erase(memory);
  std::free(memory);
}

void ModelRuntime::register_host(void*, size_t) {
  std::lock_guard<std::mutex> lock(mutex_);
  count("register", "cudaHostRegister", "operation not supported");
}

std::string ModelRuntime::misplaced(int64_t, int64_t) {
  std::lock_guard<std::mutex> lock(mutex_);
  count("place", "cudaPointerGetAttributes", "");
  return "";
}

Stream ModelRuntime::make_stream() {
  std::lock_guard<std::mutex> lock(mutex_);
  count("stream", "cudaStreamCreate", "");
  return kFirstStream + num_streams_++;
}

Event ModelRuntime::make_event(bool) {
  std::lock_guard<std::mutex> lock(mutex_);
  count("event", "cudaEventCreate", "");
  events_.emplace_back();
  return events_.size();  // 0 is no event
}

void ModelRuntime::record(Event event, Stream stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  count("record", "cudaEventRecord", "");
  EventState& state = events_[event - 1];
  const size_t mark = reached_.size();
  reached_.push_back(false);
  state.mark = static_cast<int64_t>(mark);
  state.questions = fault_ == "late" ? fault_from_ : 0;
  enqueue(stream, {[this, event, mark] {
            reached_[mark] = true;
            events_[event - 1].reached_at_s = now_s();
          }});
}

bool ModelRuntime::is_done(Event event) {
  std::lock_guard<std::mutex> lock(mutex_);
  count("query", "cudaEventQuery", "");
  EventState& state = events_[event - 1];
  if (state.questions > 0 && --state.questions > 0) return false;
  return run_until([&] { return reached_[static_cast<size_t>(state.mark)]; }, is_lazy_);
}

void ModelRuntime::wait(Stream stream, Event event) {
  std::lock_guard<std::mutex> lock(mutex_);
  count("wait", "cudaStreamWaitEvent", "invalid resource handle");
  const bool is_ignored = fault_ == "no-wait" && num_calls_["wait"] == fault_from_;
  enqueue(stream, {[] {}, {}, is_ignored ? 0 : events_[event - 1].mark});
}

double ModelRuntime::seconds_between(Event begin, Event end) {
  std::lock_guard<std::mutex> lock(mutex_);
  count("time", "cudaEventElapsedTime", "");
  return events_[end - 1].reached_at_s - events_[begin - 1].reached_at_s;
}

void ModelRuntime::copy(const CopyRow* rows, size_t num_rows, Stream stream) {
  if (num_rows == 0) return;
  std::lock_guard<std::mutex> lock(mutex_);
  count("copy", "cudaMemcpyAsync", "invalid argument");
  for (const CopyRow* row = rows; row != rows + num_rows; ++row)
    enqueue(stream, {[row = *row] {
                       std::memcpy(reinterpret_cast<void*>(row.dst), reinterpret_cast<const void*>(row.src),
                                   static_cast<size_t>(row.nbytes));
                     },
                     {{row->dst, row->nbytes}, {row->src, row->nbytes}}});
}

void ModelRuntime::launch(const Job& job, bool digest, int num_sms, Stream stream) {
  if (fault_ == "gate" && job.num_tiles > 0)
    while (*reinterpret_cast<const volatile uint8_t*>(job.pieces[0].src) == 0)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::lock_guard<std::mutex> lock(mutex_);
  count("launch", "kernel launch", "invalid device function");
  enqueue(stream, {[job, digest, num_sms] { run_kernel(job, digest, num_sms); },
                   {{address_of(job.pieces), 1},
                    {address_of(job.work), job.num_rows * static_cast<int64_t>(sizeof(Work))},
                    {address_of(job.sums), job.num_rows * static_cast<int64_t>(sizeof(uint64_t))}}});
}

void ModelRuntime::fill(Stream stream, int64_t address, uint8_t value, int64_t nbytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  enqueue(stream, {[address, value, nbytes] {
                     std::memset(reinterpret_cast<void*>(address), value, static_cast<size_t>(nbytes));
                   },
                   {{address, nbytes}}});
}

void ModelRuntime::sync(Stream stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  run_until([&] { return queues_[stream].empty(); }, false);
}

void ModelRuntime::enqueue(Stream stream, Task task) {
  queues_[stream].push_back(std::move(task));
  if (!is_lazy_ && fault_ != "late") run_until([] { return false; }, false);
}

std::vector<Stream> ModelRuntime::shuffled_streams() {
  std::vector<Stream> streams;
  for (const auto& queue : queues_) streams.push_back(queue.first);
  std::shuffle(streams.begin(), streams.end(), random_);
  return streams;
}

bool ModelRuntime::step(const std::vector<Stream>& order) {
  for (const Stream stream : order) {
    std::deque<Task>& queue = queues_[stream];
    if (queue.empty() || !reached_[static_cast<size_t>(queue.front().after_mark)]) continue;
    const Task task = std::move(queue.front());
    queue.pop_front();
    task.run();
    return true;
  }
  return false;
}

template <typename Condition>
bool ModelRuntime::run_until(const Condition& is_over, bool may_stop) {
  std::vector<Stream> order = shuffled_streams();
  const bool keeps_order = random_() % 2 == 0;  // then one stream runs as far as it can before the next
  while (!is_over()) {
    if (may_stop && random_() % 8 == 0) return false;
    if (!step(order)) return false;
    if (!keeps_order) order = shuffled_streams();
  }
  return true;
}

}  // namespace moetion
