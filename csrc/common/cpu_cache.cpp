#include <unistd.h>

#include <algorithm>
#include <numeric>

#include "common/buffer.h"
#include "common/cache.h"
#include "common/isa.h"

#if LGK_HAS_X86_SETS
#include <cpuid.h>
#endif

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

bool is_zen_4() {
#if LGK_HAS_X86_SETS
  constexpr unsigned kFamily = 0x19;  // of Zen 3 too, which has no set that asks
  unsigned a = 0, b = 0, c = 0, d = 0;
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d) && (a >> 8 & 0xf) + (a >> 20 & 0xff) == kFamily;
#else
  return false;
#endif
}

}  // namespace

bool fetches_into_l2() {
  static const bool found = is_zen_4();
  return found;
}

bool crowd_a_set(int64_t rows, int64_t stride) {
  static const Cache cache = read_cache();
  const int64_t sets = cache.way_bytes / std::gcd(cache.way_bytes, std::max<int64_t>(stride, 1));
  return ceil_div(rows, sets) > cache.ways;
}

}  // namespace lgk
