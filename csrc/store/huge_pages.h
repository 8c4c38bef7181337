// Memory of large tables: on huge pages, because the kernel clears each page when it is first touched, and small ones
// that are touched at random miss the TLB as well.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace lgk::store {

template <typename T>
struct HugePages {
  using value_type = T;
  static constexpr std::size_t kHuge = std::size_t{2} << 20;

  HugePages() = default;
  template <typename Other>
  HugePages(const HugePages<Other>&) {}

  T* allocate(std::size_t count) {
    if (count > (~std::size_t{0} - kHuge) / sizeof(T)) throw std::bad_alloc();
    const std::size_t bytes = count * sizeof(T);
    const std::size_t alignment = bytes < kHuge ? alignof(std::max_align_t) : kHuge;
    void* p = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (p == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes >= kHuge) madvise(p, bytes / kHuge * kHuge, MADV_HUGEPAGE);  // where there are none, small ones do
#endif
    return static_cast<T*>(p);
  }
  void deallocate(T* p, std::size_t) { std::free(p); }

  template <typename Other>
  bool operator==(const HugePages<Other>&) const {
    return true;
  }
  template <typename Other>
  bool operator!=(const HugePages<Other>&) const {
    return false;
  }
};

}  // namespace lgk::store
