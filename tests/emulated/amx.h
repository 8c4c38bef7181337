// AMX in plain C++, as avx512.h: each thread has eight tiles while they are configured.
#pragma once
#include "emulated/avx512.h"

namespace emulated {

struct Tiles {
  alignas(64) uint8_t of[8][16][64];
  bool configured = false;
};
inline thread_local Tiles tiles;
EMULATED void configured() {
  if (!tiles.configured) __builtin_trap();
}
EMULATED void ldtilecfg(const void*) {  // always for 16 rows of 64 bytes
  if (tiles.configured) __builtin_trap();
  std::memset(tiles.of, 0, sizeof(tiles.of));
  tiles.configured = true;
}
EMULATED void tilerelease() { configured(), tiles.configured = false; }
EMULATED void tilezero(int t) { configured(), std::memset(tiles.of[t], 0, sizeof(tiles.of[t])); }
EMULATED void tileloadd(int t, const void* from, int64_t stride, int64_t offset) {
  configured();
  for (int i = 0; i < 16; ++i) std::memcpy(tiles.of[t][i], static_cast<const char*>(from) + offset + i * stride, 64);
}
EMULATED void tilestored(int t, void* to, int64_t stride) {
  configured();
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * stride, tiles.of[t][i], 64);
}
inline void tdpbf16ps(int c, int a, int b) {
  configured();
  for (int m = 0; m < 16; ++m) {
    float sums[2][16] = {};
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        for (int j = 0; j < 2; ++j) {
          uint16_t x, y;
          std::memcpy(&x, &tiles.of[a][m][4 * k + 2 * j], 2);
          std::memcpy(&y, &tiles.of[b][k][4 * n + 2 * j], 2);
          sums[j][n] = flushed(std::fma(from_bf16(x), from_bf16(y), sums[j][n]));
        }
      }
    }
    for (int n = 0; n < 16; ++n) {
      float to;
      std::memcpy(&to, &tiles.of[c][m][4 * n], 4);
      to = flushed(to + flushed(sums[0][n] + sums[1][n]));
      std::memcpy(&tiles.of[c][m][4 * n], &to, 4);
    }
  }
}
template <class A>
inline void multiply_bytes(int c, int a, int b) {
  configured();
  for (int m = 0; m < 16; ++m) {
    int32_t sums[16];
    std::memcpy(sums, tiles.of[c][m], 64);
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 16; ++n) {
        for (int j = 0; j < 4; ++j) {
          sums[n] += static_cast<A>(tiles.of[a][m][4 * k + j]) * static_cast<int8_t>(tiles.of[b][k][4 * n + j]);
        }
      }
    }
    std::memcpy(tiles.of[c][m], sums, 64);
  }
}
inline void tdpbssd(int c, int a, int b) { multiply_bytes<int8_t>(c, a, b); }
inline void tdpbusd(int c, int a, int b) { multiply_bytes<uint8_t>(c, a, b); }

}  // namespace emulated
