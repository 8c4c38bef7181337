#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <system_error>
#include <thread>
#include <vector>

#include "store/pages.h"

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22  // Linux 5.14
#endif

namespace lgk::store {
namespace {

// Brought in by one thread at a time: the kernel reads ahead within it, and the other threads are at the next ones.
constexpr size_t kPiece = 2 << 20;

struct Pages {
  uintptr_t start;
  size_t bytes;
  uintptr_t page;
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

int advise(uintptr_t start, size_t bytes, int advice) {
  int result;
  do {
    result = madvise(reinterpret_cast<void*>(start), bytes, advice);
  } while (result != 0 && errno == EINTR);
  return result == 0 ? 0 : errno;
}

int populate_piece(uintptr_t start, size_t bytes, uintptr_t page) {
  const int error = advise(start, bytes, MADV_POPULATE_READ);
  if (error != 0 && error != EINVAL) return error == EFAULT ? EIO : error;
  // Needed on an older kernel. In a virtual machine the first touch of memory that the host has taken back costs a
  // microsecond a page: better here, where several threads share it, than where the bytes are hashed.
  for (size_t at = 0; at < bytes; at += page) {
    *reinterpret_cast<const volatile char*>(start + at);
  }
  return 0;
}

}  // namespace

int populate(const void* address, int64_t bytes, int n_threads) {
  const Pages pages = pages_of(address, bytes, false);
  if (pages.bytes == 0) return 0;
  const size_t pieces = (pages.bytes + kPiece - 1) / kPiece;
  std::atomic<size_t> next{0};
  std::atomic<int> failed{0};
  const auto work = [&] {
    for (size_t piece = next++; piece < pieces && failed == 0; piece = next++) {
      const size_t at = piece * kPiece;
      const int error = populate_piece(pages.start + at, std::min(kPiece, pages.bytes - at), pages.page);
      if (error != 0) failed = error;
    }
  };
  std::vector<std::thread> others;
  try {
    for (size_t i = 1; i < std::min<size_t>(n_threads, pieces); ++i) others.emplace_back(work);
  } catch (const std::system_error&) {  // no memory for another stack: those that began are enough
  }
  work();
  for (std::thread& other : others) other.join();
  return failed;
}

bool resident(const void* address, int64_t bytes) {
  constexpr size_t kSample = 16;  // a microsecond each
  const Pages pages = pages_of(address, bytes, false);
  const size_t count = pages.bytes / pages.page;
  for (size_t i = 0; i < std::min(kSample, count); ++i) {
    unsigned char in_memory = 0;
    const uintptr_t at = pages.start + count * i / kSample * pages.page;
    if (mincore(reinterpret_cast<void*>(at), pages.page, &in_memory) != 0 || !(in_memory & 1)) return false;
  }
  return true;
}

void let_go(const void* address, int64_t bytes) {
  const Pages pages = pages_of(address, bytes, true);
  if (pages.bytes > 0) advise(pages.start, pages.bytes, MADV_DONTNEED);
}

}  // namespace lgk::store
