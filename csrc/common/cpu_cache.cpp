#include <unistd.h>

#include <algorithm>
#include <numeric>

#include "common/buffer.h"
#include "common/cache.h"

namespace lgk {
namespace {

struct Cache {
  int64_t ways = 8, way_bytes = 4096;  // what most have that do not tell
};

Cache read_cache() {
  Cache cache;
#ifdef _SC_LEVEL1_DCACHE_ASSOC
  const int64_t ways = sysconf(_SC_LEVEL1_DCACHE_ASSOC), size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (ways > 0 && size >= ways * kCacheLine) cache = {ways, size / ways};
#endif
  return cache;
}

}  // namespace

bool crowd_a_set(int64_t rows, int64_t stride) {
  static const Cache cache = read_cache();
  const int64_t sets = cache.way_bytes / std::gcd(cache.way_bytes, std::max<int64_t>(stride, 1));
  return ceil_div(rows, sets) > cache.ways;
}

}  // namespace lgk
