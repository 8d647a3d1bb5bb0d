// SPDX-License-Identifier: Apache-2.0
// Threads that stay, so that a pack pays for a wake-up and not for a thread.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>

namespace moetion {

class ThreadPool {
 public:
  // The calling thread is one of `num_threads`. Throws std::invalid_argument unless it is in 1..1024.
  explicit ThreadPool(int num_threads);
  // Joins the workers. In a forked child, where they do not exist, their state is abandoned instead.
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Calls task(0), ..., task(num_tasks - 1), each once, on whichever thread is free, then `at_end` once on
  // each thread that ran a task; returns when all have. Neither may throw. Concurrent callers take turns in
  // the order in which they call. Throws std::runtime_error in a forked child.
  void run(int64_t num_tasks, const std::function<void(int64_t)>& task, const std::function<void()>& at_end);

 private:
  struct State;
  const pid_t owner_;
  std::unique_ptr<State> state_;
};

}  // namespace moetion
