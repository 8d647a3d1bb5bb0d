// SPDX-License-Identifier: Apache-2.0
// Checks of the tables, made before any byte moves. Each throws std::invalid_argument with row and values.
#pragma once

#include "../segment.h"
#include "table.h"

namespace moetion {

// Chunks are disjoint; each one's pieces lie inside it, in order of destination, without overlap.
void check_pack(Table<Piece> pieces, Table<Chunk> chunks);
void check_spans(Table<Span> spans);
void check_disjoint_spans(Table<Span> spans);
void check_scatter(Table<Piece> pieces);

}  // namespace moetion
