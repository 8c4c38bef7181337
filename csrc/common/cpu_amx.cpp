#include <cstdint>
#include <string>

#include "common/amx.h"
#include "common/isa.h"
#include "common/kernels.h"

#if LGK_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lgk {

#if LGK_HAS_AMX
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

thread_local int scopes = 0;

}  // namespace

bool amx_usable() {
  static const bool usable = [] {
    constexpr long kAskPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM
    __builtin_cpu_init();
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
  }();
  return usable;
}

TileScope::TileScope() {
  static const bool tiles = std::string(isa_name()) == "v4amx";
  if (!tiles || scopes++ > 0) return;
  const TileConfig config;
  asm volatile("ldtilecfg %0" : : "m"(config));
}

TileScope::~TileScope() {
  if (scopes > 0 && --scopes == 0) asm volatile("tilerelease");
}
#else
bool amx_usable() { return false; }
TileScope::TileScope() {}
TileScope::~TileScope() {}
#endif

}  // namespace lgk
