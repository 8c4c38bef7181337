// Which kernels a CUDA device can run.
#pragma once

namespace lgk {

// mma.sync and copies by threads; or wgmma and the copy engine, which exist on compute capability 9.0 alone.
enum class Arch : int { kSm80 = 80, kSm90 = 90 };

// Whether this build holds the kernels of sm_90a.
#ifdef LGK_SM90A
inline constexpr bool kHasSm90 = true;
#else
inline constexpr bool kHasSm90 = false;
#endif

}  // namespace lgk
