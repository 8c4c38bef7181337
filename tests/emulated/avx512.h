// AVX-512 and its extensions in plain C++, lane by lane: those of its instructions that csrc uses, under their
// intrinsics' names, from what Intel's manual says of them. What an instruction faults at traps.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define EMULATED static inline __attribute__((unused))

namespace emulated {

template <typename T, typename V>
struct Lanes {
  static constexpr int kCount = sizeof(V) / sizeof(T);
  T of[kCount];
  Lanes() : of{} {}
  Lanes(const V& v) { std::memcpy(of, &v, sizeof(V)); }
  operator V() const {
    V v;
    std::memcpy(&v, of, sizeof(V));
    return v;
  }
};
typedef Lanes<float, __m512> F;
typedef Lanes<uint8_t, __m512i> U8;
typedef Lanes<int8_t, __m512i> I8;
typedef Lanes<uint16_t, __m512i> U16;
typedef Lanes<uint32_t, __m512i> U32;
typedef Lanes<int32_t, __m512i> I32;
typedef Lanes<uint64_t, __m512i> U64;

template <class To, class Fn>
EMULATED To each(Fn f) {
  To to;
  for (int i = 0; i < To::kCount; ++i) to.of[i] = f(i);
  return to;
}
EMULATED bool bit(uint64_t mask, int i) { return mask >> i & 1; }

#define LANES_OF_TWO(name, T, V, expression)           \
  EMULATED V name(V x, V y) {                          \
    T a(x), b(y);                                      \
    return each<T>([&](int i) { return expression; }); \
  }
#define MASKED_LANES_OF_TWO(name, T, V, expression)                       \
  EMULATED V name(uint64_t mask, V x, V y) {                              \
    T a(x), b(y);                                                         \
    return each<T>([&](int i) { return bit(mask, i) ? expression : 0; }); \
  }

LANES_OF_TWO(add_ps, F, __m512, a.of[i] + b.of[i])
LANES_OF_TWO(sub_ps, F, __m512, a.of[i] - b.of[i])
LANES_OF_TWO(mul_ps, F, __m512, a.of[i] * b.of[i])
LANES_OF_TWO(add_epi16, U16, __m512i, uint16_t(a.of[i] + b.of[i]))
LANES_OF_TWO(add_epi32, U32, __m512i, a.of[i] + b.of[i])
LANES_OF_TWO(sub_epi8, U8, __m512i, uint8_t(a.of[i] - b.of[i]))
LANES_OF_TWO(sub_epi32, U32, __m512i, a.of[i] - b.of[i])
LANES_OF_TWO(and_si512, U64, __m512i, a.of[i] & b.of[i])
LANES_OF_TWO(or_si512, U64, __m512i, a.of[i] | b.of[i])
LANES_OF_TWO(xor_si512, U64, __m512i, a.of[i] ^ b.of[i])
LANES_OF_TWO(srlv_epi16, U16, __m512i, uint16_t(b.of[i] < 16 ? a.of[i] >> b.of[i] : 0))
MASKED_LANES_OF_TWO(maskz_srlv_epi32, U32, __m512i, (b.of[i] < 32 ? a.of[i] >> b.of[i] : 0))
MASKED_LANES_OF_TWO(maskz_min_epi32, I32, __m512i, (a.of[i] < b.of[i] ? a.of[i] : b.of[i]))
MASKED_LANES_OF_TWO(maskz_max_epi32, I32, __m512i, (a.of[i] > b.of[i] ? a.of[i] : b.of[i]))
MASKED_LANES_OF_TWO(maskz_min_epu32, U32, __m512i, (a.of[i] < b.of[i] ? a.of[i] : b.of[i]))
MASKED_LANES_OF_TWO(maskz_permutexvar_epi8, U8, __m512i, b.of[a.of[i] & 63])
MASKED_LANES_OF_TWO(maskz_permutexvar_epi16, U16, __m512i, b.of[a.of[i] & 31])
MASKED_LANES_OF_TWO(maskz_permutexvar_epi32, U32, __m512i, b.of[a.of[i] & 15])
EMULATED __m512 maskz_permutexvar_ps(uint64_t mask, __m512i index, __m512 x) {
  U32 a(index);
  F b(x);
  return each<F>([&](int i) { return bit(mask, i) ? b.of[a.of[i] & 15] : 0; });
}
EMULATED __m512i permutex2var_epi8(__m512i x, __m512i index, __m512i y) {
  U8 a(x), at(index), b(y);
  return each<U8>([&](int i) { return at.of[i] & 64 ? b.of[at.of[i] & 63] : a.of[at.of[i] & 63]; });
}
EMULATED __m512 fmadd_ps(__m512 x, __m512 y, __m512 z) {
  F a(x), b(y), c(z);
  return each<F>([&](int i) { return std::fma(a.of[i], b.of[i], c.of[i]); });
}
EMULATED __m512 fnmadd_ps(__m512 x, __m512 y, __m512 z) {
  F a(x), b(y), c(z);
  return each<F>([&](int i) { return std::fma(-a.of[i], b.of[i], c.of[i]); });
}
EMULATED __m512 mask_add_ps(__m512 src, uint64_t mask, __m512 x, __m512 y) {
  F s(src), a(x), b(y);
  return each<F>([&](int i) { return bit(mask, i) ? a.of[i] + b.of[i] : s.of[i]; });
}
EMULATED __m512i mask_sub_epi8(__m512i src, uint64_t mask, __m512i x, __m512i y) {
  U8 s(src), a(x), b(y);
  return each<U8>([&](int i) { return uint8_t(bit(mask, i) ? a.of[i] - b.of[i] : s.of[i]); });
}
EMULATED __m512 mask_blend_ps(uint64_t mask, __m512 x, __m512 y) {
  F a(x), b(y);
  return each<F>([&](int i) { return bit(mask, i) ? b.of[i] : a.of[i]; });
}
EMULATED __mmask16 cmp_ps_mask(__m512 x, __m512 y, int how) {
  F a(x), b(y);
  if (how != _CMP_GE_OQ) __builtin_trap();
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint32_t(a.of[i] >= b.of[i]) << i;
  return mask;
}
EMULATED __mmask16 cmplt_epu32_mask(__m512i x, __m512i y) {
  U32 a(x), b(y);
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint32_t(a.of[i] < b.of[i]) << i;
  return mask;
}
EMULATED __mmask64 movepi8_mask(__m512i x) {
  U8 a(x);
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= uint64_t(a.of[i] >> 7) << i;
  return mask;
}
EMULATED __m512i ternarylogic_epi32(__m512i x, __m512i y, __m512i z, int table) {
  U8 a(x), b(y), c(z);
  return each<U8>([&](int i) {
    int out = 0;
    for (int j = 0; j < 8; ++j) {
      const int at = (a.of[i] >> j & 1) << 2 | (b.of[i] >> j & 1) << 1 | (c.of[i] >> j & 1);
      out |= (table >> at & 1) << j;
    }
    return uint8_t(out);
  });
}
#define SHIFT(name, T, S, shift)                                        \
  EMULATED __m512i name(uint64_t mask, __m512i x, int by) {             \
    T a(x);                                                             \
    return each<T>([&](int i) { return S(bit(mask, i) ? shift : 0); }); \
  }
SHIFT(maskz_slli_epi16, U16, uint16_t, (by < 16 ? a.of[i] << by : 0))
SHIFT(maskz_srli_epi16, U16, uint16_t, (by < 16 ? a.of[i] >> by : 0))
SHIFT(maskz_slli_epi32, U32, uint32_t, (by < 32 ? a.of[i] << by : 0))
SHIFT(maskz_srli_epi32, U32, uint32_t, (by < 32 ? a.of[i] >> by : 0))
SHIFT(maskz_srli_epi64, U64, uint64_t, (by < 64 ? a.of[i] >> by : 0))
SHIFT(maskz_srai_epi32, I32, int32_t, (a.of[i] >> (by < 32 ? by : 31)))
EMULATED __m512i srli_epi16(__m512i x, int by) { return maskz_srli_epi16(~0ull, x, by); }
EMULATED __m512i mask_srli_epi32(__m512i src, uint64_t mask, __m512i x, int by) {
  U32 s(src), a(x);
  return each<U32>([&](int i) { return bit(mask, i) ? (by < 32 ? a.of[i] >> by : 0) : s.of[i]; });
}

// Lanes of 16 bytes.
#define UNPACK(name, T, half)                                     \
  EMULATED __m512i name(uint64_t mask, __m512i x, __m512i y) {    \
    T a(x), b(y);                                                 \
    constexpr int n = T::kCount / 4;                              \
    return each<T>([&](int i) {                                   \
      const int from = i / n * n + half * n / 2 + i % n / 2;      \
      return !bit(mask, i) ? 0 : i % 2 ? b.of[from] : a.of[from]; \
    });                                                           \
  }
UNPACK(maskz_unpacklo_epi8, U8, 0)
UNPACK(maskz_unpackhi_epi8, U8, 1)
UNPACK(maskz_unpacklo_epi32, U32, 0)
UNPACK(maskz_unpackhi_epi32, U32, 1)
UNPACK(maskz_unpacklo_epi64, U64, 0)
UNPACK(maskz_unpackhi_epi64, U64, 1)
EMULATED __m512i maskz_shuffle_epi32(uint64_t mask, __m512i x, int how) {
  U32 a(x);
  return each<U32>([&](int i) { return bit(mask, i) ? a.of[i / 4 * 4 + (how >> 2 * (i % 4) & 3)] : 0; });
}
EMULATED __m512 maskz_permute_ps(uint64_t mask, __m512 x, int how) {
  F a(x);
  return each<F>([&](int i) { return bit(mask, i) ? a.of[i / 4 * 4 + (how >> 2 * (i % 4) & 3)] : 0; });
}
EMULATED __m512i maskz_shuffle_i64x2(uint64_t mask, __m512i x, __m512i y, int how) {
  U64 a(x), b(y);
  return each<U64>([&](int i) {
    const int lane = how >> i / 2 * 2 & 3;
    return !bit(mask, i) ? 0 : (i < 4 ? a : b).of[2 * lane + i % 2];
  });
}
EMULATED __m512i maskz_broadcast_i32x4(uint64_t mask, __m128i x) {
  Lanes<uint32_t, __m128i> a(x);
  return each<U32>([&](int i) { return bit(mask, i) ? a.of[i % 4] : 0; });
}
EMULATED __m512i maskz_broadcast_i64x4(uint64_t mask, __m256i x) {
  Lanes<uint64_t, __m256i> a(x);
  return each<U64>([&](int i) { return bit(mask, i) ? a.of[i % 4] : 0; });
}
EMULATED __m128i maskz_extracti32x4_epi32(uint64_t mask, __m512i x, int which) {
  U32 a(x);
  return each<Lanes<uint32_t, __m128i>>([&](int i) { return bit(mask, i) ? a.of[4 * which + i] : 0; });
}
EMULATED __m512i maskz_inserti32x4(uint64_t mask, __m512i x, __m128i y, int which) {
  U32 a(x);
  Lanes<uint32_t, __m128i> b(y);
  return each<U32>([&](int i) { return !bit(mask, i) ? 0 : i / 4 == which ? b.of[i % 4] : a.of[i]; });
}

// Conversions.
EMULATED int32_t nearest(float x) {  // out of range and NaN: the smallest integer
  return x >= -2147483648.f && x < 2147483648.f ? static_cast<int32_t>(std::nearbyint(x))
                                                : std::numeric_limits<int32_t>::min();
}
EMULATED __m512 maskz_cvtepi32_ps(uint64_t mask, __m512i x) {
  I32 a(x);
  return each<F>([&](int i) { return bit(mask, i) ? static_cast<float>(a.of[i]) : 0; });
}
EMULATED __m512i maskz_cvt_roundps_epi32(uint64_t mask, __m512 x, int) {
  F a(x);
  return each<I32>([&](int i) { return bit(mask, i) ? nearest(a.of[i]) : 0; });
}
EMULATED __m512i mask_cvt_roundps_epi32(__m512i src, uint64_t mask, __m512 x, int) {
  F a(x);
  I32 s(src);
  return each<I32>([&](int i) { return bit(mask, i) ? nearest(a.of[i]) : s.of[i]; });
}
EMULATED __m512 maskz_roundscale_ps(uint64_t mask, __m512 x, int how) {
  if (how >> 4) __builtin_trap();
  F a(x);
  return each<F>([&](int i) { return bit(mask, i) ? std::nearbyint(a.of[i]) : 0; });
}
EMULATED __m512i maskz_cvtepu16_epi32(uint64_t mask, __m256i x) {
  Lanes<uint16_t, __m256i> a(x);
  return each<U32>([&](int i) { return uint32_t(bit(mask, i) ? a.of[i] : 0); });
}
EMULATED __m512i maskz_cvtepi8_epi32(uint64_t mask, __m128i x) {
  Lanes<int8_t, __m128i> a(x);
  return each<I32>([&](int i) { return int32_t(bit(mask, i) ? a.of[i] : 0); });
}
EMULATED __m512 maskz_cvtph_ps(uint64_t mask, __m256i x) {
  Lanes<uint16_t, __m256i> a(x);
  return each<F>([&](int i) { return bit(mask, i) ? _cvtsh_ss(a.of[i]) : 0; });
}
EMULATED __m128i maskz_cvtepi32_epi8(uint64_t mask, __m512i x) {
  U32 a(x);
  return each<Lanes<uint8_t, __m128i>>([&](int i) { return uint8_t(bit(mask, i) ? a.of[i] : 0); });
}
EMULATED __m128i maskz_cvtepi32_epi8_128(uint64_t mask, __m128i x) {
  Lanes<uint32_t, __m128i> a(x);
  return each<Lanes<uint8_t, __m128i>>([&](int i) { return uint8_t(i < 4 && bit(mask, i) ? a.of[i] : 0); });
}
EMULATED __m128i maskz_cvtsepi32_epi8(uint64_t mask, __m512i x) {
  I32 a(x);
  return each<Lanes<int8_t, __m128i>>([&](int i) {
    return int8_t(!bit(mask, i) ? 0 : a.of[i] > 127 ? 127 : a.of[i] < -128 ? -128 : a.of[i]);
  });
}
EMULATED __m128i maskz_cvtepi64_epi8(uint64_t mask, __m512i x) {
  U64 a(x);
  return each<Lanes<uint8_t, __m128i>>([&](int i) { return uint8_t(i < 8 && bit(mask, i) ? a.of[i] : 0); });
}
EMULATED __m256i maskz_cvtepi16_epi8(uint64_t mask, __m512i x) {
  U16 a(x);
  return each<Lanes<uint8_t, __m256i>>([&](int i) { return uint8_t(bit(mask, i) ? a.of[i] : 0); });
}
EMULATED float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }
EMULATED uint16_t to_bf16(float x) {
  x = flushed(x);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
EMULATED float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return flushed(out);
}
EMULATED __m256bh cvtneps_pbh(__m512 x) {
  F a(x);
  return each<Lanes<uint16_t, __m256bh>>([&](int i) { return to_bf16(a.of[i]); });
}
EMULATED __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  F a(high), b(low);
  return each<Lanes<uint16_t, __m512bh>>([&](int i) { return to_bf16(i < 16 ? b.of[i] : a.of[i - 16]); });
}
template <class A, class B>
EMULATED __m512 pairs(__m512 sum, A x, B y) {
  static_assert(sizeof(A) == 64 && sizeof(B) == 64, "vectors");
  F s(sum);
  Lanes<uint16_t, A> a(x);
  Lanes<uint16_t, B> b(y);
  return each<F>([&](int i) {
    float t = flushed(s.of[i]);
    for (int j = 1; j >= 0; --j) t = flushed(std::fma(from_bf16(a.of[2 * i + j]), from_bf16(b.of[2 * i + j]), t));
    return t;
  });
}
EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh x, __m512bh y) { return pairs(sum, x, y); }
template <class S, class A>
EMULATED void vdpbf16ps_all(S& sum, A x, const void* number) {
  F y;
  for (float& lane : y.of) std::memcpy(&lane, number, sizeof(lane));
  sum = (S)pairs((__m512)sum, x, static_cast<__m512>(y));
}
EMULATED void vdpbf16ps(__m512& sum, __m512i x, __m512i y) { sum = pairs(sum, x, y); }
EMULATED void vpdpbusd(__m512i& sum, __m512i codes, __m512i digits) {
  I32 s(sum);
  U8 a(codes);
  I8 b(digits);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 4; ++j) s.of[i] += a.of[4 * i + j] * b.of[4 * i + j];
  }
  sum = s;
}

