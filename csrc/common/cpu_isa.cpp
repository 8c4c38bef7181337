// The run-time choice of an instruction set, made once.
#include <cstdlib>

#include "common/amx.h"
#include "common/check.h"
#include "common/isa.h"
#include "common/kernels.h"

namespace lgk {

extern const KernelSet kKernelsBase;
#if LGK_HAS_X86_SETS
extern const KernelSet kKernelsV3, kKernelsV4;
extern const Products<float> kPairsV4Bf16;
#endif
#if LGK_HAS_AMX
extern const Products<float> kPairsV4Amx;
#endif

namespace {

struct Isa {
  const char* name;
  const KernelSet* kernels;
  const Products<float>* pairs;  // null: bf16 is widened
  bool supported;
};

#if LGK_HAS_AMX
// The pairs' products by tiles; put together here, since nothing of a set's own files may run before it is chosen.
Products<float> by_tiles(Products<float> pairs, const Products<float>& tiles) {
  pairs.tile_step = tiles.tile_step;
  pairs.row_block = tiles.row_block;
  pairs.few_terms = tiles.few_terms;
  pairs.multiply = tiles.multiply;
  pairs.multiply_strip = tiles.multiply_strip;
  pairs.outer = tiles.outer;
  pairs.few = kFew / 2;
  pairs.dot = nullptr;  // Intel's vdpbf16ps multiplies half as many numbers a second as its fp32 instruction
  return pairs;
}
#endif

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> found = {{"base", &kKernelsBase, nullptr, true}};
#if LGK_HAS_X86_SETS
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("lzcnt");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    found.push_back({"v3", &kKernelsV3, nullptr, v3});
    found.push_back({"v4", &kKernelsV4, nullptr, v4});
    const bool has_pairs = v4 && __builtin_cpu_supports("avx512bf16");
    const Isa vnni = {"v4vnni", &kKernelsV4, nullptr, v4 && __builtin_cpu_supports("avx512vnni")};
    const Isa pairs = {"v4bf16", &kKernelsV4, &kPairsV4Bf16, has_pairs};
    const bool slow_pairs = __builtin_cpu_is("intel");
    found.push_back(slow_pairs ? pairs : vnni);
    found.push_back(slow_pairs ? vnni : pairs);
#endif
#if LGK_HAS_AMX
    static const Products<float> tiles = by_tiles(kPairsV4Bf16, kPairsV4Amx);
    found.push_back({"v4amx", &kKernelsV4, &tiles, has_pairs && amx_usable()});
#endif
    return found;
  }();
  return all;
}

const Isa& choose() {
  const char* asked = std::getenv("LOGRA_KERNELS_ISA");
  const Isa* fastest = nullptr;
  std::string have;
  for (const Isa& isa : isas()) {
    if (!isa.supported) continue;
    have += std::string(have.empty() ? "" : ", ") + isa.name;
    fastest = &isa;
    if (asked != nullptr && std::string(asked) == isa.name) return isa;
  }
  LGK_CHECK(asked == nullptr,
            std::string("LOGRA_KERNELS_ISA=") + asked + " is unknown or not supported here (have: " + have + ")");
  return *fastest;
}

const Isa& chosen() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace

template <>
const Products<float>& kernels<float>() {
  return chosen().kernels->f32;
}

template <>
const Products<double>& kernels<double>() {
  return chosen().kernels->f64;
}

template <>
const FactorKernels<float>& factor_kernels<float>() {
  return chosen().kernels->factors_f32;
}

template <>
const FactorKernels<double>& factor_kernels<double>() {
  return chosen().kernels->factors_f64;
}

template <>
const Products<float>& products<float>(Dtype a, Dtype b) {
  const bool pairs = chosen().pairs != nullptr && a == Dtype::kBF16 && b == Dtype::kBF16;
  return pairs ? *chosen().pairs : kernels<float>();
}

template <>
const Products<double>& products<double>(Dtype, Dtype) {
  return kernels<double>();
}

const char* isa_name() { return chosen().name; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) {
    if (isa.supported) names.push_back(isa.name);
  }
  return names;
}

}  // namespace lgk
