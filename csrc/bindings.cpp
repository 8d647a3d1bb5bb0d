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

#include "cuda/device_pool.h"
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

Op op_of(const std::string& name) {
  if (name == "copy") return Op::kCopy;
  if (name == "scale") return Op::kScale;
  if (name == "bf16") return Op::kBf16;
  throw std::invalid_argument("op is '" + name + "'; it must be copy, scale or bf16");
}

// "cuda:0" or "model:0".
std::shared_ptr<Runtime> runtime_of(const std::string& device, const std::string& fault) {
  const size_t colon = device.find(':');
  const std::string kind = device.substr(0, colon);
  if (kind == "model") return make_model_runtime(fault);
  const std::string number = colon == std::string::npos ? "" : device.substr(colon + 1);
  if (kind != "cuda" || number.empty() || number.size() > 4 ||
      number.find_first_not_of("0123456789") != std::string::npos)
    throw std::invalid_argument("device is '" + device + "'; it must be cuda:N or model:N");
  return make_cuda_runtime(std::stoi(number));
}

// uint8[nbytes] that ends with its last view; the runtime stays as long.
py::array_t<uint8_t> pinned(const std::shared_ptr<Runtime>& runtime, int64_t nbytes) {
  struct Owner {
    std::shared_ptr<Runtime> runtime;
    void* memory;
    ~Owner() { runtime->free_pinned(memory); }
  };
  if (nbytes < 1)
    throw std::invalid_argument("nbytes is " + std::to_string(nbytes) + "; it must be at least 1");
  auto owner =
      std::unique_ptr<Owner>(new Owner{runtime, runtime->allocate_pinned(static_cast<size_t>(nbytes))});
  auto* const memory = static_cast<uint8_t*>(owner->memory);
  const py::capsule capsule(owner.release(), [](void* p) { delete static_cast<Owner*>(p); });
  return py::array_t<uint8_t>(nbytes, memory, capsule);
}

// Host memory that the device may read and write, until `close`.
class Registration {
 public:
  Registration(std::shared_ptr<Runtime> runtime, int64_t address, int64_t nbytes)
      : runtime_(std::move(runtime)), memory_(reinterpret_cast<void*>(address)) {
    runtime_->register_host(memory_, static_cast<size_t>(nbytes));
  }
  ~Registration() { close(); }
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;
  void close() {
    if (memory_ != nullptr) runtime_->unregister_host(memory_);
    memory_ = nullptr;
  }

 private:
  const std::shared_ptr<Runtime> runtime_;
  void* memory_;
};

