// SPDX-License-Identifier: Apache-2.0
#include "host_memory.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace moetion {
namespace {

size_t checked(int64_t nbytes) {
  if (nbytes < 1)
    throw std::invalid_argument("nbytes is " + std::to_string(nbytes) + "; it must be at least 1");
  return static_cast<size_t>(nbytes);
}

}  // namespace

PinnedMemory::PinnedMemory(std::shared_ptr<Runtime> runtime, int64_t nbytes)
    : runtime_(std::move(runtime)), memory_(runtime_->allocate_pinned(checked(nbytes))) {}

PinnedMemory::~PinnedMemory() {
  runtime_->free_pinned(memory_);
}

Registration::Registration(std::shared_ptr<Runtime> runtime, int64_t address, int64_t nbytes)
    : runtime_(std::move(runtime)), memory_(reinterpret_cast<void*>(address)) {
  runtime_->register_host(memory_, static_cast<size_t>(nbytes));
}

Registration::~Registration() {
  close();
}

void Registration::close() {
  if (memory_ != nullptr) runtime_->unregister_host(memory_);
  memory_ = nullptr;
}

}  // namespace moetion
