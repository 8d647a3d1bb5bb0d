// SPDX-License-Identifier: Apache-2.0
// What tests call by ctypes: memory of a device, what training enqueues, faults, and what the machine noted.
#include <algorithm>
#include <cstring>

#include "machine.h"

using emulator::Machine;
using emulator::Place;

#define CONTROL extern "C" __attribute__((visibility("default")))

namespace {

template <typename Body>
auto locked(const Body& body) {
  Machine& machine = Machine::get();
  std::lock_guard<std::mutex> lock(machine.mutex);
  return body(machine);
}

}  // namespace

CONTROL void emulator_reset(unsigned seed) {
  locked([&](Machine& machine) { machine.reset(seed); });
}

// -- training's part
CONTROL uint64_t emulator_allocate(uint64_t nbytes, int device) {
  return locked([&](Machine& machine) { return machine.allocate(nbytes, Place::kDevice, device); });
}
CONTROL uint64_t emulator_make_stream(int device) {
  return locked([&](Machine& machine) { return machine.make_stream(device); });
}
CONTROL void emulator_fill(uint64_t stream, uint64_t address, int value, uint64_t nbytes) {
  locked([&](Machine& machine) {
    return machine.enqueue(stream, [=] {
      memset(reinterpret_cast<void*>(address), value, nbytes);
      return cudaSuccess;
    });
  });
}
CONTROL bool emulator_drain(uint64_t stream) {
  return locked([&](Machine& machine) { return machine.drain(stream); });
}
CONTROL void emulator_begin_capture() {
  locked([](Machine& machine) { machine.begin_capture(); });
}
CONTROL bool emulator_end_capture() {
  return locked([](Machine& machine) { return machine.end_capture(); });
}

// -- the machine's part
CONTROL bool emulator_choose_kernels(const char* variant) {
  locked([&](Machine& machine) { machine.choose_kernels(variant); });
  return emulator::has_kernels(variant);
}
CONTROL void emulator_fail_call(const char* call, int64_t nth, int error) {
  locked([&](Machine& machine) { machine.fail_call(call, nth, static_cast<cudaError_t>(error)); });
}
CONTROL void emulator_fail_kernel(int64_t nth) {
  locked([&](Machine& machine) { machine.fail_kernel(nth); });
}
CONTROL void emulator_skip_wait(int64_t nth) {
  locked([&](Machine& machine) { machine.skip_wait(nth); });
}
CONTROL int emulator_query_carelessly() {
  return cudaEventQuery(nullptr);
}
CONTROL void emulator_stall(bool is_stalled) {
  locked([&](Machine& machine) { machine.stall(is_stalled); });
}
CONTROL int emulator_capture_mode() {
  return locked([](Machine& machine) {
    const cudaStreamCaptureMode mode = machine.exchange_capture_mode(cudaStreamCaptureModeRelaxed);
    machine.exchange_capture_mode(mode);
    return static_cast<int>(mode);
  });
}
CONTROL int64_t emulator_num_violations() {
  return locked([](Machine& machine) { return static_cast<int64_t>(machine.violations().size()); });
}
CONTROL void emulator_violation(int64_t number, char* text, uint64_t size) {
  locked([&](Machine& machine) {
    const std::string& found = machine.violations().at(static_cast<size_t>(number));
    const size_t length = std::min(found.size(), static_cast<size_t>(size) - 1);
    memcpy(text, found.data(), length);
    text[length] = 0;
  });
}
