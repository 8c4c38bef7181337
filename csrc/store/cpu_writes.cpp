#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#ifdef __linux__
#include <sys/resource.h>
#include <sys/syscall.h>
#endif

#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

#include "store/writes.h"

#ifndef O_DIRECT
#define O_DIRECT 0
#endif

namespace lgk::store {
namespace {

struct Write {
  int fd;
  const char* data;
  int64_t bytes;
  int64_t offset;
};

// Go on through the page cache; false if that is so already.
bool leave_direct(int fd) {
  const int flags = fcntl(fd, F_GETFL);
  return flags != -1 && (flags & O_DIRECT) != 0 && fcntl(fd, F_SETFL, flags & ~O_DIRECT) == 0;
}

int write_at(const Write& all) {
  Write left = all;
  while (left.bytes > 0) {
    const ssize_t written = pwrite(left.fd, left.data, left.bytes, left.offset);
    if (written == 0) return EIO;
    if (written < 0) {
      const int error = errno;
      // Larger blocks than ours, or the rest of a write that was cut short.
      if (error == EINTR || (error == EINVAL && leave_direct(left.fd))) continue;
      return error;
    }
    left.data += written;
    left.bytes -= written;
    left.offset += written;
  }
  return 0;
}

int cut(int fd, int64_t bytes) {
  int result;
  do {
    result = ftruncate(fd, bytes);
  } while (result != 0 && errno == EINTR);
  return result == 0 ? 0 : errno;
}

int write(const Write& all) {
  const int64_t rest = all.bytes % Writes::kBlock, whole = all.bytes - rest;
  const int error = write_at({all.fd, all.data, whole, all.offset});
  if (error != 0 || rest == 0) return error;
  alignas(Writes::kBlock) char block[Writes::kBlock] = {};
  std::memcpy(block, all.data + whole, rest);
  const int last = write_at({all.fd, block, Writes::kBlock, all.offset + whole});
  return last != 0 ? last : cut(all.fd, all.offset + all.bytes);
}

// This thread sleeps almost all of the time, and whenever it wakes up the disk is idle. With a short slice it takes the
// processor from those that compute (Linux 6.12); without, it waits for up to 3 ms where there are no more of them.
void ask_for_short_slice() {
#if defined(__linux__) && defined(SYS_sched_setattr)
  if (sched_getscheduler(0) != SCHED_OTHER) return;
  struct {
    uint32_t size = 48, policy = SCHED_OTHER;
    uint64_t flags = 0;
    int32_t nice = 0;
    uint32_t priority = 0;
    uint64_t runtime_ns = 100'000, deadline = 0, period = 0;
  } attributes;
  attributes.nice = getpriority(PRIO_PROCESS, 0);
  syscall(SYS_sched_setattr, 0, &attributes, 0);  // a kernel that refuses leaves things as they are
#endif
}

}  // namespace

struct Writes::State {
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Write> queue;
  int64_t added = 0, done = 0;
  std::map<int64_t, int> errors;  // of the writes that failed
  bool ending = false;
  const pid_t owner = getpid();
  std::thread thread{&State::run, this};

  void run() {
    ask_for_short_slice();
    std::unique_lock<std::mutex> lock(mutex);
    while (true) {
      changed.wait(lock, [this] { return ending || !queue.empty(); });
      if (queue.empty()) return;
      const Write next = queue.front();
      queue.pop_front();
      lock.unlock();
      const int error = write(next);
      lock.lock();
      if (error != 0) errors[done] = error;
      ++done;
      changed.notify_all();
    }
  }
};

Writes::Writes() : state_(std::make_unique<State>()) {}

Writes::~Writes() {
  if (getpid() != state_->owner) {
    (void)state_.release();  // another process's thread may have held the mutex
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->ending = true;
    state_->changed.notify_all();
  }
  state_->thread.join();
}

int64_t Writes::add(int fd, const void* data, int64_t bytes, int64_t offset) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->queue.push_back({fd, static_cast<const char*>(data), bytes, offset});
  state_->changed.notify_all();
  return state_->added++;
}

int Writes::wait(int64_t number) {
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->changed.wait(lock, [&] { return state_->done > number; });
  const auto error = state_->errors.find(number);
  return error == state_->errors.end() ? 0 : error->second;
}

}  // namespace lgk::store
