// How many threads a job is worth.
#pragma once
#include <algorithm>
#include <cstdint>

namespace lgk {

// Waking a thread costs some microseconds, about what kMultiplyAdds take. The sizes' product may exceed 64 bits: a
// double.
inline int threads_for(double multiply_adds, int n_threads) {
  constexpr double kMultiplyAdds = 1 << 18;
  return static_cast<int>(std::min<double>(n_threads, 1 + multiply_adds / kMultiplyAdds));
}

}  // namespace lgk
