#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "store/pages.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace lgk::store {
namespace {

struct Pages {
  uintptr_t start;
  size_t bytes;
  uintptr_t page;

  void* address() const { return reinterpret_cast<void*>(start); }
};

// Every page the range touches, or only those it covers.
Pages pages_of(const void* address, int64_t bytes, bool whole_only) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto from = reinterpret_cast<uintptr_t>(address);
  const uintptr_t to = from + static_cast<uintptr_t>(bytes);
  const uintptr_t up = page - 1;
  const uintptr_t start = (whole_only ? from + up : from) & ~up;
  const uintptr_t stop = (whole_only ? to : to + up) & ~up;
  return {start, stop > start ? stop - start : 0, page};
}

}  // namespace

void read_ahead(const void* address, int64_t bytes) {
  const Pages pages = pages_of(address, bytes, false);
  if (pages.bytes > 0) madvise(pages.address(), pages.bytes, MADV_WILLNEED);
}

int populate(const void* address, int64_t bytes) {
  const Pages pages = pages_of(address, bytes, false);
  if (pages.bytes == 0) return 0;
  int result;
  do {
    result = madvise(pages.address(), pages.bytes, MADV_POPULATE_READ);
  } while (result != 0 && errno == EINTR);
  if (result == 0) return 0;
  if (errno != EINVAL) return errno == EFAULT ? EIO : errno;
  for (size_t at = 0; at < pages.bytes; at += pages.page) {  // an older kernel
    *reinterpret_cast<const volatile char*>(pages.start + at);
  }
  return 0;
}

void let_go(const void* address, int64_t bytes) {
  const Pages pages = pages_of(address, bytes, true);
  if (pages.bytes > 0) madvise(pages.address(), pages.bytes, MADV_DONTNEED);
}

}  // namespace lgk::store
