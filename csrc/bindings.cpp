// SPDX-License-Identifier: Apache-2.0
// megatron_moetion._C: addresses and tables in, digests out. No torch headers: one build serves any torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <stdexcept>
#include <string>

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
          py::arg("streaming") = false)
      .def(
          "prefault",
          [](HostPool& self, int64_t address, int64_t nbytes) {
            py::gil_scoped_release unlocked;
            self.prefault({address, nbytes});
          },
          py::arg("address"), py::arg("nbytes"));
}
