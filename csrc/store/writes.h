// Writes of files past the page cache by a thread of their own: between two of them nothing waits for an interpreter.
#pragma once
#include <cstdint>
#include <memory>

namespace lgk::store {

// Done one after the other, in the order they were added. In a forked child there is no such thread, and the object may
// only be destroyed.
class Writes {
 public:
  static constexpr int64_t kBlock = 4096;  // what O_DIRECT asks addresses, offsets and lengths to be multiples of

  Writes();
  ~Writes();  // once all are done

  // Queues `bytes` for the file from `offset` on; the write's number. The memory stays as it is until it is done. The
  // last block of a file may be short: it is written whole and cut, because a page in the cache would have to be
  // synced. A file that refuses direct writes is written through the page cache.
  int64_t add(int fd, const void* data, int64_t bytes, int64_t offset);

  // Returns once the write is done: 0, or its errno.
  int wait(int64_t number);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lgk::store