void bind_device_pool(py::module_& m) {
  m.def("built_with_cuda", &built_with_cuda);
  py::register_exception<DeviceError>(m, "DeviceError", PyExc_RuntimeError);

  py::class_<Registration>(m, "Registration").def("close", &Registration::close);

  py::class_<DevicePool>(m, "DevicePool")
      .def(py::init([](const std::string& device, int rank, int64_t max_pieces, int64_t max_chunks,
                       int num_slots, int num_sms, const std::string& fault) {
             return std::make_unique<DevicePool>(runtime_of(device, fault), rank, max_pieces, max_chunks,
                                                 num_slots, num_sms);
           }),
           py::arg("device"), py::kw_only(), py::arg("rank"), py::arg("max_pieces"), py::arg("max_chunks"),
           py::arg("num_slots") = 2, py::arg("num_sms") = 8, py::arg("fault") = "")
      .def_property_readonly("device", [](const DevicePool& self) { return self.runtime()->name(); })
      .def_property_readonly("copy_engine",
                             [](const DevicePool& self) { return self.runtime()->copy_engine(); })
      .def_property_readonly("num_sms", &DevicePool::num_sms)
      .def_property_readonly("num_slots", &DevicePool::num_slots)
      .def_property_readonly("bytes_by_copy_engine", &DevicePool::bytes_by_copy_engine)
      .def(
          "pack",
          [](DevicePool& self, const Rows& pieces, const Rows& chunks, Stream stream, const std::string& op,
             float scale, std::optional<int64_t> copy_engine_bytes) {
            PackOptions options;
            options.op = op_of(op);
            options.scale = scale;
            if (copy_engine_bytes) options.copy_engine_bytes = *copy_engine_bytes;
            const auto piece_table = table<Piece>("pieces", pieces);
            const auto chunk_table = table<Chunk>("chunks", chunks);
            py::gil_scoped_release unlocked;
            return self.pack(piece_table, chunk_table, options, stream);
          },
          py::arg("pieces").noconvert(), py::arg("chunks").noconvert(), py::kw_only(), py::arg("stream") = 0,
          py::arg("op") = "copy", py::arg("scale") = 1.0f, py::arg("copy_engine_bytes") = py::none())
      .def(
          "keep",
          [](DevicePool& self, const Rows& pieces) {
            const auto piece_table = table<Piece>("pieces", pieces);
            py::gil_scoped_release unlocked;
            self.keep(piece_table);
          },
          py::arg("pieces").noconvert())
      .def(
          "pack_kept",
          [](DevicePool& self, const Rows& chunks, Stream stream, std::optional<int64_t> copy_engine_bytes) {
            PackOptions options;
            if (copy_engine_bytes) options.copy_engine_bytes = *copy_engine_bytes;
            const auto chunk_table = table<KeptChunk>("chunks", chunks);
            py::gil_scoped_release unlocked;
            return self.pack_kept(chunk_table, options, stream);
          },
          py::arg("chunks").noconvert(), py::kw_only(), py::arg("stream") = 0,
          py::arg("copy_engine_bytes") = py::none())
      .def(
          "scatter",
          [](DevicePool& self, const Rows& pieces, Stream stream, std::optional<int64_t> copy_engine_bytes) {
            const auto piece_table = table<Piece>("pieces", pieces);
            py::gil_scoped_release unlocked;
            return self.scatter(piece_table, copy_engine_bytes.value_or(PackOptions::kNever), stream);
          },
          py::arg("pieces").noconvert(), py::kw_only(), py::arg("stream") = 0,
          py::arg("copy_engine_bytes") = py::none())
      .def(
          "digest",
          [](DevicePool& self, const Rows& chunks, Stream stream) {
            const auto spans = table<Span>("chunks", chunks);
            py::gil_scoped_release unlocked;
            return self.digest(spans, stream);
          },
          py::arg("chunks").noconvert(), py::kw_only(), py::arg("stream") = 0)
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
      // These enqueue, and wait for others that do: without the GIL, which those may need.
      .def("order", &DevicePool::order, py::arg("later"), py::arg("earlier"),
           py::call_guard<py::gil_scoped_release>())
      .def("order_after", &DevicePool::order_after, py::arg("later"), py::arg("ticket"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "check_spans_are_here",
          [](DevicePool& self, const Rows& spans) { self.check_spans_are_here(table<Span>("spans", spans)); },
          py::arg("spans").noconvert())
      .def(
          "pinned", [](const DevicePool& self, int64_t nbytes) { return pinned(self.runtime(), nbytes); },
          py::arg("nbytes"))
      .def(
          "register",
          [](const DevicePool& self, int64_t address, int64_t nbytes) {
            return std::make_unique<Registration>(self.runtime(), address, nbytes);
          },
          py::arg("address"), py::arg("nbytes"));
}

}  // namespace
}  // namespace moetion

PYBIND11_MODULE(_C, m) {
  using namespace moetion;
  m.doc() = "Pack kernels of MoEtion. See _C.pyi.";
  m.attr("FORMAT_DIGEST_VERSION") = kDigestVersion;
  m.def("available_isas", &available_isas);

  py::class_<Cancel>(m, "Cancel")
      .def(py::init<>())
      .def("set", [](Cancel& self) { self.flag.store(true, std::memory_order_relaxed); })
      .def("clear", [](Cancel& self) { self.flag.store(false, std::memory_order_relaxed); })
      .def("is_set", [](const Cancel& self) { return self.flag.load(std::memory_order_relaxed); });

  py::class_<HostPool>(m, "HostPool")
      .def(py::init<int, const std::string&>(), py::arg("num_threads"), py::arg("isa") = "auto")
      .def_property_readonly("isa", &HostPool::isa)
      .def_property_readonly("num_threads", &HostPool::num_threads)
      .def(
          "pack",
          [](HostPool& self, const Rows& pieces, const Rows& chunks, Digests& digests, const Cancel* cancel,
             const std::string& op, float scale) {
            const Op what = op_of(op);
            const auto piece_table = table<Piece>("pieces", pieces);
            const auto chunk_table = table<Chunk>("chunks", chunks);
            uint64_t* const out = results(digests, chunk_table.num_rows);
            py::gil_scoped_release unlocked;
            return self.pack(piece_table, chunk_table, out, cancel ? &cancel->flag : nullptr, what, scale);
          },
          py::arg("pieces").noconvert(), py::arg("chunks").noconvert(), py::arg("digests").noconvert(),
          py::arg("cancel").none(true) = py::none(), py::kw_only(), py::arg("op") = "copy",
          py::arg("scale") = 1.0f)
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
          py::arg("streaming") = false)
      .def(
          "prefault",
          [](HostPool& self, int64_t address, int64_t nbytes) {
            py::gil_scoped_release unlocked;
            self.prefault({address, nbytes});
          },
          py::arg("address"), py::arg("nbytes"));

  bind_device_pool(m);
}
