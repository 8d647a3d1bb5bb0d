// SPDX-License-Identifier: Apache-2.0
#include "validate.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace moetion {
namespace {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text << std::showbase;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

void check_range(const char* what, int64_t row, const char* field, int64_t address, int64_t nbytes) {
  if (nbytes < 0 || (nbytes > 0 && address <= 0) || address > std::numeric_limits<int64_t>::max() - nbytes)
    refuse(what, " ", row, ": ", field, "=", std::hex, address, std::dec, ", nbytes=", nbytes,
           "; the address must be positive and nbytes not negative");
}

// `address(row)` and `rows[row].nbytes` give the ranges. Sorts only what is not sorted already.
template <typename Row, typename Address>
void check_disjoint(const char* what, Table<Row> table, Address address) {
  std::vector<int64_t> order;
  for (int64_t i = 0; i < table.num_rows; ++i)
    if (table.rows[i].nbytes > 0) order.push_back(i);
  const auto before = [&](int64_t a, int64_t b) { return address(table.rows[a]) < address(table.rows[b]); };
  if (!std::is_sorted(order.begin(), order.end(), before)) std::sort(order.begin(), order.end(), before);
  for (size_t i = 1; i < order.size(); ++i) {
    const Row &a = table.rows[order[i - 1]], &b = table.rows[order[i]];
    if (address(a) + a.nbytes > address(b))
      refuse(what, "s ", order[i - 1], " and ", order[i], " overlap: dst=", std::hex, address(a), std::dec,
             " + nbytes=", a.nbytes, " reaches into dst=", std::hex, address(b));
  }
}

void check_piece(const Piece& piece, int64_t row) {
  check_range("piece", row, "src", piece.src, piece.nbytes);
  check_range("piece", row, "dst", piece.dst, piece.nbytes);
}

}  // namespace

void check_pack(Table<Piece> pieces, Table<Chunk> chunks) {
  for (int64_t c = 0; c < chunks.num_rows; ++c) {
    const Chunk& chunk = chunks.rows[c];
    check_range("chunk", c, "dst", chunk.dst, chunk.nbytes);
    if (chunk.first_piece < 0 || chunk.num_pieces < 0 || chunk.first_piece > pieces.num_rows ||
        chunk.num_pieces > pieces.num_rows - chunk.first_piece)
      refuse("chunk ", c, ": first_piece=", chunk.first_piece, ", num_pieces=", chunk.num_pieces,
             "; there are ", pieces.num_rows, " pieces");
    int64_t filled = chunk.dst;
    for (int64_t p = chunk.first_piece; p < chunk.first_piece + chunk.num_pieces; ++p) {
      const Piece& piece = pieces.rows[p];
      check_piece(piece, p);
      if (piece.dst < filled || piece.nbytes > chunk.dst + chunk.nbytes - piece.dst)
        refuse("piece ", p, ": dst=", std::hex, piece.dst, std::dec, ", nbytes=", piece.nbytes,
               "; it must begin at or after ", std::hex, filled,
               " (the end of the piece before) and end at or before ", chunk.dst + chunk.nbytes, std::dec,
               ", the end of chunk ", c);
      filled = piece.dst + piece.nbytes;
    }
  }
  check_disjoint("chunk", chunks, [](const Chunk& chunk) { return chunk.dst; });
}

void check_spans(Table<Span> spans) {
  for (int64_t i = 0; i < spans.num_rows; ++i)
    check_range("chunk", i, "address", spans.rows[i].address, spans.rows[i].nbytes);
}

void check_disjoint_spans(Table<Span> spans) {
  check_spans(spans);
  check_disjoint("chunk", spans, [](const Span& span) { return span.address; });
}

void check_scatter(Table<Piece> pieces) {
  for (int64_t i = 0; i < pieces.num_rows; ++i) check_piece(pieces.rows[i], i);
  check_disjoint("piece", pieces, [](const Piece& piece) { return piece.dst; });
}

}  // namespace moetion
