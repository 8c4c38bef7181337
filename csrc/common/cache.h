// What the processor's caches make of rows that are read side by side.
#pragma once
#include <cstdint>

namespace lgk {

// Whether of rows `stride` bytes apart, one line of each, more fall into one set of the cache than it has room for.
bool crowd_a_set(int64_t rows, int64_t stride);

// Whether much that is fetched at once arrives sooner when only the L2 cache is to have it. So on AMD's Zen 4, whose L1
// cache waits for few lines at a time; Zen 5 drops more of such fetches. Nothing else was measured.
bool fetches_into_l2();

}  // namespace lgk
