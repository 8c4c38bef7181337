// Pages of mapped files: asked for ahead of their use, brought in, let go. Addresses need no alignment.
#pragma once
#include <cstdint>

namespace lgk::store {

// Starts reading [address, address + bytes) from the disk and returns.
void read_ahead(const void* address, int64_t bytes);

// Returns once the pages are in memory and in the page table, in huge pages where the kernel has them; 0, or the errno
// of a disk that cannot be read (without this call, touching the page would end the process).
int populate(const void* address, int64_t bytes);

// Takes whole pages out of the page table. What was written to a private mapping is lost.
void let_go(const void* address, int64_t bytes);

}  // namespace lgk::store
