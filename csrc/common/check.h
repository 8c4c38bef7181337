// A failed check becomes a Python ValueError in the binding; it must name the op and the argument.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#define LGK_CHECK(ok, message)                                                          \
  do {                                                                                  \
    if (!(ok)) throw std::invalid_argument(std::string("logra_kernels: ") + (message)); \
  } while (0)

namespace lgk {

// No size is negative, and an array of them in fp64 can be addressed with 64-bit byte offsets.
inline void check_sizes(const char* op, std::initializer_list<int64_t> sizes) {
  int64_t bytes = sizeof(double);
  bool empty = false;
  for (int64_t size : sizes) {
    LGK_CHECK(size >= 0, std::string(op) + ": size " + std::to_string(size) + " is negative");
    empty = empty || size == 0;
  }
  for (int64_t size : sizes) {
    LGK_CHECK(empty || !__builtin_mul_overflow(bytes, size, &bytes),
              std::string(op) + ": the sizes multiply to more than 2^63 bytes");
  }
}

}  // namespace lgk
