// SPDX-License-Identifier: Apache-2.0
// megatron_moetion._C: addresses and tables in, digests out. No torch headers: one build serves any torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/device_pool.h"
#include "cuda/host_memory.h"
#include "cuda/model_runtime.h"
#include "host/pack.h"

namespace py = pybind11;

namespace moetion {
namespace {

using Rows = py::array_t<int64_t, py::array::c_style>;
using Digests = py::array_t<uint64_t, py::array::c_style>;

struct Cancel {
  std::atomic<bool> flag{false};
};

template <typename Row>
Table<Row> table(const char* name, const Rows& rows) {
  constexpr py::ssize_t kFields = sizeof(Row) / sizeof(int64_t);
  if (rows.ndim() != 2 || rows.shape(1) != kFields || reinterpret_cast<uintptr_t>(rows.data()) % alignof(Row))
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(rows.ndim()) +
                                " dimensions; it must be an aligned int64 array of shape [n, " +
                                std::to_string(kFields) + "]");
  return {reinterpret_cast<const Row*>(rows.data()), rows.shape(0)};
}

uint64_t* results(Digests& digests, int64_t num_chunks) {
  if (digests.ndim() != 1 || digests.shape(0) != num_chunks ||
      reinterpret_cast<uintptr_t>(digests.data()) % alignof(uint64_t))
    throw std::invalid_argument(
        "digests holds " + std::to_string(digests.size()) + " values in " + std::to_string(digests.ndim()) +
        " dimensions; it must be an aligned array of " + std::to_string(num_chunks) + ", one for each chunk");
  return digests.mutable_data();  // throws for a read-only array
}

// Ends a pool, which may wait for the device, while other threads of Python run.
struct EndUnlocked {
  void operator()(DevicePool* pool) const {
    py::gil_scoped_release unlocked;
    delete pool;
  }
};

std::unique_ptr<DevicePool, EndUnlocked> make_pool(const std::string& device, const PoolOptions& options,
                                                   const std::string& fault, uint64_t seed) {
  std::shared_ptr<Runtime> runtime;
  try {
    runtime = make_runtime(device, fault, seed);
  } catch (const DeviceError& error) {
    throw DeviceError("rank " + std::to_string(options.rank) + ": " + error.what());
  }
  return std::unique_ptr<DevicePool, EndUnlocked>(new DevicePool(std::move(runtime), options));
}

// uint8[nbytes] that ends with its last view.
py::array_t<uint8_t> pinned(DevicePool& pool, int64_t nbytes) {
  std::unique_ptr<PinnedMemory> owner;
  {
    py::gil_scoped_release unlocked;
    owner = pool.pin(nbytes);
  }
  uint8_t* const memory = owner->data();
  const py::capsule capsule(owner.release(), [](void* p) { delete static_cast<PinnedMemory*>(p); });
  return py::array_t<uint8_t>(nbytes, memory, capsule);
}

// Throws std::invalid_argument for a pool of a real device.
ModelRuntime& model_of(const DevicePool& pool) {
  auto* const model = dynamic_cast<ModelRuntime*>(pool.runtime().get());
  if (model == nullptr) throw std::invalid_argument(pool.runtime()->name() + " is not a model of a device");
  return *model;
}

void bind_host_pool(py::module_& m) {
  py::class_<Cancel>(m, "Cancel")
      .def(py::init<>())
      .def("set", [](Cancel& self) { self.flag.store(true, std::memory_order_relaxed); })
      .def("clear", [](Cancel& self) { self.flag.store(false, std::memory_order_relaxed); })
      .def("is_set", [](const Cancel& self) { return self.flag.load(std::memory_order_relaxed); });

  py::class_<HostPool>(m, "HostPool")
      .def(py::init<int, const std::string&>(), py::arg("num_threads"), py::arg("isa") = "auto")
      .def_property_readonly("isa", &HostPool::isa)
      .def(
          "pack",
          [](HostPool& self, const Rows& pieces, const Rows& chunks, Digests& digests, const Cancel* cancel) {
            const auto piece_table = table<Piece>("pieces", pieces);
            const auto chunk_table = table<Chunk>("chunks", chunks);
            uint64_t* const out = results(digests, chunk_table.num_rows);
            py::gil_scoped_release unlocked;
            return self.pack(piece_table, chunk_table, out, cancel ? &cancel->flag : nullptr);
          },
          py::arg("pieces").noconvert(), py::arg("chunks").noconvert(), py::arg("digests").noconvert(),
          py::arg("cancel").none(true) = py::none())
      .def(
          "digest",
          [](HostPool& self, const Rows& chunks, Digests& digests) {
            const auto spans = table<Span>("chunks", chunks);
            uint64_t* const out = results(digests, spans.num_rows);
            py::gil_scoped_release unlocked;
            self.digest(spans, out);
          },
          py::arg("chunks").noconvert(), py::arg("digests").noconvert())
      .def(
          "scatter",
          [](HostPool& self, const Rows& pieces) {
            const auto piece_table = table<Piece>("pieces", pieces);
            py::gil_scoped_release unlocked;
            self.scatter(piece_table);
          },
          py::arg("pieces").noconvert())
      .def(
          "copy",
          [](HostPool& self, const Rows& pieces, const Rows& chunks, bool streaming) {
            const auto piece_table = table<Piece>("pieces", pieces);
            const auto chunk_table = table<Chunk>("chunks", chunks);
            py::gil_scoped_release unlocked;
            self.copy(piece_table, chunk_table, streaming);
          },
          py::arg("pieces").noconvert(), py::arg("chunks").noconvert(), py::kw_only(),
          py::arg("streaming") = false);
}

void bind_device_pool(py::module_& m) {
  m.def("built_with_cuda", &built_with_cuda);
  const py::object error = py::register_exception<DeviceError>(m, "DeviceError", PyExc_RuntimeError);
  py::register_exception<DeviceLate>(m, "DeviceLate", error);

  py::class_<Registration>(m, "Registration")
      .def("close", &Registration::close, py::call_guard<py::gil_scoped_release>());

  py::class_<DevicePool, std::unique_ptr<DevicePool, EndUnlocked>>(m, "DevicePool")
      .def(py::init([](const std::string& device, int rank, int64_t max_pieces, int64_t max_chunks,
                       int num_slots, int num_sms, bool timed, bool census, double last_wait_s,
                       const std::string& fault, uint64_t seed) {
             PoolOptions options;
             options.rank = rank;
             options.max_pieces = max_pieces;
             options.max_chunks = max_chunks;
             options.num_slots = num_slots;
             options.num_sms = num_sms;
             options.is_timed = timed;
             options.takes_census = census;
             options.last_wait_s = last_wait_s;
             py::gil_scoped_release unlocked;
             return make_pool(device, options, fault, seed);
           }),
           py::arg("device"), py::kw_only(), py::arg("rank"), py::arg("max_pieces"), py::arg("max_chunks"),
           py::arg("num_slots") = 2, py::arg("num_sms") = 4, py::arg("timed") = false,
           py::arg("census") = false, py::arg("last_wait_s") = 10.0, py::arg("fault") = "",
           py::arg("seed") = 0)
      .def_property_readonly("copy_engine",
                             [](const DevicePool& self) { return self.runtime()->copy_engine(); })
      .def_property_readonly("num_sms", &DevicePool::num_sms)
      .def_property_readonly("pci_bus_id",
                             [](const DevicePool& self) { return self.runtime()->pci_bus_id(); })
      .def(
          "pack",
          [](DevicePool& self, const Rows& pieces, const Rows& chunks, Stream stream,
             std::optional<int64_t> copy_engine_bytes) {
            const auto piece_table = table<Piece>("pieces", pieces);
            const auto chunk_table = table<Chunk>("chunks", chunks);
            py::gil_scoped_release unlocked;
            return self.pack(piece_table, chunk_table, copy_engine_bytes.value_or(kNoCopyEngine), stream);
          },
          py::arg("pieces").noconvert(), py::arg("chunks").noconvert(), py::kw_only(), py::arg("stream") = 0,
          py::arg("copy_engine_bytes") = py::none())
      .def(
          "upload_pieces",
          [](DevicePool& self, const Rows& pieces, double timeout_s) {
            const auto piece_table = table<Piece>("pieces", pieces);
            py::gil_scoped_release unlocked;
            self.upload_pieces(piece_table, timeout_s);
          },
          py::arg("pieces").noconvert(), py::kw_only(), py::arg("timeout_s") = 60.0)
      .def(
          "pack_uploaded",
          [](DevicePool& self, const Rows& chunks, Stream stream, std::optional<int64_t> copy_engine_bytes) {
            const auto chunk_table = table<UploadedChunk>("chunks", chunks);
            py::gil_scoped_release unlocked;
            return self.pack_uploaded(chunk_table, copy_engine_bytes.value_or(kNoCopyEngine), stream);
          },
          py::arg("chunks").noconvert(), py::kw_only(), py::arg("stream") = 0,
          py::arg("copy_engine_bytes") = py::none())
      .def(
          "scatter",
          [](DevicePool& self, const Rows& pieces, Stream stream, std::optional<int64_t> copy_engine_bytes) {
            const auto piece_table = table<Piece>("pieces", pieces);
            py::gil_scoped_release unlocked;
            return self.scatter(piece_table, copy_engine_bytes.value_or(kNoCopyEngine), stream);
          },
          py::arg("pieces").noconvert(), py::kw_only(), py::arg("stream") = 0,
          py::arg("copy_engine_bytes") = py::none())
      .def("wait", &DevicePool::wait, py::arg("ticket"), py::kw_only(), py::arg("timeout_s"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "finish",
          [](DevicePool& self, int64_t ticket, std::optional<Digests> digests, double timeout_s) {
            int64_t num_rows = 0;
            {
              py::gil_scoped_release unlocked;
              num_rows = self.num_rows(ticket);
            }
            uint64_t* const out = digests ? results(*digests, num_rows) : nullptr;
            py::gil_scoped_release unlocked;
            self.finish(ticket, out, timeout_s);
          },
          py::arg("ticket"), py::arg("digests").noconvert() = py::none(), py::kw_only(),
          py::arg("timeout_s") = 60.0)
      .def("device_seconds", &DevicePool::device_seconds, py::arg("ticket"),
           py::call_guard<py::gil_scoped_release>())
      .def("multiprocessors", &DevicePool::multiprocessors, py::arg("ticket"),
           py::call_guard<py::gil_scoped_release>())
      // These enqueue, and wait for others that do: without the GIL, which those may need.
      .def("order", &DevicePool::order, py::arg("later"), py::arg("earlier"),
           py::call_guard<py::gil_scoped_release>())
      .def("order_after", &DevicePool::order_after, py::arg("later"), py::arg("ticket"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "check_spans_are_here",
          [](DevicePool& self, const Rows& spans) {
            const auto span_table = table<Span>("spans", spans);
            py::gil_scoped_release unlocked;
            self.check_spans_are_here(span_table);
          },
          py::arg("spans").noconvert())
      .def("pinned", &pinned, py::arg("nbytes"))
      .def("register", &DevicePool::register_host, py::arg("address"), py::arg("nbytes"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "model_fill",
          [](const DevicePool& self, Stream stream, int64_t address, uint8_t value, int64_t nbytes) {
            model_of(self).fill(stream, address, value, nbytes);
          },
          py::arg("stream"), py::arg("address"), py::arg("value"), py::arg("nbytes"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "model_copy",
          [](const DevicePool& self, Stream stream, int64_t source, int64_t destination, int64_t nbytes) {
            const CopyRow row = {destination, source, nbytes};
            model_of(self).copy(&row, 1, stream);
          },
          py::arg("stream"), py::arg("source"), py::arg("destination"), py::arg("nbytes"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "model_sync", [](const DevicePool& self, Stream stream) { model_of(self).sync(stream); },
          py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace
}  // namespace moetion

PYBIND11_MODULE(_C, m) {
  using namespace moetion;
  m.doc() = "Pack kernels of MoEtion. See _C.pyi.";
  m.attr("FORMAT_DIGEST_VERSION") = kDigestVersion;
  m.def("available_isas", &available_isas);
  bind_host_pool(m);
  bind_device_pool(m);
}
