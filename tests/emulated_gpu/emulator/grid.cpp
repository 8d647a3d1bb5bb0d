// SPDX-License-Identifier: Apache-2.0
#include "grid.h"

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <memory>
#include <numeric>
#include <sstream>

namespace emulator {
namespace {

constexpr int kLanes = moetion::kWarpLanes;
constexpr size_t kStackBytes = 256 << 10;  // a kernel's registers are all on it
constexpr int kNowhere = -1;

std::vector<Span> merged(std::vector<Span> spans) {
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  std::vector<Span> result;
  for (const Span& span : spans) {
    if (!result.empty() && span.begin <= result.back().end)
      result.back().end = std::max(result.back().end, span.end);
    else
      result.push_back(span);
  }
  return result;
}

bool contains(const std::vector<Span>& spans, size_t& last, Span span) {
  const auto is_inside = [&](const Span& outer) {
    return outer.begin <= span.begin && span.end <= outer.end;
  };
  if (last < spans.size() && is_inside(spans[last])) return true;
  const auto after = std::upper_bound(spans.begin(), spans.end(), span.begin,
                                      [](uint64_t begin, const Span& other) { return begin < other.begin; });
  if (after == spans.begin()) return false;
  last = static_cast<size_t>(after - spans.begin()) - 1;
  return is_inside(spans[last]);
}

}  // namespace

JobMemory::JobMemory(const Launch& launch, const std::function<bool(Span)>& is_on_device)
    : is_on_device_(is_on_device) {
  const moetion::Job& job = launch.job;
  add(reads_, job.work, job.num_rows * static_cast<int64_t>(sizeof(moetion::Work)), "the table of rows");
  add(writes_, job.sums, job.num_rows * static_cast<int64_t>(sizeof(uint64_t)), "the table of sums");
  if (job.sms != nullptr)
    add(writes_, job.sms, launch.num_blocks * static_cast<int64_t>(sizeof(uint32_t)), "the table of SMs");
  for (int64_t r = 0; r < job.num_rows; ++r) {
    const moetion::Work& row = job.work[r];
    if (row.stores) add(writes_, reinterpret_cast<const void*>(row.dst), row.nbytes, "a destination");
    const moetion::Piece* const first = job.pieces + row.first_piece;
    add(reads_, first, row.num_pieces * static_cast<int64_t>(sizeof(moetion::Piece)), "the table of pieces");
    for (const moetion::Piece* piece = first; piece != first + row.num_pieces; ++piece)
      add(reads_, reinterpret_cast<const void*>(piece->src), piece->nbytes, "a source");
  }
  reads_ = merged(reads_);
  writes_ = merged(writes_);
}

void JobMemory::add(std::vector<Span>& to, const void* begin, int64_t nbytes, const char* what) {
  if (nbytes == 0) return;
  const uint64_t address = reinterpret_cast<uint64_t>(begin);
  const Span span = {address, address + static_cast<uint64_t>(nbytes)};
  if (nbytes < 0 || !is_on_device_(span)) {
    std::ostringstream text;
    text << what << ", " << nbytes << " bytes at " << begin << ", is not memory that the device sees";
    throw IllegalAccess(text.str());
  }
  to.push_back(span);
}

bool JobMemory::allows(uint64_t address, uint64_t nbytes, Access access) {
  const Span span = {address, address + nbytes};
  return access == Access::kRead ? contains(reads_, last_read_, span)
                                 : contains(writes_, last_written_, span);
}

// 32 lanes, each a fiber: it runs until its shuffle or its end, then the next one runs.
class Warp {
 public:
  explicit Warp(JobMemory& memory) : memory_(memory) {
    for (int i = 0; i < kLanes; ++i) {
      Fiber& fiber = fibers_[static_cast<size_t>(i)];
      fiber.stack.reset(new char[kStackBytes]);
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = kStackBytes;
      const uintptr_t self = reinterpret_cast<uintptr_t>(this);  // makecontext passes on int only
      makecontext(&fiber.start, reinterpret_cast<void (*)()>(enter), 3, static_cast<unsigned>(self >> 32),
                  static_cast<unsigned>(self), i);
    }
  }

