// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../segment.h"

namespace moetion {

// Rows that belong to the caller and must stay unchanged during a call.
template <typename Row>
struct Table {
  const Row* rows;
  int64_t num_rows;
};

}  // namespace moetion
