// Scratch memory, allocated before a parallel region starts, because an exception must not leave one.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

namespace lgk {

constexpr int64_t kCacheLine = 64;

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(allocate(count)) {}
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };

  static T* allocate(int64_t count) {
    constexpr int64_t kMost = (std::numeric_limits<int64_t>::max() - kCacheLine) / int64_t{sizeof(T)};
    if (count < 0 || count > kMost) throw std::bad_alloc();
    const int64_t bytes = (count * int64_t{sizeof(T)} + kCacheLine) / kCacheLine * kCacheLine;
    void* p = std::aligned_alloc(kCacheLine, static_cast<size_t>(bytes));
    if (p == nullptr) throw std::bad_alloc();
    return static_cast<T*>(p);
  }

  std::unique_ptr<T[], Free> data_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace lgk