  void run(const Launch& launch, unsigned block, unsigned warp, uint32_t sm) {
    kernel_ = launch.kernel;
    for (int i = 0; i < kLanes; ++i) {
      Fiber& fiber = fibers_[static_cast<size_t>(i)];
      fiber.lane = {warp * kLanes + static_cast<unsigned>(i),
                    launch.num_threads,
                    block,
                    launch.num_blocks,
                    sm,
                    reinterpret_cast<const uint8_t*>(&launch.job),
                    this,
                    i};
      fiber.is_finished = false;
      fiber.site = kNowhere;
    }
    for (;;) {
      int num_finished = 0;
      for (Fiber& fiber : fibers_) {
        if (!fiber.is_finished) resume(fiber);
        if (!error_.empty()) throw IllegalAccess(error_);
        num_finished += fiber.is_finished;
      }
      if (num_finished == kLanes) return;
      for (Fiber& fiber : fibers_) {
        if (fiber.is_finished || fiber.site != fibers_[0].site)
          throw IllegalAccess("the lanes of a warp do not meet at a shuffle");
        fiber.met_value = fiber.value;
      }
    }
  }

  void check(const Lane& lane, uint64_t address, uint64_t nbytes, uint64_t alignment, Access access) {
    const char* const what = access == Access::kRead ? "read" : "write";
    if (address % alignment != 0) refuse(lane, "a misaligned ", what, address, nbytes);
    if (!memory_.allows(address, nbytes, access)) refuse(lane, "outside the job: a ", what, address, nbytes);
  }

  uint32_t meet(Lane& lane, int site, uint32_t value, uint32_t distance, uint32_t mask) {
    if (mask != UINT32_MAX) throw IllegalAccess("a shuffle of a part of the warp");
    Fiber& fiber = fibers_[static_cast<size_t>(lane.number)];
    fiber.site = site;
    fiber.value = value;
    suspend(fiber);
    return fibers_[static_cast<size_t>(lane.number) ^ (distance & (kLanes - 1))].met_value;
  }

 private:
  struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t start;
    jmp_buf here;
    bool is_started = false, is_finished = false;
    Lane lane;
    int site = kNowhere;
    uint32_t value = 0, met_value = 0;
  };

  // Only the first switch to a fiber is by context: that saves the signal mask, in a call of the kernel.
  void resume(Fiber& fiber) {
    if (_setjmp(owner_) != 0) return;
    if (fiber.is_started) _longjmp(fiber.here, 1);
    fiber.is_started = true;
    setcontext(&fiber.start);
  }
  void suspend(Fiber& fiber) {
    if (_setjmp(fiber.here) == 0) _longjmp(owner_, 1);
  }

  static void enter(unsigned high, unsigned low, int number) {
    Warp& self = *reinterpret_cast<Warp*>(static_cast<uintptr_t>(high) << 32 | low);
    Fiber& fiber = self.fibers_[static_cast<size_t>(number)];
    for (;;) {  // one warp of the grid after the other
      try {
        self.kernel_->run(fiber.lane);
      } catch (const IllegalAccess& error) {
        self.error_ = error.what();
      }
      fiber.is_finished = true;
      self.suspend(fiber);
    }
  }

  [[noreturn]] static void refuse(const Lane& lane, const char* kind, const char* what, uint64_t address,
                                  uint64_t nbytes) {
    std::ostringstream text;
    text << kind << what << " of " << nbytes << " bytes at " << std::hex << std::showbase << address
         << std::dec << " by thread " << lane.thread << " of block " << lane.block;
    throw IllegalAccess(text.str());
  }

  JobMemory& memory_;
  const Kernel* kernel_ = nullptr;
  std::array<Fiber, kLanes> fibers_;
  jmp_buf owner_;
  std::string error_;
};

void check_access(Lane& lane, uint64_t address, uint64_t nbytes, uint64_t alignment, Access access) {
  lane.warp->check(lane, address, nbytes, alignment, access);
}

uint32_t shuffle_butterfly(Lane& lane, int site, uint32_t value, uint32_t distance, uint32_t mask) {
  return lane.warp->meet(lane, site, value, distance, mask);
}

void run_grid(const Launch& launch, int num_sms, JobMemory& memory, std::mt19937& random) {
  std::vector<uint32_t> sms(static_cast<size_t>(num_sms));
  std::iota(sms.begin(), sms.end(), 0u);
  std::shuffle(sms.begin(), sms.end(), random);
  const unsigned warps = launch.num_threads / kLanes;
  std::vector<unsigned> order(size_t{launch.num_blocks} * warps);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  Warp warp(memory);
  for (const unsigned number : order) {
    const unsigned block = number / warps;
    warp.run(launch, block, number % warps, sms[block % sms.size()]);
  }
}

}  // namespace emulator
