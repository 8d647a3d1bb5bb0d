// SPDX-License-Identifier: Apache-2.0
// The pools of csrc/ as a run uses them, from many threads at once, for builds with a sanitizer: what
// Python's lock would keep apart meets here. scripts/sanitize.sh builds and runs it. Exits with 1 where bytes
// or digests are wrong.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/device_pool.h"
#include "cuda/model_runtime.h"
#include "host/pack.h"

namespace moetion {
namespace {

constexpr int kCallers = 4;
constexpr int kRounds = 12;

std::atomic<int> num_wrong{0};

void expect(bool is_right, const char* what) {
  if (is_right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  num_wrong.fetch_add(1);
}

int64_t address_of(const void* memory) {
  return reinterpret_cast<int64_t>(memory);
}

// Chunks of `target` that are put together from parts of `source`, with gaps. Each vector is exactly as long
// as what is read or written, so that one byte too many is out of bounds.
struct Case {
  std::vector<uint8_t> source, target;
  std::vector<Piece> pieces, back;
  std::vector<Chunk> chunks;
  std::vector<Span> spans;
  std::vector<uint64_t> digests;

  explicit Case(std::mt19937& random, int64_t most_bytes) {
    std::uniform_int_distribution<int64_t> size(1, most_bytes), gap(0, 200);
    std::vector<int64_t> sizes(3 + random() % 6);
    int64_t total = 0;
    for (int64_t& nbytes : sizes) total += nbytes = size(random);
    source.resize(static_cast<size_t>(total));
    for (uint8_t& byte : source) byte = static_cast<uint8_t>(random());
    std::vector<int64_t> offsets;
    int64_t end = 0;
    for (const int64_t nbytes : sizes) {
      offsets.push_back(end + gap(random));
      end = offsets.back() + nbytes;
    }
    target.resize(static_cast<size_t>(end));
    int64_t from = 0, at = 0;
    for (size_t p = 0; p < sizes.size(); ++p) {  // one chunk for each two pieces
      pieces.push_back({address_of(source.data()) + from, address_of(target.data()) + offsets[p], sizes[p]});
      back.push_back({pieces[p].dst, pieces[p].src, sizes[p]});
      from += sizes[p];
      if (p % 2 == 0 && p + 1 < sizes.size()) continue;
      const int64_t first = static_cast<int64_t>(p - p % 2), stop = offsets[p] + sizes[p];
      chunks.push_back(
          {address_of(target.data()) + at, stop - at, first, static_cast<int64_t>(p) + 1 - first});
      spans.push_back({chunks.back().dst, chunks.back().nbytes});
      at = stop;
    }
    digests.resize(chunks.size());
  }

  template <typename Row>
  static Table<Row> table(const std::vector<Row>& rows) {
    return {rows.data(), static_cast<int64_t>(rows.size())};
  }

  // Whether the target holds what was packed, with zeros in the gaps.
  bool is_packed() const {
    std::vector<uint8_t> wanted(target.size());
    for (const Piece& piece : pieces)
      std::memcpy(wanted.data() + (piece.dst - address_of(target.data())),
                  source.data() + (piece.src - address_of(source.data())), static_cast<size_t>(piece.nbytes));
    return wanted == target;
  }
};

// Several callers share a pool, as the threads of a rank do: pack, verify, scatter; one is cancelled now and
// then.
void use_host_pool(HostPool& pool, unsigned seed) {
  std::mt19937 random(seed);
  for (int round = 0; round < kRounds; ++round) {
    Case one(random, round % 3 == 0 ? 400'000 : 3'000);
    std::atomic<bool> cancel{false};
    std::thread canceller;
    if (round % 4 == 3) canceller = std::thread([&] { cancel.store(true, std::memory_order_relaxed); });
    const bool is_whole =
        pool.pack(Case::table(one.pieces), Case::table(one.chunks), one.digests.data(), &cancel);
    if (canceller.joinable()) canceller.join();
    if (!is_whole) {
      expect(cancel.load(), "a pack that nobody cancelled is not whole");
      continue;
    }
    expect(one.is_packed(), "bytes of a pack");
    std::vector<uint64_t> again(one.spans.size());
    pool.digest(Case::table(one.spans), again.data());
    expect(again == one.digests, "digests of what was packed");
    const std::vector<uint8_t> before = one.source;
    std::fill(one.source.begin(), one.source.end(), 0);
    pool.scatter(Case::table(one.back));
    expect(one.source == before, "bytes of a scatter");
    pool.copy(Case::table(one.pieces), Case::table(one.chunks), round % 2 == 0);
    expect(one.is_packed(), "bytes of a plain copy");
  }
}

// Waits for a free slot: the pool has fewer of them than callers.
template <typename Call>
int64_t enqueued(const Call& call) {
  for (;;) {
    try {
      return call();
    } catch (const std::invalid_argument& error) {
      if (std::string(error.what()).find("slots of the pool are in use") == std::string::npos) throw;
      std::this_thread::yield();
    }
  }
}

void use_device_pool(DevicePool& pool, HostPool& host, unsigned seed) {
  std::mt19937 random(seed);
  const Stream stream = seed % 2, other = 7;
  for (int round = 0; round < kRounds; ++round) {
    Case one(random, round % 3 == 0 ? 40'000 : 900);
    const int64_t copy_engine_bytes = round % 2 ? kNoCopyEngine : 1;
    const int64_t ticket = enqueued([&] {
      return pool.pack(Case::table(one.pieces), Case::table(one.chunks), copy_engine_bytes, stream);
    });
    pool.order_after(other, ticket);
    pool.order(other, stream);
    while (!pool.wait(ticket, 0.0001)) std::this_thread::yield();
    expect(pool.num_rows(ticket) == static_cast<int64_t>(one.chunks.size()), "rows of a ticket");
    expect(pool.device_seconds(ticket) >= 0, "seconds of a ticket");
    pool.multiprocessors(ticket);
    pool.finish(ticket, one.digests.data(), 60);
    expect(one.is_packed(), "bytes of a pack on a device");
    std::vector<uint64_t> again(one.spans.size());
    host.digest(Case::table(one.spans), again.data());
    expect(again == one.digests, "digests on a device and on the host");
    const std::vector<uint8_t> before = one.source;
    std::fill(one.source.begin(), one.source.end(), 0);
    const int64_t scatter =
        enqueued([&] { return pool.scatter(Case::table(one.back), copy_engine_bytes, stream); });
    pool.finish(scatter, nullptr, 60);
    expect(one.source == before, "bytes of a scatter on a device");
    const std::unique_ptr<PinnedMemory> pinned = pool.pin(4096);
    std::memset(pinned->data(), 1, 4096);
    pool.register_host(address_of(one.target.data()), static_cast<int64_t>(one.target.size()))->close();
    pool.check_spans_are_here(Case::table(one.spans));
  }
}

// What is packed again and again from pieces that are on the device already.
void use_uploaded_pieces(unsigned seed) {
  std::mt19937 random(seed);
  PoolOptions options;
  options.max_chunks = 16;
  DevicePool pool(make_runtime("model:0", "", seed), options);
  for (int round = 0; round < kRounds; ++round) {
    Case one(random, 5'000);
    std::vector<UploadedChunk> chunks;
    for (const Chunk& chunk : one.chunks)
      chunks.push_back({chunk.dst, chunk.nbytes, chunk.first_piece, chunk.num_pieces, chunk.dst});
    pool.upload_pieces(Case::table(one.pieces), 60);
    const int64_t ticket = pool.pack_uploaded(Case::table(chunks), 1, 0);
    pool.finish(ticket, one.digests.data(), 60);
    expect(one.is_packed(), "bytes of a pack of uploaded pieces");
  }
}

template <typename Call>
void from_many_threads(const Call& call) {
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < kCallers; ++t) threads.emplace_back([&call, t] { call(t + 1); });
  for (std::thread& thread : threads) thread.join();
}

void run() {
  for (const std::string& isa : available_isas()) {
    HostPool pool(3, isa);
    from_many_threads([&](unsigned seed) { use_host_pool(pool, seed); });
  }
  from_many_threads([](unsigned) { HostPool(4, "scalar"); });  // made and ended at the same time
  for (const uint64_t seed : {0, 1, 2, 3}) {                   // 0: all that is enqueued happens at once
    HostPool host(2, "auto");
    PoolOptions options;
    options.max_pieces = options.max_chunks = 16;
    options.is_timed = options.takes_census = true;
    DevicePool pool(make_runtime("model:0", "", seed), options);
    from_many_threads([&](unsigned caller) { use_device_pool(pool, host, caller); });
  }
  from_many_threads(use_uploaded_pieces);
}

}  // namespace
}  // namespace moetion

int main() {
  moetion::run();
  std::printf("%d wrong\n", moetion::num_wrong.load());
  return moetion::num_wrong.load() ? 1 : 0;
}