// Memory: masked lanes are neither read nor written.
template <class T, class V>
EMULATED V load(uint64_t mask, const void* from) {
  return each<Lanes<T, V>>([&](int i) {
    T x = 0;
    if (bit(mask, i)) std::memcpy(&x, static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
    return x;
  });
}
template <class T, class V>
EMULATED void store(uint64_t mask, void* to, V v) {
  Lanes<T, V> a(v);
  for (int i = 0; i < Lanes<T, V>::kCount; ++i) {
    if (bit(mask, i)) std::memcpy(static_cast<char*>(to) + i * sizeof(T), &a.of[i], sizeof(T));
  }
}
EMULATED const void* aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
  return p;
}
EMULATED __m512 loadu_ps(const void* p) { return load<float, __m512>(~0ull, p); }
EMULATED __m512i loadu_si512(const void* p) { return load<uint64_t, __m512i>(~0ull, p); }
EMULATED __m512i load_si512(const void* p) { return loadu_si512(aligned(p)); }
EMULATED void storeu_ps(void* p, __m512 v) { store<float>(~0ull, p, v); }
EMULATED void storeu_si512(void* p, __m512i v) { store<uint64_t>(~0ull, p, v); }
EMULATED void store_ps(void* p, __m512 v) { storeu_ps(const_cast<void*>(aligned(p)), v); }
EMULATED void store_si512(void* p, __m512i v) { storeu_si512(const_cast<void*>(aligned(p)), v); }
EMULATED __m512 maskz_loadu_ps(uint64_t mask, const void* p) { return load<float, __m512>(mask, p); }
EMULATED __m512i maskz_loadu_epi8(uint64_t mask, const void* p) { return load<uint8_t, __m512i>(mask, p); }
EMULATED __m512i maskz_loadu_epi16(uint64_t mask, const void* p) { return load<uint16_t, __m512i>(mask, p); }
EMULATED __m512i maskz_loadu_epi32(uint64_t mask, const void* p) { return load<uint32_t, __m512i>(mask, p); }
EMULATED __m128 maskz_loadu_ps_128(uint64_t mask, const void* p) { return load<float, __m128>(mask, p); }
EMULATED __m256i maskz_loadu_epi16_256(uint64_t mask, const void* p) { return load<uint16_t, __m256i>(mask, p); }
EMULATED void mask_storeu_ps(void* p, uint64_t mask, __m512 v) { store<float>(mask, p, v); }
EMULATED void mask_storeu_epi16_256(void* p, uint64_t mask, __m256i v) { store<uint16_t>(mask, p, v); }

