// SPDX-License-Identifier: Apache-2.0
#include "thread_pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace moetion {

namespace {

// A mutex that is taken in the order of asking. A thread that locks again and again, as one does that
// verifies a large snapshot in small parts, lets each other thread in after the part that is running.
class Turns {
 public:
  void lock() {
    std::unique_lock<std::mutex> guard(mutex_);
    const uint64_t mine = next_++;
    changed_.wait(guard, [&] { return serving_ == mine; });
  }
  void unlock() {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      ++serving_;
    }
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t next_ = 0, serving_ = 0;
};

}  // namespace

struct ThreadPool::State {
  Turns turn;  // held by the caller whose job runs

  std::mutex mutex;  // guards everything below but `next`
  std::condition_variable wake, done;
  uint64_t job = 0;   // number of the newest job
  bool open = false;  // it may be joined: the caller has not run out of tasks yet
  int active = 0;     // workers that joined it
  bool stop = false;
  int64_t num_tasks = 0;
  const std::function<void(int64_t)>* task = nullptr;
  const std::function<void()>* at_end = nullptr;
  std::atomic<int64_t> next{0};
  std::vector<std::thread> workers;

  void work() {
    bool worked = false;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks; worked = true) (*task)(i);
    if (worked) (*at_end)();
  }

  void stop_and_join() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
    }
    wake.notify_all();
    for (auto& thread : workers) thread.join();
  }

  void worker() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      wake.wait(lock, [&] { return stop || (open && job != seen); });
      if (stop) return;
      seen = job;
      ++active;
      lock.unlock();
      work();
      lock.lock();
      if (--active == 0) done.notify_one();
    }
  }
};

ThreadPool::ThreadPool(int num_threads) : owner_(getpid()), state_(new State) {
  if (num_threads < 1 || num_threads > 1024)
    throw std::invalid_argument("num_threads is " + std::to_string(num_threads) + "; it must be in 1..1024");
  State* state = state_.get();
  state->workers.reserve(static_cast<size_t>(num_threads - 1));
  try {
    for (int i = 1; i < num_threads; ++i) state->workers.emplace_back([state] { state->worker(); });
  } catch (...) {  // no thread to be had: those that started must be joined before their state goes
    state->stop_and_join();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() != owner_) {
    (void)state_.release();
    return;
  }
  state_->stop_and_join();
}

void ThreadPool::run(int64_t num_tasks, const std::function<void(int64_t)>& task,
                     const std::function<void()>& at_end) {
  if (getpid() != owner_)
    throw std::runtime_error("this pool was made in process " + std::to_string(owner_) +
                             "; after a fork its threads are gone: make a new one in the child");
  State& state = *state_;
  std::lock_guard<Turns> turn(state.turn);
  {
    std::lock_guard<std::mutex> lock(state.mutex);
    state.num_tasks = num_tasks;
    state.task = &task;
    state.at_end = &at_end;
    state.next.store(0, std::memory_order_relaxed);
    state.open = num_tasks > 1;
    ++state.job;
  }
  if (num_tasks > 1) state.wake.notify_all();
  state.work();
  std::unique_lock<std::mutex> lock(state.mutex);
  state.open = false;  // a worker that wakes up only now is not waited for
  state.done.wait(lock, [&] { return state.active == 0; });
}

}  // namespace moetion
