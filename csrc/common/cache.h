// What the processor's L1 cache makes of rows that are read side by side.
#pragma once
#include <cstdint>

namespace lgk {

// Whether of rows `stride` bytes apart, one line of each, more fall into one set of the cache than it has room for.
bool crowd_a_set(int64_t rows, int64_t stride);

}  // namespace lgk