EMULATED __m512 set1_ps(float x) {
  return each<F>([&](int) { return x; });
}
EMULATED __m512i set1_epi8(char x) {
  return each<U8>([&](int) { return uint8_t(x); });
}
EMULATED __m512i set1_epi16(short x) {
  return each<U16>([&](int) { return uint16_t(x); });
}
EMULATED __m512i set1_epi32(int x) {
  return each<U32>([&](int) { return uint32_t(x); });
}
EMULATED __m512i set1_epi64(long long x) {
  return each<U64>([&](int) { return uint64_t(x); });
}
EMULATED __m512 setzero_ps() { return F(); }
EMULATED __m512i setzero_si512() { return U8(); }
template <class... X>
EMULATED __m512i set_epi32(X... x) {
  const int32_t all[16] = {static_cast<int32_t>(x)...};
  return each<I32>([&](int i) { return all[15 - i]; });
}
template <class... X>
EMULATED __m512i set_epi64(X... x) {
  const uint64_t all[8] = {static_cast<uint64_t>(x)...};
  return each<U64>([&](int i) { return all[7 - i]; });
}
EMULATED __m512 castsi512_ps(__m512i x) { return (__m512)x; }
EMULATED __m512i castps_si512(__m512 x) { return (__m512i)x; }
EMULATED __m512i zextsi128_si512(__m128i x) { return maskz_inserti32x4(~0ull, setzero_si512(), x, 0); }
EMULATED __m512 castps128_ps512(__m128 x) { return (__m512)zextsi128_si512((__m128i)x); }

}  // namespace emulated
